// SPDX-License-Identifier: Apache-2.0
// Statistics of rows. Grid (slices of X, T), 16 threads for a block of 128 columns. Bandwidth bound: one read
// of x.
#include <climits>
#include <string>

#include "kernels/common/check.h"
#include "kernels/common/launch.h"
#include "kernels/norm/row_stats.cuh"
#include "kernels/norm/row_stats.h"

namespace nf {
namespace {

using Bf16 = __nv_bfloat16;
constexpr int kThreads = 256;
constexpr int kVecElements = Vec<Bf16>::kElements;
static_assert(kBlockLanes == kStatsBlock / kVecElements);

__device__ __forceinline__ Vec<Bf16> ones() {
  constexpr uint32_t kOnes = 0x3F803F80u;
  return {kOnes, kOnes, kOnes, kOnes};
}

__global__ void __launch_bounds__(kThreads) row_stats_kernel(const MakeRowStatsParams p) {
  let_successor_start();
  const int vec = int(blockIdx.x) * kThreads + int(threadIdx.x);
  const bool inside = vec < p.dim / kVecElements;
  const Vec<Bf16> weight = inside && p.norm_weight ? load_vec(p.norm_weight, vec) : ones();
  wait_for_predecessor();
  const int64_t token = blockIdx.y;
  const Vec<Bf16> x = inside ? load_vec(p.x + token * p.x_stride, vec) : Vec<Bf16>{};
  const float2 of_strip = strip_stats<float2>(x, weight),
               stats = block_stats<float2>([&](int i) { return shuffle(of_strip, kStripLanes * i); });
  const int num_blocks = (p.dim + kStatsBlock - 1) / kStatsBlock;
  if (inside && vec % kBlockLanes == 0) p.stats[token * num_blocks + vec / kBlockLanes] = stats;
}

}  // namespace

void row_stats(const MakeRowStatsParams& p, cudaStream_t stream) {
  NF_CHECK(p.dim > 0 && p.dim % kVecElements == 0, "X=" + std::to_string(p.dim));
  NF_CHECK(p.num_tokens >= 0 && p.num_tokens <= USHRT_MAX, "T=" + std::to_string(p.num_tokens));
  if (p.num_tokens == 0) return;
  const int slices = (p.dim / kVecElements + kThreads - 1) / kThreads;
  launch<row_stats_kernel>({.ctas = dim3(unsigned(slices), unsigned(p.num_tokens)), .threads = kThreads},
                           stream, p);
}

}  // namespace nf
