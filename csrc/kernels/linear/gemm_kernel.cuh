// SPDX-License-Identifier: Apache-2.0
// The linear of many tokens, tensor-core bound: 2 T N K operations. Weight rows are wgmma's M, as in
// packed_linear_kernel.cuh, and the packed weights are the same.
//
// Grid: one CTA per SM, or fewer, which stays for the whole launch (gemm_schedule.h says what each computes).
// A tile is 128 rows x up to 256 tokens. A producer thread fills the ring, two warpgroups multiply 64 rows x
// all tokens each.
//
// Clusters of two CTAs that load activations for each other were no faster on an H100, at 128 to 2,048
// tokens.
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

// More stages would fit beside few tokens, but make all linears of a step no faster (for 96 and 128 tokens on
// an H100).
constexpr RingShape ring_shape(int weight_bytes, int tokens) {
  const int stage_bytes = weight_bytes + tokens * kTileRowBytes,
            most_stages = weight_bytes == kTileBytes ? 8 : 5;
  return {std::min(204 * 1024 / stage_bytes, most_stages), stage_bytes, weight_bytes};
}

// kTokens_: of a full tile. kRehearses_: see GemmConsumer::run().
template <class Element_, int kTokens_, bool kRehearses_>
struct GemmConfig {
  using Element = Element_;
  static constexpr bool kRehearses = kRehearses_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kHalfTokens = kTokens / 2;
  static constexpr int kHalfBytes = kHalfTokens * kTileRowBytes;  // of a k tile of activations
  // Of a launch whose tiles are all halves, of rows or of tokens. (Of tokens: 8192 x 28672 and 256 tokens, a
  // chain of such on an H100: 93 us with 6 stages, 101 with 4 of whole tiles. But in a step about half of the
  // CTAs run 10 us and more ahead then, and wait for the others in the end: blocks and attention of 256
  // sequences take 27.0 ms with 5 stages, 27.2 with 6, 27.4 with 4.)
  static constexpr RingShape kRing = ring_shape(kBlockTileBytes, kTokens),
                             kRingOfHalfRows = ring_shape(kTileBytes, kTokens),
                             kRingOfHalfTokens = ring_shape(kBlockTileBytes, kHalfTokens);
  static constexpr int kRingBytes =
      std::max({kRing.bytes(), kRingOfHalfRows.bytes(), kRingOfHalfTokens.bytes()});
  static constexpr int kMaxStages =
      std::max({kRing.num_stages, kRingOfHalfRows.num_stages, kRingOfHalfTokens.num_stages});
  static constexpr int kStagings = 2;
  static_assert(kTokens % kTileTokensStep == 0 && kHalfTokens % kBoxTokens == 0);

  // wgmma keeps only some 14 bits of a sum of e4m3 products. After kFoldTiles k tiles its upper part is moved
  // to other registers (TileOutput::fold), which bounds the error for any K. An emulation of such sums gives
  // these errors, as parts of the root of the sum of the squared products: after every 1, 4, 16, 32
  // tiles 1.2e-4, 3.4e-4, 8.5e-4, 1.3e-3 on average (root of squares), without any 2.1e-3 at K = 8192
  // and 4.3e-3 at K = 28672. Rounding to bf16: 1.1e-3.
  static constexpr bool kFolds = sizeof(Element) == 1;
  static constexpr int kFoldTiles = 32;
};

// With more, a rehearsal (GemmConsumer::run) costs time: of all linears of a step of 2,048 tokens 1.7 % with
// zeros and 2.6 % with weights like vLLM's dummies, on an H100. A kernel of its own, because ptxas
// serialises the products in some sizes where one kernel decides at run time.
constexpr int kMaxRehearsedTokens = 256;

constexpr int kConsumerWarps = 2 * kWarpgroupThreads / kWarpSize;
constexpr int kThreads = 3 * kWarpgroupThreads;  // of the last warpgroup one thread produces

enum NamedBarrier { kAllThreads, kFirstWarpgroup };  // kFirstWarpgroup + i is warpgroup i's

