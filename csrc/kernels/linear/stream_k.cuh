// SPDX-License-Identifier: Apache-2.0
// The exchange of partial sums between the CTAs that share a tile (linear_schedule.h).
#pragma once

#include "kernels/common/device.cuh"
#include "kernels/linear/linear.h"

namespace nf {
namespace {

constexpr int kWarpgroupThreads = 128;
constexpr int kPairCtas = 2;  // CTA 2 i + j is number j of pair i

constexpr uint32_t kAbsent = 0xffffffffu;  // in the workspace: a NaN that no arithmetic makes

// What thread `thread` of a warpgroup of CTA `cta` leaves for the same thread of the owner, as words of 4
// sums: word i is at [i * kWarpgroupThreads].
__device__ __forceinline__ uint4* slot_of(void* workspace, int cta, int warpgroup, int tokens, int thread) {
  return static_cast<uint4*>(workspace) + int64_t(cta * 2 + warpgroup) * (tokens / 8) * kWarpgroupThreads +
         thread;
}

__device__ __forceinline__ void store_relaxed(uint4* to, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint4 load_relaxed(const uint4* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

// No fence and no flag: that would be three trips to L2 at the end of every kernel, where nothing hides them.
template <int kRegs>
__device__ __forceinline__ void publish(const float (&r_acc)[kRegs], uint4* slot) {
#pragma unroll
  for (int i = 0; i < kRegs / 4; ++i) {
    const float* r = &r_acc[i * 4];
    const auto bits = [](float v) {
      return min(__float_as_uint(v), kAbsent - 1);
    };  // kAbsent becomes another NaN
    store_relaxed(slot + i * kWarpgroupThreads, {bits(r[0]), bits(r[1]), bits(r[2]), bits(r[3])});
  }
}

// Waits for what another CTA publishes in `slot`, adds it, and leaves the slot empty for the next launch.
template <int kRegs>
__device__ __forceinline__ void add_published(float (&r_acc)[kRegs], uint4* slot) {
  constexpr int kBatch = kRegs < 32 ? kRegs / 4 : 8;  // loads in flight; registers allow no more
#pragma unroll
  for (int first = 0; first < kRegs / 4; first += kBatch) {
    uint4 v[kBatch];
    bool absent;
    do {
      absent = false;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) v[i] = load_relaxed(slot + (first + i) * kWarpgroupThreads);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        absent |= v[i].x == kAbsent || v[i].y == kAbsent || v[i].z == kAbsent || v[i].w == kAbsent;
    } while (absent);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      store_relaxed(slot + (first + i) * kWarpgroupThreads, {kAbsent, kAbsent, kAbsent, kAbsent});
      float* r = &r_acc[(first + i) * 4];
      r[0] += __uint_as_float(v[i].x), r[1] += __uint_as_float(v[i].y);
      r[2] += __uint_as_float(v[i].z), r[3] += __uint_as_float(v[i].w);
    }
  }
}

// Calls add(cta) for every CTA that has a later piece of the tile which slice `slice` owns, in the order of
// K; `cta` has the same number in its pair as we have. Those CTAs publish before they wait for anyone, and
// all CTAs of a launch are resident at once, so waiting for them ends. (After a launch that failed half-way
// the workspace must be filled anew.)
template <class Add>
__device__ __forceinline__ void for_later_pieces(const LinearSchedule& schedule, int slice, int tile,
                                                 int which, Add&& add) {
  const int tile_end = (tile + 1) * schedule.k_tiles;
#pragma unroll 1
  for (int i = slice + 1; i < schedule.num_slices && schedule.slice_begin(i) < tile_end; ++i)
    add(i * kPairCtas + which);
}

}  // namespace
}  // namespace nf
