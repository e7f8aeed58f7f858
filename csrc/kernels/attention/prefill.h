// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace nf {

constexpr int kMostDecodeQueries = 8;  // sequences with more in a step are prefill_attention()'s
constexpr int kMaxPrefillSeqs = 1024;  // of a launch, with those that it leaves alone

// Causal attention of prompts over paged keys and values: sequence s owns the queries q_start[s] ..
// q_start[s+1]-1, which are the last of its kv_len[s] cached tokens. The caches hold Scalar, or e4m3 with one
// scale each. Only the sequences with more than kMostDecodeQueries queries: the others' rows of `out` are not
// touched. A sequence's result depends neither on the rest of the batch nor on the chunks in which its prompt
// is computed. One launch at a time on a device.
template <class Scalar>
struct PrefillAttentionParams {
  // [T, H, D], strides out_stride, D; rows start at multiples of 16 bytes. Scalar, or with out_scale e4m3:
  // round_e4m3(round_Scalar(result) / out_scale), saturating.
  void* out;
  const float* out_scale;     // [1], or nullptr
  const Scalar* q;            // [T, H, D], strides q_stride, D; rows as those of out
  const void* k_cache;        // [P, K, 64, D], page stride k_page_stride, else contiguous; the same
  const void* v_cache;        // the same
  const float* cos_sin;       // q is rotated by it, [positions, D], as in rope_append.h; null: it is already
  const int64_t* page_table;  // [S, pages], row stride page_table_stride
  const int64_t* q_start;     // [S + 1]
  const int64_t* kv_len;      // [S], each at least the sequence's queries
  int64_t num_tokens;         // T
  int64_t num_pages;          // P
  int num_seqs;               // S, at most kMaxPrefillSeqs
  int num_kv_heads;           // K
  int group;                  // G = H / K, 1..16
  int head_dim;               // D, 64 or 128
  int64_t q_stride;           // elements between tokens
  int64_t out_stride;
  int64_t k_page_stride;  // elements between pages
  int64_t v_page_stride;
  int64_t page_table_stride;
  int64_t cos_sin_stride;
  float softmax_scale;  // > 0
  float k_scale;        // 1 unless the caches are e4m3
  float v_scale;
  bool fp8_cache;
  // Products of e4m3, for caches of e4m3 and D = 128: each row of q is rounded as quantize_fp8_per_token()
  // does, and 256 times the weights of the softmax, relative to the largest of the keys so far. Else pages of
  // e4m3 are multiplied as halves.
  bool fp8_products;
};
template <class Scalar>
void prefill_attention(const PrefillAttentionParams<Scalar>& p, cudaStream_t stream);

// Is there a kernel for this GPU in this build? (sm_90a)
bool has_prefill_attention();

}  // namespace nf