template <class C>
struct GemmSmem {
  // Stages: [warpgroup] weights, kTileBytes each, 64 swizzled rows, or one such for both; [half] x,
  // C::kHalfBytes each, swizzled rows
  alignas(1024) uint8_t ring[C::kRingBytes];
  alignas(1024) Staging staging[2][2];  // [warpgroup], two pieces: while one is stored, the next is written
  TileScales<C> scales[2][2];           // [warpgroup], of two tiles: the last one's may still be read
  Divisor out_scale[2];                 // [warpgroup]
  alignas(8) uint64_t full[C::kMaxStages], empty[C::kMaxStages];
};

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

// The same value, but what follows from it is computed here: held in registers across the products it would
// leave them too few.
__device__ __forceinline__ int here(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The producer: one thread fills the ring.
template <class C>
struct GemmProducer {
  GemmSmem<C>& s;
  const CUtensorMap &x_map, &out_map;
  const PackedLinearParams& p;
  const GemmSchedule& schedule;
  const int k_tiles;
  const RingShape& shape;
  const uint64_t read_once = ptx::evict_first_policy(), read_again = ptx::evict_normal_policy();

  __device__ __forceinline__ void init_barriers() {
    ptx::prefetch_tensor_map(&x_map);
    if (p.out_type != OutType::kFloat) ptx::prefetch_tensor_map(&out_map);
    for (int i = 0; i < C::kMaxStages; ++i) {
      ptx::mbarrier_init(&s.full[i], 1);
      ptx::mbarrier_init(&s.empty[i], kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }

  // Those of rows beyond the weight are read from its last half block, for nothing.
  __device__ __forceinline__ void load_weights(int stage, const GemmTile& tile, int k) {
    uint8_t* to = s.ring + stage * shape.stage_bytes;
    const bool shares_rows = tile.shares_rows();
    const int num_bytes = shares_rows ? kTileBytes : kBlockTileBytes;
    const auto load = [&](const GemmTile::Part& part, uint8_t* to, int bytes) {
      const int half_block = min(part.half_block, 2 * schedule.num_blocks - 1);
      const int64_t packed_tile = (int64_t(half_block / 2) * k_tiles + k) * 2 + half_block % 2;
      ptx::bulk_load(
          to, static_cast<const char*>(p.packed) + packed_tile * kTileBytes, bytes, &s.full[stage],
          (shares_rows || part.num_halves == 2) && p.num_tokens <= C::kTokens ? read_once : read_again);
    };
    ptx::mbarrier_arrive_expect(&s.full[stage], num_bytes + tile.num_halves * C::kHalfBytes);
    if (schedule.in_three_quarters) {
      load(tile.part[0], to, kTileBytes);
      load(tile.part[1], to + kTileBytes, kTileBytes);
    } else {
      load(tile.part[0], to, num_bytes);
    }
  }
  __device__ __forceinline__ void load_x(int stage, const GemmTile& tile, int k) {
    uint8_t* to = s.ring + stage * shape.stage_bytes + shape.weight_bytes;
    for (int half = 0; half < tile.num_halves; ++half)
      ptx::tensor_load(to + half * C::kHalfBytes, &x_map,
                       k * (kTileRowBytes / int(sizeof(typename C::Element))),
                       tile.token + half * C::kHalfTokens, &s.full[stage]);
  }

  __device__ __forceinline__ void run() {
    if (int(blockIdx.x) >= schedule.num_tiles) return;
    GemmTile tile = schedule.tile(blockIdx.x);
    const int num_early = min(shape.num_stages, k_tiles);  // weights depend on no other kernel
    for (int k = 0; k < num_early; ++k) load_weights(k, tile, k);
    let_successor_start();
    wait_for_predecessor();  // x is its result
    for (int k = 0; k < num_early; ++k) load_x(k, tile, k);
    GemmRing ring{shape};
    for (int k = 0; k < num_early; ++k) ring.advance();
    ring.parity ^= 1;  // the first wait is for the first release
    for (int i = blockIdx.x, k = num_early;;) {
      for (; k < k_tiles; ++k, ring.advance()) {
        ptx::mbarrier_wait(&s.empty[ring.stage], ring.parity);
        load_weights(ring.stage, tile, k);
        load_x(ring.stage, tile, k);
      }
      i += gridDim.x;
      if (i >= schedule.num_tiles) break;
      tile = schedule.tile(i), k = 0;
    }
  }
};

// One warpgroup's products.
template <class C>
struct Multiplier {
  GemmSmem<C>& s;
  const int warpgroup, thread;  // in the warpgroup
  GemmRing ring;
  int weight_offset = 0, x_offset = 0;  // in a stage: of what it multiplies
  int first_fold = 0;                   // k tiles before it

  // The stage may be filled again once all warps have read it.
  __device__ __forceinline__ void release(int stage) {
    if (thread % kWarpSize == 0) ptx::mbarrier_arrive(&s.empty[stage]);
  }

  // The products of the stage at `ring`, not waited for.
  template <int kHalves>
  __device__ __forceinline__ void start_products(Accumulators<C>& r_acc, bool accumulate) {
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
    if (num_k_tiles > TileOutput<C>::kPieces) {
#pragma unroll 1
      while (output.num_boxes > 0) next([&] { output.store_piece(thread); });
    }
    static_assert(C::kFoldTiles / 2 > TileOutput<C>::kPieces);
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
};

template <class C>
struct GemmConsumer {
  // What the warpgroup multiplies of a tile: 64 rows from `row` on, num_halves * C::kHalfTokens tokens.
  struct Share {
    int row, token, num_halves;
  };

  GemmSmem<C>& s;
  const PackedLinearParams& p;
  const int k_tiles, warpgroup, thread;
  Multiplier<C> multiplier;
  TileOutput<C> output;

  template <int kHalves>
  __device__ __forceinline__ void make(const Share& share, const TileScales<C>& scales, bool rehearses) {
    Accumulators<C> r_acc;
    // Else r_acc is whatever it is. (Given values, even by an empty asm statement, ptxas has too few
    // registers and serialises the products.)
    if (!rehearses) multiplier.template multiply<kHalves>(r_acc, k_tiles, output);
    ptx::wait_for_copies<0>();
    ptx::barrier_sync(output.barrier, kWarpgroupThreads);  // the scales are there
    output.template take<kHalves>(r_acc, scales, share.row, rehearses ? p.num_tokens : share.token,
                                  here(thread));
  }

  // Of tile i; the multiplier is told, too.
  __device__ __forceinline__ Share start_share(const GemmSchedule& schedule, int i) {
    const GemmTile tile = schedule.tile(i);
    const GemmTile::Part part = warpgroup == 0 ? tile.part[0] : tile.part[1];
    multiplier.weight_offset = tile.shares_rows() ? 0 : warpgroup * kTileBytes;
    // Warpgroups take turns, so that the tensor cores stay busy. But it depends on the rows alone, as bits
    // do.
    multiplier.first_fold = part.half_block % 2 == 0 ? C::kFoldTiles : C::kFoldTiles / 2;
    multiplier.x_offset = multiplier.ring.shape.weight_bytes + uniform(part.first_half) * C::kHalfBytes;
    return {part.half_block * kTileRows, tile.token + part.first_half * C::kHalfTokens, part.num_halves};
  }

  // With few tokens, a rehearsal comes first: the code behind the products runs once without any, for what
  // lies beyond the last token. So it comes into the instruction cache while the first copies are under way.
  __device__ __forceinline__ void run(const GemmSchedule& schedule) {
    if constexpr (C::kRehearses)
      rehearse_and_run(schedule);
    else
      run_at_once(schedule);
    if (thread == 0) ptx::wait_for_stores();
  }

 private:
  // Are there too few products of a tile to hide the stores of the one before behind?
  __device__ __forceinline__ bool has_few_products() const { return k_tiles <= TileOutput<C>::kPieces; }

  __device__ __forceinline__ void make(const Share& share, const TileScales<C>& scales, bool rehearses) {
    if (uniform(share.num_halves) == 2)
      make<2>(share, scales, rehearses);
    else
      make<1>(share, scales, rehearses);
  }

  __device__ __forceinline__ void run_at_once(const GemmSchedule& schedule) {
    wait_for_predecessor();
    if (p.out_scale && thread == 0) s.out_scale[warpgroup] = *p.out_scale;
    int turn = 0;
#pragma unroll 1
    for (int i = blockIdx.x; i < schedule.num_tiles; i += gridDim.x, turn ^= 1) {
      const Share share = start_share(schedule, i);
      TileScales<C>& scales = s.scales[warpgroup][turn];
      scales.start_loading(p, share.row, share.token, here(thread));
      if (has_few_products()) output.store(thread);
      make(share, scales, false);
    }
    output.store(thread);
  }

  __device__ __forceinline__ void rehearse_and_run(const GemmSchedule& schedule) {
    int turn = 0;
#pragma unroll 1
    for (int i = int(blockIdx.x) - int(gridDim.x);; i += gridDim.x, turn ^= 1) {
      const bool is_done = i >= schedule.num_tiles;
      if (i < 0 || is_done || has_few_products()) output.store_or_rehearse(thread);
      if (is_done) break;
      const Share share = start_share(schedule, max(i, int(blockIdx.x)));
      TileScales<C>& scales = s.scales[warpgroup][turn];
      if (i >= 0) scales.start_loading(p, share.row, share.token, here(thread));
      make(share, scales, i < 0);
      if (i < 0) {
        wait_for_predecessor();
        if (p.out_scale && thread == 0) s.out_scale[warpgroup] = *p.out_scale;
        ptx::barrier_sync(output.barrier, kWarpgroupThreads);  // the scale is there
      }
    }
  }
};

#endif

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap out_map,
                const __grid_constant__ PackedLinearParams p, const __grid_constant__ GemmSchedule schedule,
                const __grid_constant__ RingShape ring, const int k_tiles) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t s_bytes[];
  auto& s = *reinterpret_cast<GemmSmem<C>*>(s_bytes);
  const int warp = uniform(threadIdx.x / kWarpSize);
  const bool is_producer = threadIdx.x == kConsumerWarps * kWarpSize;
  GemmProducer<C> producer{s, x_map, out_map, p, schedule, k_tiles, ring};
  if (is_producer) producer.init_barriers();
  __syncthreads();  // the barriers exist

  if (warp < kConsumerWarps) {
    ptx::take_registers<232>();
    const int warpgroup = warp / (kWarpgroupThreads / kWarpSize), thread = threadIdx.x % kWarpgroupThreads;
    GemmConsumer<C>{s,
                    p,
                    k_tiles,
                    warpgroup,
                    thread,
                    {s, warpgroup, thread, {ring}},
                    {p, out_map, s.staging[warpgroup], s.out_scale[warpgroup], kFirstWarpgroup + warpgroup}}
        .run(schedule);
  } else {
    ptx::leave_registers<40>();
    if (is_producer) producer.run();
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
  const CUtensorMap x_map = ptx::swizzled_rows_map(p.x, p.num_tokens, int64_t(p.num_cols) * kElementBytes,
                                                   p.x_stride * kElementBytes, C::kHalfTokens, kElementBytes);
  const PackedShape shape = packed_shape(p.num_rows, p.num_cols, kElementBytes);
  const GemmSchedule schedule =
      make_gemm_schedule(int(shape.num_blocks()), p.num_tokens, p.num_sms, C::kTokens);
  RingShape ring = !schedule.is_narrow() ? C::kRing
                   : schedule.cuts_rows  ? C::kRingOfHalfRows
                                         : C::kRingOfHalfTokens;
  ring.num_stages = std::min(ring.num_stages, schedule.max_stages);
  launch<kKernel>({.ctas = dim3(unsigned(schedule.num_ctas)),
                   .threads = kThreads,
                   .smem_bytes = int(sizeof(GemmSmem<C>))},
                  stream, x_map, out_map(p), p, schedule, ring, int(shape.k_tiles()));
}

template <class Element>
void launch_gemm(const PackedLinearParams& p, cudaStream_t stream) {
  static_assert(kMinTileTokens == 96 && kMaxTileTokens == 256 && kTileTokensStep == 32);
  dispatch<96, 128, 160, 192, 224, 256>("tile_tokens", gemm_tile_tokens(p.num_tokens), [&](auto tokens) {
    if (p.num_tokens <= kMaxRehearsedTokens)
      launch_gemm_of<GemmConfig<Element, tokens, true>>(p, stream);
    else
      launch_gemm_of<GemmConfig<Element, tokens, false>>(p, stream);
  });
}

}  // namespace
}  // namespace nf
