// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "host/norm_config.h"

namespace nf {

// n = x * rsqrt(mean(x^2) + eps), in float, rounded to Scalar; out = n * weight, rounded again (as Hugging
// Face does). Scalar is __nv_bfloat16 or __half. Rows start at multiples of 16 bytes: so do the pointers, and
// strides are multiples of 8. `out` may be `x` or `residual`. Out is Scalar, or e4m3: then what Scalar would
// have got is divided by a scale, a given one or the row's own as row_stats.h has it.
template <class Scalar, class Out = Scalar>
struct RmsNormParams {
  Out* out;              // [T, E], row stride out_stride
  Scalar* residual;      // [T, E], row stride residual_stride; add_rms_norm only, else nullptr
  const Scalar* x;       // [T, E], row stride x_stride
  const Scalar* weight;  // [E]; complete before the preceding kernel starts: it is read early
  float* scale;          // of an e4m3 out: [T], written, if scale_per_token, else [1], read; else nullptr
  int64_t num_tokens;    // T, may be 0
  int dim;               // E, a multiple of 8, at most 32768
  int64_t out_stride;    // elements between rows
  int64_t residual_stride;
  int64_t x_stride;
  float eps;
  bool scale_per_token;
};

// out = norm(x)
template <class Scalar, class Out>
void rms_norm(const RmsNormParams<Scalar, Out>& p, const NormConfig& config, cudaStream_t stream);

// residual += x, rounded to Scalar; out = norm(residual)
template <class Scalar, class Out>
void add_rms_norm(const RmsNormParams<Scalar, Out>& p, const NormConfig& config, cudaStream_t stream);

}  // namespace nf
