// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/device.cuh"

namespace nf {

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lane_mask = kWarpSize / 2; lane_mask > 0; lane_mask /= 2)
    v += __shfl_xor_sync(kFullWarp, v, lane_mask);
  return v;
}

// Sum over the CTA, the same bits in every thread and in every run. Call once per kernel: s_partial is not
// reused.
__device__ __forceinline__ float cta_sum(float v) {
  __shared__ float s_partial[kWarpSize];  // at most 32 warps
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  v = warp_sum(v);
  if (lane == 0) s_partial[warp] = v;
  __syncthreads();  // s_partial complete before every warp reads it
  return warp_sum(lane < num_warps ? s_partial[lane] : 0.0f);
}

}  // namespace nf
