// SPDX-License-Identifier: Apache-2.0
// The products of one of the GEMM's warpgroups, with what hides behind them: the stores of the tile before.
#pragma once

#include "kernels/linear/gemm_config.cuh"
#include "kernels/linear/tile_output.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace nf {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// One warpgroup's products.
template <class C>
struct Multiplier {
  GemmSmem<C>& s;
  GemmRing ring;
  int weight_offset = 0, x_offset = 0;  // in a stage: of what it multiplies
  int first_fold = 0;                   // k tiles before it
  typename TilePlan<C>::Slices slices{};

  // The stage may be filled again once all warps have read it.
  __device__ __forceinline__ void release(int stage) { ptx::warp::mbarrier_arrive(&s.empty[stage]); }

  // The products of the stage at `ring`, not waited for.
  template <int kHalves, int kRegisters>
  __device__ __forceinline__ void start_products(float (&r_acc)[kRegisters], bool accumulate) {
    constexpr typename C::Element kTag{};
    const uint8_t* stage = s.ring + uniform(ring.stage) * ring.shape.stage_bytes;
    const uint64_t weight = ptx::wgmma_descriptor(stage + weight_offset),
                   x = ptx::wgmma_descriptor(stage + x_offset);
    auto& r_used = reinterpret_cast<float (&)[kHalves * C::kHalfTokens / 2]>(r_acc);
    ptx::mbarrier_wait(&s.full[ring.stage], ring.parity);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileRowBytes / ptx::kWgmmaStepBytes; ++k)
      ptx::wgmma(kTag, r_used, ptx::wgmma_advance(weight, k), ptx::wgmma_advance(x, k), accumulate || k > 0);
    ptx::wgmma_commit();
  }

  // r_acc + the output's words = the sums of all k tiles. Unless there are too few, what the output still
  // holds of the tile before is stored first, while the tensor cores are busy.
  template <int kHalves>
  __device__ __forceinline__ void multiply(Accumulators<C>& r_acc, int num_k_tiles, TileOutput<C>& output) {
    start_products<kHalves>(r_acc, false);
    int started = 1;
    const auto next = [&](auto&& meanwhile) {
      const int previous = ring.stage;
      ring.advance();
      start_products<kHalves>(r_acc, true);
      meanwhile();
      ptx::wgmma_wait<1>();
      release(previous);
      ++started;
    };
    if (num_k_tiles > TileOutput<C>::kStoreSteps) {
#pragma unroll 1
      while (output.num_boxes > 0) {
        next([&] { output.stage_piece(thread_here()); });
        next([&] { output.store_staged(thread_here()); });
      }
    }
    static_assert(C::kOddFirstFold > TileOutput<C>::kStoreSteps);
    const int folds_at = !C::kFolds ? num_k_tiles : first_fold;
    if constexpr (C::kFolds) output.clear();
#pragma unroll 1
    for (int end = min(folds_at, num_k_tiles);; end = min(end + C::kFoldTiles, num_k_tiles)) {
#pragma unroll 1
      while (started < end) next([] {});
      ptx::wgmma_wait();
      ptx::wgmma_settled(r_acc);
      release(ring.stage);
      ring.advance();
      if (end == num_k_tiles) break;
      output.fold<kHalves>(r_acc);
      start_products<kHalves>(r_acc, true);
      ++started;
    }
  }

  // r_acc = the sums of all k tiles as packed_linear_kernel.cuh has them, bit for bit: each slice by itself,
  // then all in their order. e4m3 is added to FP32 registers after every k tile, with nothing in flight.
  // (With the next tile's products in flight, in registers of their own, a step of 64 tokens took 0.7 ms
  // more.)
  template <int kHalves>
  __device__ __forceinline__ void multiply_in_slices(Accumulators<C>& r_acc, const LinearSchedule& schedule,
                                                     TileOutput<C>& output) {
    const int num_k_tiles = schedule.k_tiles;
    constexpr bool kPromotes = sizeof(typename C::Element) == 1;
    constexpr int kUsed = kHalves * C::kHalfTokens / 2;
    float r_slice[kUsed], r_tile[kUsed];
    const auto clear = [](auto& r) {  // what is added to -0 keeps its bits
#pragma unroll
      for (int i = 0; i < kUsed; ++i) r[i] = -0.0f;
    };
    const bool stores = num_k_tiles > TileOutput<C>::kStoreSteps;
    bool is_staged = false;
    clear(r_acc);
#pragma unroll 1
    for (int k = 0, end = slices.first_end; k < num_k_tiles; end += schedule.size(slices.next++)) {
      const int begin = k;
      if constexpr (kPromotes) clear(r_slice);
#pragma unroll 1
      for (end = min(end, num_k_tiles); k < end; ++k, ring.advance()) {
        start_products<kHalves>(kPromotes ? r_tile : r_slice, !kPromotes && k > begin);
        if (stores && output.num_boxes > 0) {
          if (is_staged)
            output.store_staged(thread_here());
          else
            output.stage_piece(thread_here());
          is_staged = !is_staged;
        }
        ptx::wgmma_wait();
        ptx::wgmma_settled(kPromotes ? r_tile : r_slice);
        release(ring.stage);
        if constexpr (kPromotes) {
#pragma unroll
          for (int i = 0; i < kUsed; ++i) r_slice[i] += r_tile[i];
        }
      }
#pragma unroll
      for (int i = 0; i < kUsed; ++i) r_acc[i] += r_slice[i];
    }
  }
};

#endif

}  // namespace
}  // namespace nf
