// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace nf {

// out[t, f] = silu(gate_up[t, f]) * gate_up[t, F + f], in float, rounded once. Rows start at multiples of 16
// bytes.
template <class Scalar>
struct SiluMulParams {
  Scalar* out;            // [T, F], row stride out_stride
  const Scalar* gate_up;  // [T, 2F], row stride gate_up_stride
  int64_t num_tokens;     // T, may be 0
  int64_t width;          // F, a multiple of 8
  int64_t out_stride;     // elements between rows
  int64_t gate_up_stride;
};
template <class Scalar>
void silu_mul(const SiluMulParams<Scalar>& p, cudaStream_t stream);

}  // namespace nf
