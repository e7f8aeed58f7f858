// SPDX-License-Identifier: Apache-2.0
// Rows of activations to e4m3, inside kernels that hold them as vectors.
#pragma once

#include <cuda_fp8.h>

#include "kernels/common/device.cuh"
#include "kernels/common/vec.cuh"

namespace nf {

constexpr float kMaxFp8 = 448.0f;    // largest finite e4m3
constexpr float kMinScale = 1e-12f;  // so that an all-zero row divides by something

// The largest |v| as a float's bits, which order as the floats do; a NaN is larger than any number.
template <class Scalar>
__device__ __forceinline__ uint32_t largest_bits(const Vec<Scalar>& v) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < Vec<Scalar>::kPairs; ++i) {
    const float2 f = v.pair(i);
    largest = max(largest, max(__float_as_uint(fabsf(f.x)), __float_as_uint(fabsf(f.y))));
  }
  return largest;
}

// The scale of a row from its largest_bits(): NaN if it has one.
__device__ __forceinline__ float scale_of_largest(uint32_t bits) {
  const float largest = __uint_as_float(bits);
  return largest != largest ? largest : fmaxf(largest / kMaxFp8, kMinScale);
}

// What many values are divided by. Its reciprocal, correctly rounded, costs as much as several quotients.
struct Divisor {
  float value, inverse;
  Divisor() = default;
  __device__ __forceinline__ Divisor(float v) {
    value = v;
    inverse = __frcp_rn(v);
  }
};

// x / scale, rounded as a division is (Markstein: one Newton step from a correctly rounded reciprocal), where
// that matters to e4m3. The compiler's division would call a subroutine for unusual exponents. (The remainder
// is q * scale - x, not what is left of x: so a zero keeps its sign.)
__device__ __forceinline__ float quotient(float x, const Divisor& scale) {
  const float q = x * scale.inverse;
  const float rounded = fmaf(-fmaf(q, scale.value, -x), scale.inverse, q);
  return fabsf(q) < 2.0f * kMaxFp8 ? rounded : q;
}

// round_e4m3(v / scale), saturating, two values in the low 16 bits. Not v * (1 / scale), which would round
// some values to the other neighbour than the reference.
__device__ __forceinline__ uint32_t to_fp8(float2 v, const Divisor& scale) {
  return __nv_cvt_float2_to_fp8x2({quotient(v.x, scale), quotient(v.y, scale)}, __NV_SATFINITE, __NV_E4M3);
}

template <class Scalar>
__device__ __forceinline__ uint2 to_fp8(const Vec<Scalar>& v, const Divisor& scale) {
  return {to_fp8(v.pair(0), scale) | to_fp8(v.pair(1), scale) << 16,
          to_fp8(v.pair(2), scale) | to_fp8(v.pair(3), scale) << 16};
}

template <class Scalar>
__device__ __forceinline__ void store_fp8(__nv_fp8_e4m3* row, int vec_idx, const Vec<Scalar>& v,
                                          const Divisor& scale) {
  reinterpret_cast<uint2*>(row)[vec_idx] = to_fp8(v, scale);
}

}  // namespace nf
