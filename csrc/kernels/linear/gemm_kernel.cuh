// SPDX-License-Identifier: Apache-2.0
// The linear of more than kMaxSplitTokens tokens; of many tensor-core bound: 2 T N K operations. Weight rows
// are wgmma's M, as in packed_linear_kernel.cuh, and the packed weights are the same.
//
// Grid: one CTA per SM, which stays for the whole launch (gemm_schedule.h says what each computes). A tile is
// 128 rows x up to 256 tokens, or half of that. A producer warp fills the ring, two warpgroups multiply 64
// rows x all or half of the tokens each, and one more warp tells these what comes next.
//
// What limits the products of many tokens is how fast L2 fills the rings, and what that costs in power. CTAs
// are launched in clusters of two then, for nothing but to have both in one part of the GPU: L2 sends what
// they read at the same time once. (All linears of a step of 2,048 and 8,192 tokens take 2 % less time with
// normal weights, 0.5 % with zeros. Two that load activations for each other, by multicast, are as fast, and
// have to free their stages for each other. A fence of cluster scope in that takes more than it gains.)
#pragma once

#include "host/gemm_schedule.h"
#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/dispatch.h"
#include "kernels/common/launch.h"
#include "kernels/linear/gemm_config.cuh"
#include "kernels/linear/gemm_multiplier.cuh"
#include "kernels/linear/gemm_producer.cuh"
#include "kernels/linear/linear.h"
#include "kernels/linear/tile_output.cuh"
#include "kernels/ptx/tensor_map.h"

namespace nf {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class C>
struct GemmConsumer {
  GemmSmem<C>& s;
  const PackedLinearParams& p;
  const int k_tiles;
  Multiplier<C> multiplier;
  TileOutput<C> output;
  TileTurn turn;

  // With few tokens, a rehearsal comes first: the code behind the products runs once without any, for what
  // lies beyond the last token. So it comes into the instruction cache while the first copies are under way.
  __device__ __forceinline__ void run(const GemmSchedule& schedule) {
    if constexpr (C::kRehearses)
      rehearse_and_run(schedule);
    else
      run_at_once(schedule);
    if (thread_here() == 0) ptx::wait_for_stores();
  }

 private:
  // Are there too few products of a tile to hide the stores of the one before behind?
  __device__ __forceinline__ bool has_few_products() const { return k_tiles <= TileOutput<C>::kStoreSteps; }

  __device__ __forceinline__ int warpgroup() const { return output.barrier - kFirstWarpgroup; }
  __device__ __forceinline__ const TilePlan<C>& plan() const { return s.plans[turn.index()][warpgroup()]; }

  template <int kHalves>
  __device__ __forceinline__ void make(bool rehearses) {
    Accumulators<C> r_acc;
    // Else r_acc is whatever it is. (Given values, even by an empty asm statement, ptxas has too few
    // registers and serialises the products.)
    if (!rehearses) {
      if constexpr (C::kInSlices)
        multiplier.template multiply_in_slices<kHalves>(r_acc, p.schedule, output);
      else
        multiplier.template multiply<kHalves>(r_acc, k_tiles, output);
      ptx::mbarrier_wait(&s.scaled[turn.index()], turn.parity());
    }
    output.template take<kHalves>(r_acc, plan().scales, rehearses ? 0 : plan().row,
                                  rehearses ? p.num_tokens : plan().token, thread_here());
    ptx::mbarrier_arrive(rehearses ? &s.rehearsed : &s.used[turn.index()]);
  }
  __device__ __forceinline__ void make(int num_halves, bool rehearses) {
    if (uniform(num_halves) == 2)
      make<2>(rehearses);
    else
      make<1>(rehearses);
  }

  __device__ __forceinline__ void wait_for_plan() {
    ptx::mbarrier_wait(&s.planned[turn.index()], turn.parity());
    multiplier.weight_offset = uniform(plan().weight_offset);
    multiplier.x_offset = uniform(plan().x_offset);
    multiplier.first_fold = plan().first_fold;
    multiplier.slices = plan().slices;
  }

  __device__ __forceinline__ void run_at_once(const GemmSchedule& schedule) {
#pragma unroll 1
    for (; turn.tile() < schedule.num_tiles; ++turn.count) {
      wait_for_plan();
      if (has_few_products()) output.store(thread_here());
      make(plan().num_halves, false);
    }
    output.store(thread_here());
  }

