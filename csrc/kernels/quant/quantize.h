// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace nf {

// out = round_e4m3(x / scale), to nearest even, saturating at 448; NaN stays NaN. Rows of x start at
// multiples of 16 bytes, rows of out at multiples of 8.
template <class Scalar>
struct QuantizeParams {
  __nv_fp8_e4m3* out;  // [T, X], row stride out_stride
  float* scale;        // quantize_fp8: [1], read; quantize_fp8_per_token: [T], written
  const Scalar* x;     // [T, X], row stride x_stride
  int64_t num_tokens;  // T, may be 0
  int64_t dim;         // X, a multiple of 8
  int64_t out_stride;  // elements between rows
  int64_t x_stride;
};

// One given scale.
template <class Scalar>
void quantize_fp8(const QuantizeParams<Scalar>& p, cudaStream_t stream);

// scale[t] = max(max|x[t, :]| / 448, 1e-12)
template <class Scalar>
void quantize_fp8_per_token(const QuantizeParams<Scalar>& p, cudaStream_t stream);

}  // namespace nf
