// SPDX-License-Identifier: Apache-2.0
// silu(gate) * up. Grid (T, slices of F); one thread = 8 elements. Bandwidth bound: moves 3*T*F elements.
#include <climits>
#include <string>

#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/vec.cuh"
#include "kernels/mlp/silu_mul.h"

namespace nf {
namespace {

constexpr int kThreads = 256;

// Fast exponential and division: their error, a few FP32 ulp, vanishes in the rounding to 16 bits. For large
// negative x the exponential is infinite and the quotient -0, as it should be.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

template <class Scalar>
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(const SiluMulParams<Scalar> p) {
  let_successor_start();
  wait_for_predecessor();
  const int64_t row = blockIdx.x;
  const int vec = int(blockIdx.y) * kThreads + int(threadIdx.x);
  if (vec >= p.width / Vec<Scalar>::kElements) return;
  const Scalar* from = p.gate_up + row * p.gate_up_stride;
  const Vec<Scalar> gate = load_vec(from, vec), up = load_vec(from + p.width, vec);
  Vec<Scalar> out;
#pragma unroll
  for (int i = 0; i < Vec<Scalar>::kPairs; ++i) {
    const float2 g = gate.pair(i), u = up.pair(i);
    out.round_pair(i, {silu(g.x) * u.x, silu(g.y) * u.y});
  }
  store_vec(p.out + row * p.out_stride, vec, out);
}

}  // namespace

template <class Scalar>
void silu_mul(const SiluMulParams<Scalar>& p, cudaStream_t stream) {
  NF_CHECK(p.width > 0 && p.width % Vec<Scalar>::kElements == 0, "F=" + std::to_string(p.width));
  NF_CHECK(p.num_tokens >= 0 && p.num_tokens <= INT_MAX, "T=" + std::to_string(p.num_tokens));
  if (p.num_tokens == 0) return;
  const int64_t slices = (p.width / Vec<Scalar>::kElements + kThreads - 1) / kThreads;
  const Grid grid{.ctas = dim3(unsigned(p.num_tokens), unsigned(slices)), .threads = kThreads};
  launch<silu_mul_kernel<Scalar>>(grid, stream, p);
}

template void silu_mul(const SiluMulParams<__nv_bfloat16>&, cudaStream_t);
template void silu_mul(const SiluMulParams<__half>&, cudaStream_t);

}  // namespace nf