  __device__ __forceinline__ void rehearse_and_run(const GemmSchedule& schedule) {
    const GemmTile first = schedule.tile(blockIdx.x);
    int num_halves = warpgroup() == 0 ? first.part[0].num_halves : first.part[1].num_halves;
#pragma unroll 1
    for (turn.count = -1;; ++turn.count) {
      const bool rehearses = turn.count < 0, is_done = turn.tile() >= schedule.num_tiles;
      // Behind the rehearsal nothing is left, and out_scale may be being written.
      if (turn.count != 0 && (rehearses || is_done || has_few_products()))
        output.store_or_rehearse(thread_here());
      if (is_done) break;
      if (!rehearses) wait_for_plan(), num_halves = plan().num_halves;
      make(num_halves, rehearses);
    }
  }
};

#endif

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ GemmMaps maps, const __grid_constant__ PackedLinearParams p,
                const __grid_constant__ GemmSchedule schedule, const __grid_constant__ RingShape ring,
                const int k_tiles) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t s_bytes[];
  auto& s = *reinterpret_cast<GemmSmem<C>*>(s_bytes);
  const int warp = uniform(threadIdx.x / kWarpSize);
  GemmProducer<C> producer{s, maps, p, schedule, k_tiles, ring};
  if (threadIdx.x == kConsumerWarps * kWarpSize) producer.init_barriers();
  __syncthreads();  // the barriers exist

  if (warp < kConsumerWarps) {
    ptx::take_registers<232>();
    const int warpgroup = warp / (kWarpgroupThreads / kWarpSize);
    GemmConsumer<C>{s,
                    p,
                    k_tiles,
                    {s, {ring}},
                    {p, maps.out, s.staging[warpgroup], s.out_scale, kFirstWarpgroup + warpgroup}}
        .run(schedule);
  } else {
    ptx::leave_registers<40>();
    if (warp == kConsumerWarps)
      producer.run();
    else if (warp == kConsumerWarps + 1)
      TilePlanner<C>{s, p, schedule, ring}.run();
  }
#else
  __trap();
#endif
}

template <class C>
void launch_gemm_of(const PackedLinearParams& p, cudaStream_t stream) {
  static_assert(sizeof(GemmSmem<C>) <= 227 * 1024);
  constexpr auto kKernel = gemm_kernel<C>;
  NF_CHECK(can_overlap<kKernel>(), "a GPU or a build without sm_90a");
  constexpr int kElementBytes = int(sizeof(typename C::Element));
  const auto x_map = [&p](int rows) {
    return ptx::swizzled_rows_map(p.x, p.num_tokens, int64_t(p.num_cols) * kElementBytes,
                                  p.x_stride * kElementBytes, rows, kElementBytes);
  };
  const auto x_maps = [&](int tokens, CUtensorMap(&to)[2]) {
    const int last = (p.num_tokens - 1) / tokens * tokens;
    to[0] = x_map(tokens), to[1] = x_map(num_rows_of_x(p.num_tokens, last, tokens));
  };
  GemmMaps maps;
  x_maps(C::kTokens, maps.x[0]), x_maps(C::kHalfTokens, maps.x[1]), maps.out = out_map(p);
  const PackedShape shape = packed_shape(p.num_rows, p.num_cols, kElementBytes);
  const GemmSchedule schedule =
      make_gemm_schedule(int(shape.num_blocks()), p.num_tokens, p.num_sms, C::kTokens);
  const RingShape ring = schedule.is_narrow() ? C::kNarrowRing : C::kRing;
  const bool are_neighbours = schedule.num_columns > 1 && schedule.num_ctas % 2 == 0;
  launch<kKernel>({.ctas = dim3(unsigned(schedule.num_ctas)),
                   .threads = kThreads,
                   .smem_bytes = int(sizeof(GemmSmem<C>)),
                   .cluster = are_neighbours ? 2 : 1},
                  stream, maps, p, schedule, ring, int(shape.k_tiles()));
}

template <class Element>
void launch_gemm(const PackedLinearParams& p, cudaStream_t stream) {
  static_assert(kMaxFewTokens == 64 && kMinTileTokens == 96 && kMaxTileTokens == 256 &&
                kTileTokensStep == 32);
  const int tile_tokens = gemm_tile_tokens(p.num_tokens);
  if (p.num_tokens <= kMaxRehearsedTokens)
    dispatch<32, 64, 96, 128, 160, 192, 224, 256>("tile_tokens", tile_tokens, [&](auto tokens) {
      launch_gemm_of<GemmConfig<Element, tokens, true>>(p, stream);
    });
  else
    dispatch<96, 128, 160, 192, 224, 256>("tile_tokens", tile_tokens, [&](auto tokens) {
      launch_gemm_of<GemmConfig<Element, tokens, false>>(p, stream);
    });
}

}  // namespace
}  // namespace nf
