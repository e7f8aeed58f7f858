// SPDX-License-Identifier: Apache-2.0
// The linear of up to kMaxSplitTokens tokens, operands swapped: weight rows are wgmma's M, tokens its N.
// Grid: one CTA per SM (linear_schedule.h says which k tiles each takes); a producer thread streams 16 KB of
// packed weight and the same k tile of the activations into a ring, two warpgroups multiply 64 rows each.
// Where x are rows with statistics, a few more warps make its tiles (tile_maker.cuh). Bandwidth bound: reads
// N * K weight elements once, T * K activations from L2 per block. All linears of a step read 3.04 to 3.06
// TB/s on an H100 (bench_packed_linear.py).
//
// The weights depend on no kernel, so the ring is filled before wait_for_predecessor(): HBM works while the
// predecessor ends.
#pragma once

#include <atomic>
#include <string>

#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/dispatch.h"
#include "kernels/common/launch.h"
#include "kernels/linear/epilogue.cuh"
#include "kernels/linear/linear.h"
#include "kernels/linear/tile_maker.cuh"
#include "kernels/ptx/bulk_copy.cuh"
#include "kernels/ptx/l2_policy.cuh"
#include "kernels/ptx/named_barrier.cuh"
#include "kernels/ptx/tensor_map.h"
#include "kernels/ptx/wgmma.cuh"

namespace nf {
namespace {

enum LinearBarrier { kStats = kMakers + 1 };

template <class Element_, int kTokens_, bool kMakesX_>
struct LinearConfig {
  using Element = Element_;
  static constexpr int kTokens = kTokens_;   // padded, the rows of an activation tile
  static constexpr bool kMakesX = kMakesX_;  // are x rows with statistics?
  static constexpr int kRegs = kTokens / 2;  // accumulators of a thread
  static constexpr int kTileElements = kTileRowBytes / int(sizeof(Element));

  // wgmma keeps only some 14 bits of an e4m3 sum: it is added to FP32 registers after every k tile.
  static constexpr bool kPromote = sizeof(Element) == 1;

  static constexpr int kStageBytes = kBlockTileBytes + kTokens * kTileRowBytes;
  // Two CTAs share an SM, one of this kernel and one of its successor, which fills its ring meanwhile.
  static constexpr int kStages = 104 * 1024 / kStageBytes;

  static constexpr int kConsumerWarps = 2 * kWarpgroupThreads / kWarpSize;
  static constexpr int kMakerWarps = kMakesX ? kStages : 0;
  static constexpr int kThreads = (kConsumerWarps + 1 + kMakerWarps) * kWarpSize;
  // Limits the registers, for both footprints of launch_linear() to fit.
  static constexpr int kMaxThreads = kMakesX ? 1024 : 800;
};

// Sums of a thread, in 64 rows x C::kTokens tokens of a warpgroup.
template <class C>
using Accumulators = float[C::kRegs];

template <class C>
struct LinearSmem {
  struct Stage {
    alignas(1024) uint8_t weight[2][kTileBytes];          // [warpgroup], 64 swizzled rows
    alignas(1024) uint8_t x[C::kTokens * kTileRowBytes];  // swizzled rows
  } stage[C::kStages];
  alignas(8) uint64_t full[C::kStages], empty[C::kStages];
  RowFactors factors[C::kMakesX ? C::kTokens : 1];  // of the rows of x
  // Of the result's block, by warp: two, as one block's may still be read when the next block's are written.
  float2 stats[2][C::kConsumerWarps][C::kTokens];
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
  const UnitRange range;
  const uint64_t policy = ptx::evict_first_policy();
  const int copied_bytes = kBlockTileBytes + (C::kMakesX ? 0 : p.num_tokens * kTileRowBytes);  // of a stage

  __device__ __forceinline__ int num_first() const { return min(C::kStages, range.end - range.begin); }

