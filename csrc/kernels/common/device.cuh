// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace nf {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

// Returns when the kernels before this one in the stream have finished and their writes are visible. Before
// it, a kernel launched with overlap (launch.h) may only compute and prefetch.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next kernel of the stream may take the SM's free resources. It still waits for all of our
// writes, so this may stand anywhere, unless we write what it reads before it waits (packed weights).
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace nf
