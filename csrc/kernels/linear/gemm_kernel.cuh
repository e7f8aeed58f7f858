// SPDX-License-Identifier: Apache-2.0
// The linear of more than kMaxSplitTokens tokens, from some 300 on tensor-core bound: 2 T N K operations.
// Weight rows are wgmma's M, as in packed_linear_kernel.cuh, and the packed weights are the same.
//
// Grid: one CTA per SM, which stays for the whole launch (gemm_schedule.h says what each computes). A tile is
// 128 rows x up to 256 tokens, or half of that. A producer warp fills the ring, two warpgroups multiply 64
// rows x all or half of the tokens each, and one more warp tells these what comes next.
//
// Clusters of two CTAs that load activations for each other were no faster on an H100, at 128 to 2,048 tokens
// (nor was a ring without epilogue, but by 1.5 % at 256).
#pragma once

#include <algorithm>

#include "host/gemm_schedule.h"
#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/dispatch.h"
#include "kernels/common/launch.h"
#include "kernels/linear/linear.h"
#include "kernels/linear/tile_output.cuh"
#include "kernels/ptx/bulk_copy.cuh"
#include "kernels/ptx/named_barrier.cuh"
#include "kernels/ptx/tensor_map.h"
#include "kernels/ptx/wgmma.cuh"

namespace nf {
namespace {

// The ring of a launch. A stage is a k tile: 128 or 64 rows of weights, then the activations.
struct RingShape {
  int num_stages, stage_bytes, weight_bytes;
  constexpr int bytes() const { return num_stages * stage_bytes; }
};

// As many stages as fit, up to 8, or 16 of few tokens. (All linears of a step of 96 to 192 tokens take as
// long with 5 or 6 of those for whole tiles, more with 3 or 4; a step of 96 0.05 ms more with up to 16, one
// of 32 0.06 less.)
constexpr RingShape ring_shape(int weight_bytes, int tokens) {
  constexpr int kMostBytes = 204 * 1024;
  const int kMostStages = tokens <= kMaxFewTokens ? 16 : 8,
            stage_bytes = weight_bytes + tokens * kTileRowBytes;
  return {std::min(kMostBytes / stage_bytes, kMostStages), stage_bytes, weight_bytes};
}

// kTokens_: of a full tile. kRehearses_: see GemmConsumer::run().
template <class Element_, int kTokens_, bool kRehearses_>
struct GemmConfig {
  using Element = Element_;
  static constexpr bool kRehearses = kRehearses_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kHalfTokens = kTokens / 2;
  static constexpr int kHalfBytes = kHalfTokens * kTileRowBytes;  // of a k tile of activations
  static constexpr RingShape kRing = ring_shape(kBlockTileBytes, kTokens),
                             kNarrowRing = ring_shape(kTileBytes, kTokens);  // where all tiles have 64 rows
  static constexpr int kRingBytes = std::max(kRing.bytes(), kNarrowRing.bytes());
  static constexpr int kMaxStages = std::max(kRing.num_stages, kNarrowRing.num_stages);
  static_assert(kTokens % kTileTokensStep == 0 && kHalfTokens % kBoxTokens == 0);

  // Are sums added in the slices of linear_schedule.h?
  static constexpr bool kInSlices = kTokens <= kMaxFewTokens;

