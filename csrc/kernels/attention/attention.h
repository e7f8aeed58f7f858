// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace nf {

// Partial results of pairs that several CTAs share. One launch at a time may use it; every launch leaves the
// counters zero, as it must find them.
struct AttentionWorkspace {
  float* partials;  // attention_partial_floats()
  int* counters;    // attention_counters(), zero
};
int64_t attention_partial_floats();  // for the current device
int64_t attention_counters();

// Causal attention of a few queries a sequence over paged keys and values: sequence s owns the queries
// q_start[s] .. q_start[s+1]-1, which are the last of its kv_len[s] cached tokens. The caches hold Scalar, or
// e4m3 with one scale each. A sequence's result does not depend on the rest of the batch.
template <class Scalar>
struct AttentionParams {
  Scalar* out;                // [T, H, D], strides out_stride, D
  const Scalar* q;            // [T, H, D], strides q_stride, D; rows start at multiples of 16 bytes
  const void* k_cache;        // [P, K, 64, D], page stride k_page_stride, else contiguous
  const void* v_cache;        // the same
  const int64_t* page_table;  // [S, pages], row stride page_table_stride
  const int64_t* q_start;     // [S + 1]
  const int64_t* kv_len;      // [S]
  AttentionWorkspace workspace;
  int64_t num_tokens;  // T, may be 0
  int num_seqs;        // S
  int most_queries;    // of a sequence: those with more are not computed, their rows of `out` not touched
  int num_kv_heads;    // K
  int group;           // G = H / K, 1..16
  int head_dim;        // D, 64 or 128
  int64_t q_stride;    // elements between tokens
  int64_t out_stride;
  int64_t k_page_stride;  // elements between pages
  int64_t v_page_stride;
  int64_t page_table_stride;
  float softmax_scale;  // > 0
  float k_scale;        // 1 unless the caches are e4m3
  float v_scale;
  bool fp8_cache;
};
template <class Scalar>
void attention(const AttentionParams<Scalar>& p, cudaStream_t stream);

}  // namespace nf
