// SPDX-License-Identifier: Apache-2.0
// Copies by the bulk engine: global to shared, which complete on an mbarrier, and back. One thread issues
// each. sm_90.
#pragma once

#include <cuda.h>

#include "kernels/ptx/mbarrier.cuh"

namespace nf::ptx {

// Addresses and `bytes` are multiples of 16.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], "
      "%4;" ::"r"(smem_address(shared)),
      "l"(global), "r"(bytes), "r"(smem_address(barrier)), "l"(policy)
      : "memory");
}

// One box of a 2-D tensor map; x is the coordinate along the contiguous dimension, in elements.
__device__ __forceinline__ void tensor_load(void* shared, const CUtensorMap* map, int x, int y,
                                            uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(smem_address(shared)),
      "l"(map), "r"(smem_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

// Of a 3-D one.
__device__ __forceinline__ void tensor_load(void* shared, const CUtensorMap* map, int x, int y, int z,
                                            uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(smem_address(shared)),
      "l"(map), "r"(smem_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same for a whole warp to call, with the same arguments in all lanes; one lane acts. What such a warp
// computes stays in uniform registers, where the copies want it. Called by one thread, each copy is a loop
// over lanes, and needs 10 instructions more.
namespace warp {

__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                          uint64_t policy) {
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
      "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;\n}" ::"r"(smem_address(shared)),
      "l"(global), "r"(bytes), "r"(smem_address(barrier)), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void tensor_load(void* shared, const CUtensorMap* map, int x, int y,
                                            uint64_t* barrier) {
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
      "@one cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];\n}" ::"r"(smem_address(shared)),
      "l"(map), "r"(smem_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

}  // namespace warp

// A box from shared memory to the tensor, or added to it; what lies beyond the tensor is left out. The writes
// to the box must have been fenced (fence_proxy_async). Such copies complete in groups.
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, int x, int y, const void* shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(smem_address(shared)), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void tensor_add(const CUtensorMap* map, int x, int y, const void* shared) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(smem_address(shared)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the shared memory of all committed stores of this thread may be written again.
__device__ __forceinline__ void wait_until_stores_have_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace nf::ptx
