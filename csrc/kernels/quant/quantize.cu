// SPDX-License-Identifier: Apache-2.0
// Activations to e4m3. With a given scale: grid (T, slices of X), one thread = 8 elements. Per token: grid
// (T), one CTA = one row, read twice (the second time from L1 or L2). Bandwidth bound: moves 3 bytes an
// element.
#include <algorithm>
#include <climits>
#include <string>

#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/vec.cuh"
#include "kernels/quant/quantize.h"

namespace nf {
namespace {

constexpr int kSliceThreads = 256;
constexpr int kMaxRowThreads = 1024;
constexpr float kMaxFp8 = 448.0f;    // largest finite e4m3
constexpr float kMinScale = 1e-12f;  // so that an all-zero row divides by something

// A true division: x * (1 / scale) would round some values to the other neighbour than the reference.
template <class Scalar>
__device__ __forceinline__ uint2 quantize_vec(const Vec<Scalar>& v, float scale) {
  uint32_t half[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 a = v.pair(2 * i), b = v.pair(2 * i + 1);
    const uint32_t low = __nv_cvt_float2_to_fp8x2({a.x / scale, a.y / scale}, __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2({b.x / scale, b.y / scale}, __NV_SATFINITE, __NV_E4M3);
    half[i] = low | high << 16;
  }
  return {half[0], half[1]};
}

template <class Scalar>
__global__ void __launch_bounds__(kSliceThreads) quantize_fp8_kernel(const QuantizeParams<Scalar> p) {
  let_successor_start();
  wait_for_predecessor();
  const int64_t row = blockIdx.x;
  const int vec = int(blockIdx.y) * kSliceThreads + int(threadIdx.x);
  if (vec >= p.dim / Vec<Scalar>::kElements) return;
  const Vec<Scalar> v = load_vec(p.x + row * p.x_stride, vec);
  reinterpret_cast<uint2*>(p.out + row * p.out_stride)[vec] = quantize_vec(v, *p.scale);
}

// The largest |x| as a float's bits, which order as the floats do; a NaN is larger than any number.
__device__ __forceinline__ uint32_t cta_max(uint32_t bits) {
  __shared__ uint32_t s_partial[kWarpSize];
  bits = __reduce_max_sync(kFullWarp, bits);
  if (threadIdx.x % kWarpSize == 0) s_partial[threadIdx.x / kWarpSize] = bits;
  __syncthreads();  // s_partial complete before every warp reads it
  const uint32_t lane = threadIdx.x % kWarpSize;
  return __reduce_max_sync(kFullWarp, lane < blockDim.x / kWarpSize ? s_partial[lane] : 0u);
}

template <class Scalar>
__global__ void __launch_bounds__(kMaxRowThreads)
    quantize_fp8_per_token_kernel(const QuantizeParams<Scalar> p) {
  let_successor_start();
  wait_for_predecessor();
  const int64_t row = blockIdx.x;
  const int num_vecs = int(p.dim / Vec<Scalar>::kElements);
  const Scalar* x = p.x + row * p.x_stride;

  uint32_t largest = 0;
#pragma unroll 2
  for (int vec = int(threadIdx.x); vec < num_vecs; vec += int(blockDim.x)) {
    const Vec<Scalar> v = load_vec(x, vec);
#pragma unroll
    for (int i = 0; i < Vec<Scalar>::kPairs; ++i) {
      const float2 f = v.pair(i);
      largest = max(largest, max(__float_as_uint(fabsf(f.x)), __float_as_uint(fabsf(f.y))));
    }
  }
  const float max_abs = __uint_as_float(cta_max(largest));
  const float scale = max_abs != max_abs ? max_abs : fmaxf(max_abs / kMaxFp8, kMinScale);

  if (threadIdx.x == 0) p.scale[row] = scale;
#pragma unroll 2
  for (int vec = int(threadIdx.x); vec < num_vecs; vec += int(blockDim.x))
    reinterpret_cast<uint2*>(p.out + row * p.out_stride)[vec] = quantize_vec(load_vec(x, vec), scale);
}

template <class Scalar>
void check(const QuantizeParams<Scalar>& p) {
  NF_CHECK(p.dim > 0 && p.dim % Vec<Scalar>::kElements == 0 && p.dim <= INT_MAX,
           "X=" + std::to_string(p.dim));
  NF_CHECK(p.num_tokens >= 0 && p.num_tokens <= INT_MAX, "T=" + std::to_string(p.num_tokens));
}

}  // namespace

template <class Scalar>
void quantize_fp8(const QuantizeParams<Scalar>& p, cudaStream_t stream) {
  check(p);
  if (p.num_tokens == 0) return;
  const int64_t slices = (p.dim / Vec<Scalar>::kElements + kSliceThreads - 1) / kSliceThreads;
  const Grid grid{.ctas = dim3(unsigned(p.num_tokens), unsigned(slices)), .threads = kSliceThreads};
  launch<quantize_fp8_kernel<Scalar>>(grid, stream, p);
}

template <class Scalar>
void quantize_fp8_per_token(const QuantizeParams<Scalar>& p, cudaStream_t stream) {
  check(p);
  if (p.num_tokens == 0) return;
  const int64_t warps = (p.dim / Vec<Scalar>::kElements + kWarpSize - 1) / kWarpSize;
  const int threads = int(std::min<int64_t>(warps * kWarpSize, kMaxRowThreads));
  launch<quantize_fp8_per_token_kernel<Scalar>>({.ctas = dim3(unsigned(p.num_tokens)), .threads = threads},
                                                stream, p);
}

template void quantize_fp8(const QuantizeParams<__nv_bfloat16>&, cudaStream_t);
template void quantize_fp8(const QuantizeParams<__half>&, cudaStream_t);
template void quantize_fp8_per_token(const QuantizeParams<__nv_bfloat16>&, cudaStream_t);
template void quantize_fp8_per_token(const QuantizeParams<__half>&, cudaStream_t);

}  // namespace nf
