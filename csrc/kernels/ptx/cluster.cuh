// SPDX-License-Identifier: Apache-2.0
// CTAs of a cluster: who is who, meeting, arriving at each other's barriers. sm_90.
#pragma once

#include "kernels/ptx/mbarrier.cuh"

namespace nf::ptx {

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

// All threads of the cluster; orders what they wrote to shared memory before.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Arrives at the barrier that lies at the same place in the shared memory of CTA `rank`.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(smem_address(barrier)),
      "r"(rank)
      : "memory");
}

}  // namespace nf::ptx
