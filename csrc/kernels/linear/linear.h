// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "host/linear_schedule.h"
#include "host/weight_layout.h"
#include "kernels/norm/row_stats.h"

namespace nf {

// packed = weight in the format of weight_layout.h. Works for any type of `shape.row_bytes` / K bytes.
struct PackWeightParams {
  void* packed;        // shape.packed_bytes(), at a multiple of 16 bytes
  const void* weight;  // [N, K], contiguous, at a multiple of 16 bytes
  PackedShape shape;
  bool interleave;  // is it a gate_up weight? N is then a multiple of 32
};
void pack_weight(const PackWeightParams& p, cudaStream_t stream);

constexpr int kMaxTokensWithStats = 16;  // of rows that are read or left with statistics

enum class OutType { kBfloat16, kFloat, kFp8 };

enum class Epilogue {
  kStore,   // out = y
  kAdd,     // out += y: a residual; kBfloat16 only
  kSwiglu,  // out = silu(gate) * up, [T, N / 2], of an interleaved gate_up weight; kBfloat16, or kFp8 after
            // division by out_scale
};

// y[t, n] = sum over k of x[t, k] weight[n, k], times the two scales, in FP32. kStore rounds it once; the
// other epilogues first to bf16, as the ops do that they replace, and SwiGLU's product too. x has the
// weight's type, __nv_fp8_e4m3 or __nv_bfloat16; or it is bf16 with statistics (row_stats.h), T <=
// kMaxTokensWithStats, and is normalised and quantised on its way. A null scale is 1.
//
// `packed` is read before the predecessor in the stream has finished; pack_weight may be that one, it lets
// none start early. Whatever else writes it must not be followed by overlapping launches only: between it and
// packed_linear there is a launch without overlap, a copy, or the start of a CUDA graph.
struct PackedLinearParams {
  void* out;                  // [T, N] of out_type, row stride out_stride; multiples of 16 bytes
  const void* x;              // [T, K], row stride x_stride; multiples of 16 bytes
  RowStatsParams x_rows;      // of x, if it has statistics; x_scale is null then
  const void* packed;         // the weight, packed; at a multiple of 16 bytes
  const float* x_scale;       // [T] if x_scale_per_token, else [1]
  const float* weight_scale;  // [N] if weight_scale_per_row, else [1]; rows in the order before packing
  const float* out_scale;     // [1], for kFp8
  float2* out_stats;  // kAdd and bf16 kSwiglu, T <= kMaxTokensWithStats: statistics of out, one block per
                      // block of the weight; or null
  const __nv_bfloat16* out_norm_weight;  // for out_stats: [N] of the norm that reads out, or null
  void* workspace;     // linear_workspace_bytes(SMs), all bits set at first; one launch at a time may use it
  int num_tokens;      // T
  int num_rows;        // N
  int num_cols;        // K
  int64_t out_stride;  // elements between rows
  int64_t x_stride;
  bool x_scale_per_token, weight_scale_per_row;
  OutType out_type;
  Epilogue epilogue;
  LinearSchedule schedule;  // make_linear_schedule of N, K, the element size and the GPU: up to kMaxFewTokens
  int num_sms;              // of the GPU: beyond
};
template <class Element>
void packed_linear(const PackedLinearParams& p, cudaStream_t stream);

// The two kernels behind it; they trust p.
template <class Element>
void packed_linear_of_few(const PackedLinearParams& p, cudaStream_t stream);  // T <= kMaxSplitTokens
template <class Element>
void gemm(const PackedLinearParams& p, cudaStream_t stream);

}  // namespace nf
