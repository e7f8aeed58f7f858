// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace nf {

// Rotates q of the first num_rotated tokens in place and copies the rotated k and v to their slots
// (half-split RoPE, in float, rounded to Scalar; k of qkv stays as it is). An e4m3 cache stores round_e4m3(x
// / scale), saturating; any other holds Scalar. A slot outside the cache is not written. Rows of qkv start at
// multiples of 16 bytes.
template <class Scalar>
struct RopeAppendParams {
  Scalar* qkv;               // [T, H + 2K, D], row stride qkv_stride
  void* k_cache;             // [P, K, B, D], page stride page_stride, else contiguous
  void* v_cache;             // the same
  const float* cos_sin;      // [positions, D]: cos, then sin, D/2 each; row stride cos_sin_stride
  const int64_t* positions;  // [T]
  const int64_t* slots;      // [T], page * B + offset
  int64_t num_tokens;        // T, may be 0
  int64_t num_rotated;       // at most T
  int num_heads;             // H
  int num_kv_heads;          // K
  int head_dim;              // D, a multiple of 16
  int64_t num_pages;         // P
  int page_size;             // B
  int64_t qkv_stride;        // elements between rows
  int64_t k_page_stride;     // elements between pages
  int64_t v_page_stride;
  int64_t cos_sin_stride;
  float k_scale;
  float v_scale;
  bool fp8_cache;
};
template <class Scalar>
void rope_append(const RopeAppendParams<Scalar>& p, cudaStream_t stream);

}  // namespace nf
