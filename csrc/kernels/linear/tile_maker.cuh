// SPDX-License-Identifier: Apache-2.0
// Activation tiles out of rows with statistics (row_stats.h): a few warps that normalise and quantise what
// the ring wants next, instead of a kernel of its own between two linears.
#pragma once

#include "kernels/common/device.cuh"
#include "kernels/linear/linear.h"
#include "kernels/norm/row_stats.cuh"
#include "kernels/ptx/bulk_copy.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/named_barrier.cuh"

namespace nf {
namespace {

enum MakerBarrier { kAllThreads, kMakers };

// C: LinearConfig, S: LinearSmem<C>. As many warps as the ring has stages, warp i for stage i: with more, one
// could be two turns of the ring ahead, where parities of the phases repeat.
template <class C, class S>
struct TileMaker {
  using Element = typename C::Element;
  using Bf16 = __nv_bfloat16;
  static_assert(C::kMakerWarps == C::kStages);
  static constexpr int kPairs = sizeof(Element) == 1 ? 2 : 1;  // of a row, per lane: 4 bytes of the tile
  static constexpr int kBatch = 4;                             // tokens whose loads are under way at once

  struct Columns {
    __nv_bfloat162 pair[kPairs];
  };

  S& s;
  const PackedLinearParams& p;
  const UnitRange range;
  const int warp, lane = threadIdx.x % kWarpSize;
  int column = 0;  // the next tile's, in this lane
  Columns weight{}, loaded[kBatch]{};

  __device__ __forceinline__ void run() {
    const int num_units = range.end - range.begin, k_tiles = p.schedule.k_tiles;
    uint8_t* tile = s.stage[warp].x;
    for (int token = p.num_tokens; token < C::kTokens; ++token) store(tile, token, 0);
    if (warp < num_units) load_weight((range.begin + warp) % k_tiles);
    wait_for_predecessor();
    if (warp < num_units) load_tokens(0);
    make_factors();
    uint32_t parity = 0;
    for (int turn = warp; turn < num_units; turn += C::kStages) {
      if (turn != warp) {
        ptx::mbarrier_wait(&s.empty[warp], parity);
        parity ^= 1;
      }
      const int next = turn + C::kStages;
      make_tile(tile, next < num_units ? (range.begin + next) % k_tiles : -1);
      ptx::fence_proxy_async();  // wgmma reads the tile
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&s.full[warp]);
    }
  }

  __device__ __forceinline__ void make_factors() {
    for (int token = warp; token < p.num_tokens; token += C::kMakerWarps) {
      const RowFactors factors = row_factors(p.x_rows, token, p.num_cols);
      if (lane == 0) s.factors[token] = factors;
    }
    ptx::barrier_sync(kMakers, C::kMakerWarps * kWarpSize);  // all factors are known
  }

  // This lane's 4 bytes of row `token`, swizzled.
  __device__ __forceinline__ void store(uint8_t* tile, int token, uint32_t bits) const {
    const int chunk = lane / 4 ^ token % 8;
    *reinterpret_cast<uint32_t*>(tile + token * kTileRowBytes + chunk * 16 + lane % 4 * 4) = bits;
  }

  static __device__ __forceinline__ Columns load(const Bf16* from) {
    Columns columns;
    if constexpr (kPairs == 2) {
      const uint2 bits = __ldcg(reinterpret_cast<const uint2*>(from));
      memcpy(&columns, &bits, sizeof(columns));
    } else {
      const uint32_t bits = __ldcg(reinterpret_cast<const uint32_t*>(from));
      memcpy(&columns, &bits, sizeof(columns));
    }
    return columns;
  }

  // Of tile `k_tile`, this lane's columns: the norm's weight, and from then on what load_tokens() loads.
  __device__ __forceinline__ void load_weight(int k_tile) {
    column = k_tile * C::kTileElements + lane * 2 * kPairs;
    weight = p.x_rows.norm_weight && column < p.num_cols ? load(p.x_rows.norm_weight + column) : Columns{};
  }
  __device__ __forceinline__ void load_tokens(int first) {
    const Bf16* x = static_cast<const Bf16*>(p.x) + column;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const bool inside = column < p.num_cols && first + i < p.num_tokens;
      loaded[i] = inside ? load(x + (first + i) * p.x_stride) : Columns{};
    }
  }

  // Makes the tile of which the weight and the first tokens are loaded, and loads those of `next_k_tile` (if
  // it is not negative): loads are under way while others are used.
  __device__ __forceinline__ void make_tile(uint8_t* tile, int next_k_tile) {
    const bool has_norm = p.x_rows.norm_weight != nullptr;
#pragma unroll 1
    for (int first = 0; first < p.num_tokens; first += kBatch) {
      Columns x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) x[i] = loaded[i];
      const Columns w = weight;
      if (first + kBatch < p.num_tokens) {
        load_tokens(first + kBatch);
      } else if (next_k_tile >= 0) {
        load_weight(next_k_tile);
        load_tokens(0);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i >= p.num_tokens) break;
        const RowFactors factors = s.factors[first + i];
        if (has_norm)
#pragma unroll
          for (int j = 0; j < kPairs; ++j) x[i].pair[j] = normalize(x[i].pair[j], factors.inv_rms, w.pair[j]);
        store(tile, first + i, to_element(x[i], factors.fp8_scale));
      }
    }
  }

  static __device__ __forceinline__ uint32_t to_element(const Columns& columns, const Divisor& fp8_scale) {
    if constexpr (kPairs == 2) {
      const uint32_t low = to_fp8(widen_bf16(columns.pair[0]), fp8_scale);
      return low | to_fp8(widen_bf16(columns.pair[1]), fp8_scale) << 16;
    } else {
      uint32_t bits;
      memcpy(&bits, &columns.pair[0], sizeof(bits));
      return bits;
    }
  }
};

}  // namespace
}  // namespace nf
