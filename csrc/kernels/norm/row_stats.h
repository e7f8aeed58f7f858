// SPDX-License-Identifier: Apache-2.0
// Rows of bf16 whose statistics are known before they are read, so that the kernel that reads them can
// normalise and quantise each element on its own:
//
//   stats[t, b] = {sum of x^2, largest |x * w|} over the columns of block b of row t
//
// with w the weight of the RMS norm that comes next, or 1 if none does. The kernels that make rows leave them
// (the epilogues of packed_linear), or row_stats() does. A block is 128 columns, or 64 of what SwiGLU makes of
// 128. All sums are added in one order (row_stats.cuh), by rms_norm too, so that a row has the same bits
// whichever way it goes.
//
// An e4m3 row then is y / scale with scale = largest |x * w| / rms(x) / 448, at least 1e-12: what
// quantize_fp8_per_token would choose but for the two roundings of y, which saturation covers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace nf {

constexpr int kStatsBlock = 128;  // columns of a block of row_stats()

// How the reader of such rows gets from x to y: y = rms_norm(x), rounded as rms_norm.h has it, or x if there
// is no norm; then divided by fp8_scale if the reader wants e4m3.
struct RowStatsParams {
  const float2* stats;               // [T, num_blocks]; null: x is read as it is
  const __nv_bfloat16* norm_weight;  // [X], or null: no norm
  const float* fp8_scale;            // [1], or null: each row's own
  int num_blocks;
  float eps;
};

// stats = statistics of x in blocks of kStatsBlock columns
struct MakeRowStatsParams {
  float2* stats;                     // [T, ceil(X / kStatsBlock)]
  const __nv_bfloat16* x;            // [T, X], row stride x_stride, at multiples of 16 bytes
  const __nv_bfloat16* norm_weight;  // [X], or null: 1
  int64_t num_tokens;                // T, may be 0
  int dim;                           // X, a multiple of 8
  int64_t x_stride;
};
void row_stats(const MakeRowStatsParams& p, cudaStream_t stream);

}  // namespace nf
