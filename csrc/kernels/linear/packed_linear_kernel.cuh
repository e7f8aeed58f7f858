// SPDX-License-Identifier: Apache-2.0
// The linear of few tokens, operands swapped: weight rows are wgmma's M, tokens its N. Grid: one CTA per SM
// (linear_schedule.h says which k tiles each takes); a producer thread streams 16 KB of packed weight and the
// same k tile of the activations into a ring, two warpgroups multiply 64 rows each. Bandwidth bound: reads N
// * K weight elements once, T * K activations from L2 per block. Measured on an H200: 4.4 TB/s of 4.54 for 1
// to 8 tokens, 3.9 for 64.
//
// The weights depend on no kernel, so the ring is filled before wait_for_predecessor(): HBM works while the
// predecessor ends.
#pragma once

#include <string>

#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/dispatch.h"
#include "kernels/common/launch.h"
#include "kernels/linear/epilogue.cuh"
#include "kernels/linear/linear.h"
#include "kernels/ptx/bulk_copy.cuh"
#include "kernels/ptx/tensor_map.h"
#include "kernels/ptx/wgmma.cuh"

namespace nf {
namespace {

template <class Element_, int kTokens_>
struct LinearConfig {
  using Element = Element_;
  static constexpr int kTokens = kTokens_;   // padded, the rows of an activation tile
  static constexpr int kRegs = kTokens / 2;  // accumulators of a thread
  static constexpr int kTileElements = kTileRowBytes / int(sizeof(Element));

  // wgmma keeps only some 14 bits of an e4m3 sum: it is added to FP32 registers after every k tile.
  static constexpr bool kPromote = sizeof(Element) == 1;

  static constexpr int kCtas = 2;  // an SM: this kernel and its successor, which fills its ring meanwhile
  static constexpr int kStageBytes = kBlockTileBytes + kTokens * kTileRowBytes;
  static constexpr int kStages = 104 * 1024 / kStageBytes;

  static constexpr int kConsumerWarps = 2 * kWarpgroupThreads / kWarpSize;
  static constexpr int kThreads = (kConsumerWarps + 1) * kWarpSize;
};

template <class C>
struct LinearSmem {
  struct Stage {
    alignas(1024) uint8_t weight[2][kTileBytes];          // [warpgroup], 64 swizzled rows
    alignas(1024) uint8_t x[C::kTokens * kTileRowBytes];  // swizzled rows
  } stage[C::kStages];
  alignas(8) uint64_t full[C::kStages], empty[C::kStages];
};

// Steps through the ring.
template <class C>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == C::kStages) stage = 0, parity ^= 1;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The producer: one thread fills the ring with the k tiles of `range`.
template <class C>
struct Producer {
  LinearSmem<C>& s;
  const CUtensorMap& x_map;
  const PackedLinearParams& p;
  const LinearSchedule& schedule;
  const UnitRange range;
  const uint64_t policy = ptx::evict_first_policy();

  __device__ __forceinline__ int num_first() const { return min(C::kStages, range.end - range.begin); }

