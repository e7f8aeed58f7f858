// SPDX-License-Identifier: Apache-2.0
// Rows of activations to e4m3, inside kernels that hold them as vectors.
#pragma once

#include <cuda_fp8.h>

#include "kernels/common/device.cuh"
#include "kernels/common/vec.cuh"

namespace nf {

constexpr float kMaxFp8 = 448.0f;    // largest finite e4m3
constexpr float kMinScale = 1e-12f;  // so that an all-zero row divides by something

// row[8 vec_idx ...] = round_e4m3(v / scale), saturating. A true division: v * (1 / scale) would round some
// values to the other neighbour than the reference.
template <class Scalar>
__device__ __forceinline__ void store_fp8(__nv_fp8_e4m3* row, int vec_idx, const Vec<Scalar>& v,
                                          float scale) {
  uint32_t half[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 a = v.pair(2 * i), b = v.pair(2 * i + 1);
    const uint32_t low = __nv_cvt_float2_to_fp8x2({a.x / scale, a.y / scale}, __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2({b.x / scale, b.y / scale}, __NV_SATFINITE, __NV_E4M3);
    half[i] = low | high << 16;
  }
  reinterpret_cast<uint2*>(row)[vec_idx] = {half[0], half[1]};
}

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

// The scale of a CTA's row, from each thread's largest_bits(). Call once per kernel: s_partial is not reused.
__device__ __forceinline__ float scale_of_row(uint32_t bits) {
  __shared__ uint32_t s_partial[kWarpSize];
  bits = __reduce_max_sync(kFullWarp, bits);
  if (threadIdx.x % kWarpSize == 0) s_partial[threadIdx.x / kWarpSize] = bits;
  __syncthreads();  // s_partial complete before every warp reads it
  const uint32_t lane = threadIdx.x % kWarpSize;
  const float largest = __uint_as_float(
      __reduce_max_sync(kFullWarp, lane < blockDim.x / kWarpSize ? s_partial[lane] : 0u));
  return largest != largest ? largest : fmaxf(largest / kMaxFp8, kMinScale);
}

}  // namespace nf
