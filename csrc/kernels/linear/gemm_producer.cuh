// SPDX-License-Identifier: Apache-2.0
// The GEMM's warps that do not multiply: one brings weights and activations, one plans the tiles.
#pragma once

#include "kernels/linear/gemm_config.cuh"
#include "kernels/linear/linear.h"
#include "kernels/ptx/bulk_copy.cuh"
#include "kernels/ptx/l2_policy.cuh"

namespace nf {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The producer: one warp fills the ring. What it does for each k tile takes part of the time until a stage is
// full again, and is as little as can be.
template <class C>
struct GemmProducer {
  GemmSmem<C>& s;
  const GemmMaps& maps;
  const PackedLinearParams& p;
  const GemmSchedule& schedule;
  const int k_tiles;
  const RingShape& shape;
  const uint64_t read_once = ptx::evict_first_policy(), read_again = ptx::evict_normal_policy();

  // Where the next k tile of a tile is. Only tiles of three quarters have a second part.
  struct Source {
    const char* weights[2];
    uint64_t policy[2];
    int num_weight_bytes, num_bytes;  // of the first part; of all
    const CUtensorMap* x_map;
    int column, token;  // of x
  };

  __device__ __forceinline__ void init_barriers() {
    ptx::prefetch_tensor_map(&maps.x[0][0]);
    if (p.out_type != OutType::kFloat) ptx::prefetch_tensor_map(&maps.out);
    for (int i = 0; i < C::kMaxStages; ++i) {
      ptx::mbarrier_init(&s.full[i], 1);
      ptx::mbarrier_init(&s.empty[i], kConsumerWarps);
    }
    // All threads that write or read arrive: one for its warp would do, but racecheck does not see that.
    ptx::mbarrier_init(&s.rehearsed, kConsumerWarps * kWarpSize);
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(&s.planned[i], kWarpSize);
      ptx::mbarrier_init(&s.scaled[i], kWarpSize);
      ptx::mbarrier_init(&s.used[i], kConsumerWarps * kWarpSize);
    }
    ptx::fence_mbarrier_init();
  }

  // Rows beyond the weight are read from its last half block, for nothing.
  __device__ __forceinline__ Source start_tile(int i) const {
    const GemmTile tile = schedule.tile(i);
    Source source;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int half_block = min(tile.part[part].half_block, 2 * schedule.num_blocks - 1);
      const int64_t packed_tile = int64_t(half_block / 2) * k_tiles * 2 + half_block % 2;
      source.weights[part] = static_cast<const char*>(p.packed) + packed_tile * kTileBytes;
      const bool once = p.num_tokens <= C::kTokens && (tile.shares_rows() || tile.part[part].num_halves == 2);
      source.policy[part] = once ? read_once : read_again;
    }
    source.num_weight_bytes = schedule.in_three_quarters || tile.shares_rows() ? kTileBytes : kBlockTileBytes;
    const int num_tokens = tile.num_halves * C::kHalfTokens;
    source.num_bytes = (tile.shares_rows() ? kTileBytes : kBlockTileBytes) +
                       num_rows_of_x(p.num_tokens, tile.token, num_tokens) * kTileRowBytes;
    source.x_map = &maps.x[tile.num_halves == 1][tile.token + num_tokens >= p.num_tokens];
    source.column = 0, source.token = tile.token;
    return source;
  }

  __device__ __forceinline__ void load_weights(int stage, Source& from) const {
    uint8_t* to = s.ring + stage * shape.stage_bytes;
    ptx::warp::mbarrier_arrive_expect(&s.full[stage], from.num_bytes);
    ptx::warp::bulk_load(to, from.weights[0], from.num_weight_bytes, &s.full[stage], from.policy[0]);
    from.weights[0] += kBlockTileBytes;
    if (!schedule.in_three_quarters) return;
    ptx::warp::bulk_load(to + kTileBytes, from.weights[1], kTileBytes, &s.full[stage], from.policy[1]);
    from.weights[1] += kBlockTileBytes;
  }
  __device__ __forceinline__ void load_x(int stage, Source& from) const {
    uint8_t* to = s.ring + stage * shape.stage_bytes + shape.weight_bytes;
    ptx::warp::tensor_load(to, from.x_map, from.column, from.token, &s.full[stage]);
    from.column += kTileRowBytes / int(sizeof(typename C::Element));
  }

  __device__ __forceinline__ void run() {
    if (int(blockIdx.x) >= schedule.num_tiles) return;
    Source source = start_tile(blockIdx.x);
    const int num_early = min(shape.num_stages, k_tiles);  // weights depend on no other kernel
    for (int k = 0; k < num_early; ++k) load_weights(k, source);
    let_successor_start();
    wait_for_predecessor();  // x is its result
    for (int k = 0; k < num_early; ++k) load_x(k, source);
    GemmRing ring{shape};
    for (int k = 0; k < num_early; ++k) ring.advance();
    ring.parity ^= 1;  // the first wait is for the first release
    for (int i = blockIdx.x, k = num_early;;) {
#pragma unroll 1
      for (; k < k_tiles; ++k, ring.advance()) {
        ptx::mbarrier_wait(&s.empty[ring.stage], ring.parity);
        load_weights(ring.stage, source);
        load_x(ring.stage, source);
      }
      i += gridDim.x;
      if (i >= schedule.num_tiles) break;
      source = start_tile(i), k = 0;
    }
  }
};