  __device__ __forceinline__ void load_weight(int stage, int unit) {
    const char* tile = static_cast<const char*>(p.packed) + int64_t(unit) * kBlockTileBytes;
    ptx::mbarrier_arrive_expect(&s.full[stage], C::kStageBytes);
    ptx::bulk_load(s.stage[stage].weight, tile, kBlockTileBytes, &s.full[stage], policy);
  }
  // What depends on no other kernel.
  __device__ __forceinline__ void fill_ring() {
    ptx::prefetch_tensor_map(&x_map);
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(&s.full[i], 1);
      ptx::mbarrier_init(&s.empty[i], C::kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
    for (int i = 0; i < num_first(); ++i) load_weight(i, range.begin + i);
  }

  __device__ __forceinline__ void run() {
    // As early as can be: a launch takes longer than the end of this kernel. (An H200, all linears of a
    // step: 11.5 ms; 12.8 ms with the request for the last tile instead. Asking for the successor's next
    // tiles in L2 here made it slower.)
    let_successor_start();
    wait_for_predecessor();  // x is its result
    const int k_tiles = schedule.k_tiles;
    int k_tile = range.begin % k_tiles;
    const auto load_x = [&](int stage) {
      ptx::tensor_load(s.stage[stage].x, &x_map, k_tile * C::kTileElements, 0, &s.full[stage]);
      if (++k_tile == k_tiles) k_tile = 0;
    };
    for (int i = 0; i < num_first(); ++i) load_x(i);
    RingPosition<C> ring;
    for (int unit = range.begin + C::kStages; unit < range.end; ++unit, ring.advance()) {
      ptx::mbarrier_wait(&s.empty[ring.stage], ring.parity);
      load_weight(ring.stage, unit);
      load_x(ring.stage);
    }
  }
};

template <class C>
using Accumulators = float[C::kRegs];

// acc (+)= the products of the stage at `ring`.
template <class C>
__device__ __forceinline__ void multiply_stage(Accumulators<C>& r_acc, LinearSmem<C>& s,
                                               const RingPosition<C>& ring, int warpgroup, bool accumulate) {
  constexpr typename C::Element kTag{};
  const auto& stage = s.stage[ring.stage];
  const uint64_t weight = ptx::wgmma_descriptor(stage.weight[warpgroup]), x = ptx::wgmma_descriptor(stage.x);
  ptx::mbarrier_wait(&s.full[ring.stage], ring.parity);
  float r_tile[C::kRegs];
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTileRowBytes / ptx::kWgmmaStepBytes; ++k) {
    if constexpr (C::kPromote)
      ptx::wgmma(kTag, r_tile, ptx::wgmma_advance(weight, k), ptx::wgmma_advance(x, k), k > 0);
    else
      ptx::wgmma(kTag, r_acc, ptx::wgmma_advance(weight, k), ptx::wgmma_advance(x, k), accumulate || k > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait();
  if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(&s.empty[ring.stage]);  // this warp has read it
  if constexpr (C::kPromote) {
#pragma unroll
    for (int i = 0; i < C::kRegs; ++i) {
      r_acc[i] = accumulate ? r_acc[i] + r_tile[i] : r_tile[i];
      asm volatile("" : "+f"(r_acc[i]));  // here, not between the next products, which would serialise them
    }
  }
}

constexpr uint32_t kAbsent = 0xffffffffu;  // in the workspace: a NaN that no arithmetic makes

// What thread `thread` of a warpgroup of CTA `cta` leaves for the same thread of the owner: word i is at [i *
// kWarpgroupThreads].
template <class C>
__device__ __forceinline__ uint4* slot_of(void* workspace, int cta, int warpgroup, int thread) {
  return static_cast<uint4*>(workspace) +
         int64_t(cta * 2 + warpgroup) * (C::kTokens / 8) * kWarpgroupThreads + thread;
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
template <class C>
__device__ __forceinline__ void publish(const Accumulators<C>& r_acc, uint4* slot) {
#pragma unroll
  for (int i = 0; i < C::kTokens / 8; ++i) {
    const float* r = &r_acc[i * 4];
    const auto bits = [](float v) {
      return min(__float_as_uint(v), kAbsent - 1);
    };  // kAbsent becomes another NaN
    store_relaxed(slot + i * kWarpgroupThreads, {bits(r[0]), bits(r[1]), bits(r[2]), bits(r[3])});
  }
}

// Adds the other pieces of the block that ends with unit block_end - 1, in the order of K. Their CTAs are the
// next ones, and all CTAs of a launch are resident at once, so the wait ends. (After a launch that failed
// half-way the workspace must be filled anew.)
template <class C>
__device__ __forceinline__ void collect(Accumulators<C>& r_acc, const PackedLinearParams& p,
                                        const LinearSchedule& schedule, int block_end, int warpgroup,
                                        int thread) {
  constexpr int kBatch = C::kTokens < 64 ? C::kTokens / 8 : 8;  // loads in flight; registers allow no more
#pragma unroll 1
  for (int cta = blockIdx.x + 1; cta < schedule.num_slices && schedule.slice_begin(cta) < block_end; ++cta) {
    uint4* slot = slot_of<C>(p.workspace, cta, warpgroup, thread);
#pragma unroll
    for (int first = 0; first < C::kTokens / 8; first += kBatch) {
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
        store_relaxed(slot + (first + i) * kWarpgroupThreads,
                      {kAbsent, kAbsent, kAbsent, kAbsent});  // for the next launch
        float* r = &r_acc[(first + i) * 4];
        r[0] += __uint_as_float(v[i].x), r[1] += __uint_as_float(v[i].y);
        r[2] += __uint_as_float(v[i].z), r[3] += __uint_as_float(v[i].w);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void consume(LinearSmem<C>& s, const PackedLinearParams& p,
                                        const LinearSchedule& schedule, UnitRange range, int warp) {
  const int warpgroup = warp / (kWarpgroupThreads / kWarpSize), thread = threadIdx.x % kWarpgroupThreads;
  const int k_tiles = schedule.k_tiles;
  RingPosition<C> ring;
  Accumulators<C> r_acc;
  int block = range.begin / k_tiles;
  for (int unit = range.begin; unit < range.end; ++block) {
    const int block_begin = block * k_tiles, block_end = block_begin + k_tiles;
    const int piece_end = min(block_end, range.end);
    const bool owner = unit == block_begin;
    multiply_stage<C>(r_acc, s, ring, warpgroup, false);
    ring.advance();
#pragma unroll 1
    for (++unit; unit < piece_end; ++unit, ring.advance()) multiply_stage<C>(r_acc, s, ring, warpgroup, true);
    if (!owner) {
      publish<C>(r_acc, slot_of<C>(p.workspace, blockIdx.x, warpgroup, thread));
      continue;
    }
    if (piece_end < block_end) collect<C>(r_acc, p, schedule, block_end, warpgroup, thread);
    finish(r_acc, p, block * kBlockRows + warp * kStripRows, 0, thread % kWarpSize);
  }
}

#endif

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtas)
    packed_linear_kernel(const __grid_constant__ CUtensorMap x_map,
                         const __grid_constant__ PackedLinearParams p,
                         const __grid_constant__ LinearSchedule schedule) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t s_bytes[];
  auto& s = *reinterpret_cast<LinearSmem<C>*>(s_bytes);
  const int warp =
      __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);  // uniform, which wgmma wants to be seen
  const UnitRange range = schedule.slice(blockIdx.x);
  const bool is_producer = threadIdx.x == C::kConsumerWarps * kWarpSize;
  Producer<C> producer{s, x_map, p, schedule, range};
  if (is_producer) producer.fill_ring();
  __syncthreads();  // the barriers of the ring exist

  if (warp < C::kConsumerWarps) {
    wait_for_predecessor();
    consume<C>(s, p, schedule, range, warp);
  } else if (is_producer) {
    producer.run();
  }
#else
  __trap();
#endif
}

template <class C>
void launch_packed_linear(const PackedLinearParams& p, cudaStream_t stream) {
  static_assert(sizeof(LinearSmem<C>) <= 113 * 1024);
  NF_CHECK(can_overlap<packed_linear_kernel<C>>(), "a GPU or a build without sm_90a");
  constexpr int kElementBytes = int(sizeof(typename C::Element));
  const CUtensorMap x_map = ptx::swizzled_rows_map(p.x, p.num_tokens, int64_t(p.num_cols) * kElementBytes,
                                                   p.x_stride * kElementBytes, C::kTokens, kElementBytes);
  const LinearSchedule schedule = make_linear_schedule(p.num_rows, p.num_cols, kElementBytes, p.num_sms);
  launch<packed_linear_kernel<C>>({.ctas = dim3(unsigned(schedule.num_slices)),
                                   .threads = C::kThreads,
                                   .smem_bytes = int(sizeof(LinearSmem<C>))},
                                  stream, x_map, p, schedule);
}

template <class Element>
void launch_for_few_tokens(const PackedLinearParams& p, cudaStream_t stream) {
  dispatch<8, 16, 32, kMaxFewTokens>("tokens", padded_tokens(p.num_tokens), [&](auto tokens) {
    launch_packed_linear<LinearConfig<Element, tokens>>(p, stream);
  });
}

}  // namespace
}  // namespace nf
