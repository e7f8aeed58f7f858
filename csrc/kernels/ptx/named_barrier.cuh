// SPDX-License-Identifier: Apache-2.0
// Barriers of some warps of a CTA, by number; 0 is __syncthreads'.
#pragma once

#include <cstdint>

namespace nf::ptx {

// Until `threads` threads, this one included, have synced or arrived.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Does not wait.
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace nf::ptx