// One warp plans the tiles, one ahead of the warpgroups: between two tiles these have no time to divide or to
// wait for loads.
template <class C>
struct TilePlanner {
  GemmSmem<C>& s;
  const PackedLinearParams& p;
  const GemmSchedule& schedule;
  const RingShape& ring;

  __device__ __forceinline__ void run() const {
    const int lane = threadIdx.x % kWarpSize;
    TileTurn turn;
#pragma unroll 1
    for (; turn.tile() < schedule.num_tiles; ++turn.count) {
      TilePlan<C>(&plans)[2] = s.plans[turn.index()];
      ptx::mbarrier_wait(&s.used[turn.index()], turn.parity() ^ 1);
      if (lane < 2) plan(plans[lane], schedule.tile(turn.tile()), lane);
      __syncwarp();  // all lanes read the plans below
      ptx::mbarrier_arrive(&s.planned[turn.index()]);
      if (turn.count == 0) {
        if constexpr (C::kRehearses) ptx::mbarrier_wait(&s.rehearsed, 0);
        wait_for_predecessor();
        if (p.out_scale && lane == 0) s.out_scale = *p.out_scale;
      }
#pragma unroll 1
      for (TilePlan<C>& plan : plans) plan.scales.start_loading(p, plan.row, plan.token, lane);
      ptx::wait_for_copies<0>();
      ptx::mbarrier_arrive(&s.scaled[turn.index()]);
    }
  }

 private:
  __device__ __forceinline__ void plan(TilePlan<C>& to, const GemmTile& tile, int warpgroup) const {
    const GemmTile::Part part = warpgroup == 0 ? tile.part[0] : tile.part[1];
    to.row = part.half_block * kTileRows;
    to.token = tile.token + part.first_half * C::kHalfTokens;
    to.num_halves = part.num_halves;
    to.weight_offset = tile.shares_rows() ? 0 : warpgroup * kTileBytes;
    to.x_offset = ring.weight_bytes + part.first_half * C::kHalfBytes;
    // The warpgroups take turns, so that the tensor cores stay busy. A row's turn is the same in any tile,
    // for its bits not to depend on T.
    to.first_fold = part.half_block % 2 == 0 ? C::kFoldTiles : C::kOddFirstFold;
    if constexpr (C::kInSlices) {
      const int first_unit = part.half_block / 2 * p.schedule.k_tiles,
                next = p.schedule.next_slice(first_unit);
      to.slices = {p.schedule.slice_begin(next) - first_unit, next};
    }
  }
};

#endif

}  // namespace
}  // namespace nf
