// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace nf {

// What CTAs that share a pair leave for its owner. Filled with 0xff before the first launch; every launch
// leaves it so. One launch at a time may use it.
int64_t attention_workspace_bytes();  // for the current device

// RoPE and KV append as part of attention (decode_attention): q is unrotated, and the new keys and values are
// taken from the same rows.
template <class Scalar>
struct AttentionAppend {
  const Scalar* k;       // [T, K, D], row stride q_stride, unrotated
  const Scalar* v;       // the same
  const float* cos_sin;  // [positions, D]: cos, then sin, D/2 each; row stride cos_sin_stride
  int64_t cos_sin_stride;
};

// Causal attention of a few queries a sequence over paged keys and values: sequence s owns the queries
// q_start[s] .. q_start[s+1]-1, which are the last of its kv_len[s] cached tokens. The caches hold Scalar, or
// e4m3 with one scale each. A sequence's result does not depend on the rest of the batch. Rows of `out` from
// q_start[S] on are padding and become zero.
//
// With `append`, bit for bit rope_append followed by this: rotates q and k (a token's position is its index
// in its sequence) and writes k and v of the sequences' last tokens to the pages that the page table has for
// them.
//
// With `append`, or where no sequence has more than one new token, these are read before the predecessor in
// the stream has finished (kernel.cuh): page_table, q_start, kv_len, cos_sin, out_scale and the cached tokens
// before the new ones. So whatever writes them must not be followed by overlapping launches only: between it
// and this launch there is a launch without overlap, a copy, or the start of a CUDA graph.
template <class Scalar>
struct AttentionParams {
  void* out;  // [T, H, D], strides out_stride, D: Scalar, or with out_scale e4m3
  const float*
      out_scale;    // [1]: out is round_e4m3(round_Scalar(result) / out_scale), saturating; may be nullptr
  const Scalar* q;  // [T, H, D], strides q_stride, D; rows start at multiples of 16 bytes
  AttentionAppend<Scalar> append;  // k may be nullptr: q is rotated, and the caches are complete
  void* k_cache;                   // [P, K, 64, D], page stride k_page_stride, else contiguous
  void* v_cache;                   // the same
  const int64_t* page_table;       // [S, pages], row stride page_table_stride
  const int64_t* q_start;          // [S + 1]
  const int64_t* kv_len;           // [S]
  void* workspace;                 // attention_workspace_bytes()
  int64_t num_tokens;              // T, may be 0
  int num_seqs;                    // S
  int most_queries;  // of a sequence: those with more are not computed, their rows of `out` not touched
  int num_kv_heads;  // K
  int group;         // G = H / K, 1..16
  int head_dim;      // D, 64 or 128
  int64_t q_stride;  // elements between tokens
  int64_t out_stride;
  int64_t k_page_stride;  // elements between pages
  int64_t v_page_stride;
  int64_t page_table_stride;
  float softmax_scale;  // > 0
  float k_scale;        // 1 unless the caches are e4m3
  float v_scale;
  bool fp8_cache;
  bool per_query;  // compute each by itself: its bits are those that it has alone, in a decode step
};
template <class Scalar>
void attention(const AttentionParams<Scalar>& p, cudaStream_t stream);

// New tokens of a sequence that an `append` may have: more belong to a prompt.
constexpr int kMaxAppended = 8;

}  // namespace nf