  __device__ __forceinline__ void load_weight(int stage, int unit) {
    const char* tile = static_cast<const char*>(p.packed) + int64_t(unit) * kBlockTileBytes;
    ptx::mbarrier_arrive_expect(&s.full[stage], copied_bytes);
    ptx::bulk_load(s.stage[stage].weight, tile, kBlockTileBytes, &s.full[stage], policy);
  }
  // What depends on no other kernel.
  __device__ __forceinline__ void fill_ring() {
    if constexpr (!C::kMakesX) ptx::prefetch_tensor_map(&x_map);
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(&s.full[i], C::kMakesX ? 2 : 1);  // the producer, a maker
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
    if constexpr (!C::kMakesX) wait_for_predecessor();  // x is its result
    const int k_tiles = p.schedule.k_tiles;
    int k_tile = range.begin % k_tiles;
    const auto load_x = [&](int stage) {
      if constexpr (C::kMakesX) return;
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
__device__ __forceinline__ void collect(Accumulators<C>& r_acc, const PackedLinearParams& p, int block_end,
                                        int warpgroup, int thread) {
  constexpr int kWords = C::kTokens / 8;
#pragma unroll 1
  for (int cta = blockIdx.x + 1; cta < p.schedule.num_slices && p.schedule.slice_begin(cta) < block_end;
       ++cta) {
    uint4* slot = slot_of<C>(p.workspace, cta, warpgroup, thread);
    uint4 v[kWords];
    bool absent;
    do {
      absent = false;
#pragma unroll
      for (int i = 0; i < kWords; ++i) v[i] = load_relaxed(slot + i * kWarpgroupThreads);
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        absent |= v[i].x == kAbsent || v[i].y == kAbsent || v[i].z == kAbsent || v[i].w == kAbsent;
    } while (absent);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      store_relaxed(slot + i * kWarpgroupThreads,
                    {kAbsent, kAbsent, kAbsent, kAbsent});  // for the next launch
      float* r = &r_acc[i * 4];
      r[0] += __uint_as_float(v[i].x), r[1] += __uint_as_float(v[i].y);
      r[2] += __uint_as_float(v[i].z), r[3] += __uint_as_float(v[i].w);
    }
  }
}

// The statistics of a block of the result, from those of its warps, added in their order.
template <class C>
__device__ __forceinline__ void store_stats(const float2 (&s_stats)[C::kConsumerWarps][C::kTokens],
                                            const PackedLinearParams& p, int block) {
  ptx::barrier_sync(kStats, C::kConsumerWarps * kWarpSize);  // s_stats are written
  const int token = threadIdx.x;
  if (token >= p.num_tokens) return;
  float2 stats = s_stats[0][token];
#pragma unroll
  for (int warp = 1; warp < C::kConsumerWarps; ++warp) stats = merge_stats(stats, s_stats[warp][token]);
  const int num_blocks = p.schedule.num_units / p.schedule.k_tiles;
  p.out_stats[int64_t(token) * num_blocks + block] = stats;
}

template <class C>
__device__ __forceinline__ void consume(LinearSmem<C>& s, const PackedLinearParams& p, UnitRange range,
                                        int warp) {
  const int warpgroup = warp / (kWarpgroupThreads / kWarpSize), thread = threadIdx.x % kWarpgroupThreads;
  const int k_tiles = p.schedule.k_tiles;
  RingPosition<C> ring;
  Accumulators<C> r_acc;
  Divisor out_scale;
  wait_for_predecessor();
  if (p.out_scale) out_scale = *p.out_scale;
  constexpr bool kMakesScales = C::kMakesX && sizeof(typename C::Element) == 1;  // of the rows of x
  for (int unit = range.begin, block = unit / k_tiles; unit < range.end; ++block) {
    StripOutput<C::kRegs> strip(p, block * kBlockRows + warp * kStripRows, thread % kWarpSize);
    const int block_begin = block * k_tiles, block_end = block_begin + k_tiles;
    const int piece_end = min(block_end, range.end);
    const bool owner = unit == block_begin;
    if (owner) strip.template load<!kMakesScales>();
    multiply_stage<C>(r_acc, s, ring, warpgroup, false);
    ring.advance();
#pragma unroll 1
    for (++unit; unit < piece_end; ++unit, ring.advance()) multiply_stage<C>(r_acc, s, ring, warpgroup, true);
    if (!owner) {
      publish<C>(r_acc, slot_of<C>(p.workspace, blockIdx.x, warpgroup, thread));
      continue;
    }
    if (piece_end < block_end) collect<C>(r_acc, p, block_end, warpgroup, thread);
    if constexpr (kMakesScales) {
#pragma unroll
      for (int i = 0; i < strip.kGroups; ++i)
        if (strip.token_of(i) < p.num_tokens) strip.x_scale[i] = s.factors[strip.token_of(i)].fp8_scale.value;
    }
    strip.finish(r_acc, out_scale, s.stats[block % 2][warp]);
    if (p.out_stats) store_stats<C>(s.stats[block % 2], p, block);
  }
}

#endif

template <class C>
__global__ void __launch_bounds__(C::kMaxThreads)
    packed_linear_kernel(const __grid_constant__ CUtensorMap x_map,
                         const __grid_constant__ PackedLinearParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t s_bytes[];
  auto& s = *reinterpret_cast<LinearSmem<C>*>(s_bytes);
  const int warp =
      __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);  // uniform, which wgmma wants to be seen
  const UnitRange range = p.schedule.slice(blockIdx.x);
  const bool is_producer = threadIdx.x == C::kConsumerWarps * kWarpSize;
  Producer<C> producer{s, x_map, p, range};
  if (is_producer) producer.fill_ring();
  __syncthreads();  // the barriers of the ring exist

  if (warp < C::kConsumerWarps) {
    consume<C>(s, p, range, warp);
  } else {
    if (is_producer) producer.run();
    if constexpr (C::kMakesX) {
      const int maker = warp - C::kConsumerWarps - 1;
      if (maker >= 0 && maker < C::kMakerWarps) TileMaker<C, LinearSmem<C>>{s, p, range, maker}.run();
    }
  }
#else
  __trap();
#endif
}

// Launches take turns with two footprints, each more than half of an SM in one resource: much shared memory,
// or so many (idle) warps that they have more than half of the registers. So one CTA of each fits on an SM,
// but never two of the same launch, which would share what bandwidth one SM has while another SM has no CTA.
constexpr int kWideSmemBytes = 116 * 1024;

// Of the launch with many warps. With `limit` warps on an SM at most, that has to be more than limit / 2, and
// limit - kThreads / 32 at most.
template <class C>
int wide_threads() {
  static const int threads = [] {
    cudaFuncAttributes attributes;
    NF_CUDA(cudaFuncGetAttributes(&attributes, packed_linear_kernel<C>));
    const int registers = (attributes.numRegs + 7) / 8 * 8;     // as they are allocated, a thread
    const int limit = 4 * (65536 / 4 / kWarpSize / registers);  // each quarter of an SM has its own registers
    const int warps = limit / 2 + 1;
    NF_CHECK(warps * kWarpSize <= C::kMaxThreads && warps + C::kThreads / kWarpSize <= limit,
             std::to_string(attributes.numRegs) + " registers");
    return warps * kWarpSize;
  }();
  return threads;
}

inline bool next_is_wide_in_threads() {
  static std::atomic<uint32_t> turn{0};
  return turn.fetch_add(1, std::memory_order_relaxed) % 2 != 0;
}

template <class C>
void launch_linear(const PackedLinearParams& p, cudaStream_t stream) {
  constexpr auto kKernel = packed_linear_kernel<C>;
  constexpr int kSmemBytes = int(sizeof(LinearSmem<C>));
  static_assert(kSmemBytes <= 110 * 1024);
  NF_CHECK(can_overlap<kKernel>(), "a GPU or a build without sm_90a");
  constexpr int kElementBytes = int(sizeof(typename C::Element));
  CUtensorMap x_map{};
  if constexpr (!C::kMakesX)
    x_map = ptx::swizzled_rows_map(p.x, p.num_tokens, int64_t(p.num_cols) * kElementBytes,
                                   p.x_stride * kElementBytes, p.num_tokens, kElementBytes);
  Grid grid{.ctas = dim3(p.schedule.num_slices), .threads = C::kThreads, .smem_bytes = kSmemBytes};
  prepare<kKernel>(kWideSmemBytes);
  if (next_is_wide_in_threads())
    grid.threads = wide_threads<C>();
  else
    grid.smem_bytes = kWideSmemBytes;
  launch<kKernel>(grid, stream, x_map, p);
}

template <class Element>
void launch_for_few_tokens(const PackedLinearParams& p, cudaStream_t stream) {
  if (p.x_rows.stats != nullptr) {
    dispatch<8, 16>("tokens", padded_tokens(p.num_tokens),
                    [&](auto tokens) { launch_linear<LinearConfig<Element, tokens, true>>(p, stream); });
  } else {
    launch_linear<LinearConfig<Element, kMaxSplitTokens, false>>(p, stream);
  }
}

}  // namespace
}  // namespace nf
