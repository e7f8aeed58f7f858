// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory that need no registers, in groups that complete in order. sm_80.
#pragma once

#include <cstdint>

namespace nf::ptx {

// 16 bytes, or 16 zero bytes where `valid` is false (then nothing is read). Bypasses L1.
__device__ __forceinline__ void copy_async(uint32_t smem_address, const void* global, bool valid,
                                           uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(smem_address),
               "l"(global), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

// 4 bytes.
__device__ __forceinline__ void copy_word_async(uint32_t smem_address, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address), "l"(global) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's youngest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace nf::ptx
