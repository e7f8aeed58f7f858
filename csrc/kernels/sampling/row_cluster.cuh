// SPDX-License-Identifier: Apache-2.0
// A cluster of CTAs that works on one row of logits: how its threads walk the row, and how they agree. Before
// sm_90 the cluster is one CTA.
#pragma once

#include <climits>

#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/launch.h"

namespace nf::row {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;

// The CTA's place in its cluster of kCluster.
template <int kCluster>
__device__ __forceinline__ int rank() {
  return kCluster == 1 ? 0 : int(blockIdx.x) % kCluster;
}

// Orders shared memory of all the row's CTAs.
template <int kCluster>
__device__ __forceinline__ void sync() {
  if constexpr (kCluster == 1) {
    __syncthreads();
  } else {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
#else
    __trap();  // never launched: see launch() below
#endif
  }
}

// `shared` of CTA `rank` of the cluster.
template <int kCluster, class T>
__device__ __forceinline__ T peer(const T& shared, int rank) {
  if constexpr (kCluster == 1) {
    return shared;
  } else {
    T value{};
#if __CUDA_ARCH__ >= 900
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    const uint32_t address = uint32_t(__cvta_generic_to_shared(&shared));
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    if constexpr (sizeof(T) == 4) {
      uint32_t bits;
      asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(remote) : "memory");
      memcpy(&value, &bits, sizeof(T));
    } else {
      uint64_t bits;
      asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(bits) : "r"(remote) : "memory");
      memcpy(&value, &bits, sizeof(T));
    }
#endif
    return value;
  }
}

// Floats as integers of the same order; NaN must not come here.
__device__ __forceinline__ uint32_t order_key(float v) {
  const uint32_t bits = __float_as_uint(v);
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float from_order_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The larger value first, then the lower id.
__device__ __forceinline__ uint64_t pack(float v, int id) {
  return uint64_t(order_key(v)) << 32 | uint32_t(INT_MAX - id);
}
__device__ __forceinline__ float packed_value(uint64_t p) { return from_order_key(uint32_t(p >> 32)); }
__device__ __forceinline__ int packed_id(uint64_t p) { return INT_MAX - int(uint32_t(p)); }

// The largest over the row's threads, in all of them. `s_partial` is free again after the next sync.
template <int kCluster>
__device__ __forceinline__ uint64_t max_over_row(uint64_t v, uint64_t (&s_partial)[kWarps]) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) v = max(v, __shfl_xor_sync(kFullWarp, v, mask));
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) s_partial[threadIdx.x / kWarpSize] = v;
  sync<kCluster>();  // s_partial complete in every CTA
#pragma unroll
  for (int r = 0; r < kCluster; ++r) v = max(v, peer<kCluster>(s_partial[lane], r));
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) v = max(v, __shfl_xor_sync(kFullWarp, v, mask));
  sync<kCluster>();  // read by all before it is reused
  return v;
}

// Calls f(value, id) for this thread's share of row[0..size), ids ascending, and after() in all threads of
// the CTA together from time to time. kWidth 4 wants an aligned row and a size that is a multiple of 4.
template <int kCluster, int kWidth, class F, class After>
__device__ __forceinline__ void for_each(const float* row, int size, F&& f, After&& after) {
  constexpr int kBatch = kWidth == 4 ? 2 : 4;  // loads in flight
  constexpr int kStep = kThreads * kCluster;
  const int first = rank<kCluster>() * kThreads + int(threadIdx.x), num = size / kWidth;
  for (int base = 0; base < num; base += kStep * kBatch) {
    float v[kBatch][kWidth];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = base + j * kStep + first;
      if (i >= num) continue;
      if constexpr (kWidth == 4) {
        const float4 q = reinterpret_cast<const float4*>(row)[i];
        v[j][0] = q.x, v[j][1] = q.y, v[j][2] = q.z, v[j][3] = q.w;
      } else {
        v[j][0] = row[i];
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = base + j * kStep + first;
      if (i >= num) continue;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) f(v[j][e], i * kWidth + e);
    }
    after();
  }
}
template <int kCluster, int kWidth, class F>
__device__ __forceinline__ void for_each(const float* row, int size, F&& f) {
  for_each<kCluster, kWidth>(row, size, f, [] {});
}

// May the loaded code form clusters? Only what was written for sm_90: can_overlap() asks the same.
template <auto kKernel, class Params>
void launch_rows(int cluster, int64_t num_rows, cudaStream_t stream, const Params& p) {
  launch<kKernel>({.ctas = dim3(unsigned(num_rows * cluster)), .threads = kThreads, .cluster = cluster},
                  stream, p);
}

}  // namespace nf::row