  // wgmma keeps only some 14 bits of a sum of e4m3 products. After kFoldTiles k tiles its upper part is moved
  // to other registers (TileOutput::fold), which bounds the error for any K. An emulation of such sums gives
  // these errors, as parts of the root of the sum of the squared products: after every 1, 4, 16, 32
  // tiles 1.2e-4, 3.4e-4, 8.5e-4, 1.3e-3 on average (root of squares), without any 2.1e-3 at K = 8192
  // and 4.3e-3 at K = 28672. Rounding to bf16: 1.1e-3.
  static constexpr bool kFolds = sizeof(Element) == 1 && !kInSlices;
  static constexpr int kFoldTiles = 32, kOddFirstFold = 20;  // the latter in every second 64 rows
};

// With more, a rehearsal (GemmConsumer::run) costs time: of all linears of a step of 2,048 tokens 1.7 % with
// zeros and 2.6 % with weights like vLLM's dummies, on an H100. A kernel of its own, because ptxas
// serialises the products in some sizes where one kernel decides at run time.
constexpr int kMaxRehearsedTokens = 256;

constexpr int kConsumerWarps = 2 * kWarpgroupThreads / kWarpSize;
constexpr int kThreads = 3 * kWarpgroupThreads;  // of the last warpgroup one warp produces, one plans

enum NamedBarrier { kAllThreads, kFirstWarpgroup };  // kFirstWarpgroup + i is warpgroup i's

// What a warpgroup multiplies of a tile: 64 rows from `row` on, num_halves * C::kHalfTokens tokens.
template <class C>
struct TilePlan {
  TileScales<C> scales;
  int row, token, num_halves;
  int weight_offset, x_offset;  // in a stage
  int first_fold;               // k tiles before it
  // Of linear_schedule.h: where the block's first one ends, and the next.
  struct Slices {
    int first_end, next;
  } slices;
};

template <class C>
struct GemmSmem {
  // Stages: [warpgroup] weights, kTileBytes each, 64 swizzled rows, or one such for both; [half] x,
  // C::kHalfBytes each, swizzled rows
  alignas(1024) uint8_t ring[C::kRingBytes];
  alignas(1024) Staging staging[2][2];  // [warpgroup], two pieces: while one is stored, the next is written
  TilePlan<C> plans[2][2];              // [turn][warpgroup], of this tile and the next
  Divisor out_scale;
  alignas(8) uint64_t full[C::kMaxStages], empty[C::kMaxStages];
  // Of plans[turn]: all but scales, scales and out_scale; it may be written again.
  uint64_t planned[2], scaled[2], used[2];
  uint64_t rehearsed;  // the scales and out_scale may be written
};

// Of x in boxes of a tile's tokens, [is half a tile][is the last]; and of the result. The last have no rows
// beyond x: these take the copy engine longer than others. (29 of 224 made all linears of a step 11 % slower
// on an H100.)
struct GemmMaps {
  CUtensorMap x[2][2], out;
};

// Rows of x that a tile of `tokens` tokens from `token` on loads.
__host__ __device__ constexpr int num_rows_of_x(int num_tokens, int token, int tokens) {
  return num_tokens - token < tokens ? num_tokens - token : tokens;
}

struct GemmRing {
  const RingShape& shape;
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == shape.num_stages) stage = 0, parity ^= 1;
  }
};

// The same value, known to the compiler to be so in all lanes: wgmma must not stand in a divergent path, and
// its descriptors are computed by the uniform datapath then.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(kFullWarp, v, 0); }

// In its warpgroup. Read anew each time: held in a register across the products, it or what follows from it
// would leave them too few.
__device__ __forceinline__ int thread_here() {
  int v;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
  return v % kWarpgroupThreads;
}

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
    ptx::mbarrier_init(&s.rehearsed, kConsumerWarps);
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(&s.planned[i], 1);
      ptx::mbarrier_init(&s.scaled[i], 1);
      ptx::mbarrier_init(&s.used[i], kConsumerWarps);
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

// A CTA's tiles one after another, and where the plan of each is.
struct TileTurn {
  int count = 0;
  __device__ __forceinline__ int tile() const { return int(blockIdx.x) + count * int(gridDim.x); }
  __device__ __forceinline__ int index() const { return count & 1; }
  __device__ __forceinline__ uint32_t parity() const { return count >> 1 & 1; }
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
      __syncwarp();  // the plans are written
      ptx::warp::mbarrier_arrive(&s.planned[turn.index()]);
      if (turn.count == 0) {
        if constexpr (C::kRehearses) ptx::mbarrier_wait(&s.rehearsed, 0);
        wait_for_predecessor();
        if (p.out_scale && lane == 0) s.out_scale = *p.out_scale;
      }
#pragma unroll 1
      for (TilePlan<C>& plan : plans) plan.scales.start_loading(p, plan.row, plan.token, lane);
      ptx::wait_for_copies<0>();
      __syncwarp();  // all lanes' scales are there
      ptx::warp::mbarrier_arrive(&s.scaled[turn.index()]);
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
    if (num_k_tiles > 2 * TileOutput<C>::kPieces) {
#pragma unroll 1
      while (output.num_boxes > 0) {
        next([&] { output.stage_piece(thread_here()); });
        next([&] { output.store_staged(thread_here()); });
      }
    }
    static_assert(C::kOddFirstFold > 2 * TileOutput<C>::kPieces);
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
    const bool stores = num_k_tiles > 2 * TileOutput<C>::kPieces;
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
  __device__ __forceinline__ bool has_few_products() const { return k_tiles <= 2 * TileOutput<C>::kPieces; }

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
    __syncwarp();  // all lanes have read the plan
    if (rehearses)
      ptx::warp::mbarrier_arrive(&s.rehearsed);
    else
      ptx::warp::mbarrier_arrive(&s.used[turn.index()]);
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
      if (rehearses || is_done || has_few_products()) output.store_or_rehearse(thread_here());
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
  launch<kKernel>({.ctas = dim3(unsigned(schedule.num_ctas)),
                   .threads = kThreads,
                   .smem_bytes = int(sizeof(GemmSmem<C>))},
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
