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
#include "kernels/quant/fp8.cuh"
#include "kernels/quant/quantize.h"

namespace nf {
namespace {

constexpr int kSliceThreads = 256;
constexpr int kMaxRowThreads = 1024;

template <class Scalar>
__global__ void __launch_bounds__(kSliceThreads) quantize_fp8_kernel(const QuantizeParams<Scalar> p) {
  let_successor_start();
  wait_for_predecessor();
  const int64_t row = blockIdx.x;
  const int vec = int(blockIdx.y) * kSliceThreads + int(threadIdx.x);
  if (vec >= p.dim / Vec<Scalar>::kElements) return;
  store_fp8(p.out + row * p.out_stride, vec, load_vec(p.x + row * p.x_stride, vec), *p.scale);
}

// The scale of a CTA's row, from each thread's largest_bits(). Call once per kernel: s_partial is not reused.
__device__ __forceinline__ float scale_of_row(uint32_t bits) {
  __shared__ uint32_t s_partial[kWarpSize];
  bits = __reduce_max_sync(kFullWarp, bits);
  if (threadIdx.x % kWarpSize == 0) s_partial[threadIdx.x / kWarpSize] = bits;
  __syncthreads();  // s_partial complete before every warp reads it
  const uint32_t lane = threadIdx.x % kWarpSize;
  return scale_of_largest(__reduce_max_sync(kFullWarp, lane < blockDim.x / kWarpSize ? s_partial[lane] : 0u));
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
  for (int vec = int(threadIdx.x); vec < num_vecs; vec += int(blockDim.x))
    largest = max(largest, largest_bits(load_vec(x, vec)));
  const float scale = scale_of_row(largest);

  if (threadIdx.x == 0) p.scale[row] = scale;
#pragma unroll 2
  for (int vec = int(threadIdx.x); vec < num_vecs; vec += int(blockDim.x))
    store_fp8(p.out + row * p.out_stride, vec, load_vec(x, vec), scale);
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
