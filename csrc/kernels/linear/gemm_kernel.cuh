// SPDX-License-Identifier: Apache-2.0
// The linear of many tokens, tensor-core bound: 2 T N K operations. Weight rows are wgmma's M, as in
// packed_linear_kernel.cuh, and the packed weights are the same.
//
// Grid: one CTA per SM, in clusters of two, which stay for the whole launch (linear_schedule.h says what each
// computes). A cluster's tile is 256 rows x 256 tokens, one block of rows for each CTA, so that both read the
// same activations: each loads half of them, for both. In a CTA a producer thread fills the ring, two
// warpgroups multiply 64 rows x 256 tokens each. L2 gives 32 KB for each 128 x 256 x 128 e4m3 products.
#pragma once

#include <string>

#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/launch.h"
#include "kernels/linear/gemm_epilogue.cuh"
#include "kernels/linear/linear.h"
#include "kernels/linear/stream_k.cuh"
#include "kernels/ptx/bulk_copy.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/tensor_map.h"
#include "kernels/ptx/wgmma.cuh"

namespace nf {
namespace {

constexpr int kStages = 4;
constexpr int kConsumerWarps = 2 * kWarpgroupThreads / kWarpSize;
constexpr int kThreads = 3 * kWarpgroupThreads;            // of the last warpgroup one thread produces
constexpr int kBoxTokens = kHalfColumnTokens / kPairCtas;  // of a copy: what one CTA loads of half a column
constexpr int kBoxBytes = kBoxTokens * kTileRowBytes;
constexpr uint16_t kBothCtas = (1 << kPairCtas) - 1;

enum NamedBarrier { kAll, kEpilogue };  // kEpilogue + i is warpgroup i's

struct GemmSmem {
  struct Stage {
    alignas(1024) uint8_t weight[2][kTileBytes];       // [warpgroup], 64 swizzled rows
    alignas(1024) uint8_t x[2][kPairCtas][kBoxBytes];  // [half column][CTA that loads it], swizzled rows
  } stage[kStages];
  Staging staging[2];  // [warpgroup]
  alignas(8) uint64_t full[kStages], empty[kStages];
};

struct GemmRing {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// The same value, known to the compiler to be so in all lanes: wgmma must not stand in a divergent path.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(kFullWarp, v, 0); }

__device__ __forceinline__ int num_halves(const PackedLinearParams& p, int column) {
  return p.num_tokens - column * kColumnTokens > kHalfColumnTokens ? 2 : 1;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The k tiles of all pieces of a cluster, one by one.
struct KTiles {
  Pieces pieces;
  Piece piece{};
  Tile tile{};
  int k = 0;
  bool valid = false;

  __device__ __forceinline__ explicit KTiles(const LinearSchedule& schedule)
      : pieces(schedule, blockIdx.x / kPairCtas, gridDim.x / kPairCtas) {
    next_piece();
  }
  __device__ __forceinline__ void next_piece() {
    valid = pieces.next(piece);
    if (valid) tile = pieces.schedule.tile(piece.tile), k = piece.k_begin;
  }
  __device__ __forceinline__ void advance() {
    if (++k == piece.k_end) next_piece();
  }
};

// The producer: one thread of each CTA fills the rings of both.
template <class Element>
struct GemmProducer {
  GemmSmem& s;
  const CUtensorMap& x_map;
  const PackedLinearParams& p;
  const LinearSchedule& schedule;
  const int rank;

  __device__ __forceinline__ void init_barriers() {
    ptx::prefetch_tensor_map(&x_map);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&s.full[i], 1);
      ptx::mbarrier_init(&s.empty[i], kConsumerWarps * kPairCtas);  // a stage is refilled by both CTAs
    }
    ptx::fence_mbarrier_init();
  }

  __device__ __forceinline__ void load_weight(int stage, const KTiles& at, uint64_t policy) {
    // Where a lone last block has no partner, the partner reads it too, and stores nothing.
    const int block = min(at.tile.pair * kPairCtas + rank, (p.num_rows - 1) / kBlockRows);
    const int64_t packed_tile = int64_t(block) * schedule.k_tiles + at.k;
    ptx::mbarrier_arrive_expect(&s.full[stage],
                                kBlockTileBytes + num_halves(p, at.tile.column) * kPairCtas * kBoxBytes);
    ptx::bulk_load(s.stage[stage].weight, static_cast<const char*>(p.packed) + packed_tile * kBlockTileBytes,
                   kBlockTileBytes, &s.full[stage], policy);
  }
  __device__ __forceinline__ void load_x(int stage, const KTiles& at) {
    for (int half = 0; half < num_halves(p, at.tile.column); ++half)
      ptx::tensor_load_multicast(
          s.stage[stage].x[half][rank], &x_map, at.k * (kTileRowBytes / int(sizeof(Element))),
          at.tile.column * kColumnTokens + half * kHalfColumnTokens + rank * kBoxTokens, &s.full[stage],
          kBothCtas);
  }

  __device__ __forceinline__ void run() {
    const uint64_t policy =
        p.num_tokens > kColumnTokens ? ptx::evict_normal_policy() : ptx::evict_first_policy();
    KTiles weight(schedule), x(schedule);
    for (int i = 0; i < kStages && weight.valid; ++i, weight.advance()) load_weight(i, weight, policy);
    let_successor_start();
    wait_for_predecessor();  // x is its result
    for (int i = 0; i < kStages && x.valid; ++i, x.advance()) load_x(i, x);
    for (GemmRing ring; x.valid; x.advance(), ring.advance()) {
      ptx::mbarrier_wait(&s.empty[ring.stage], ring.parity);
      load_weight(ring.stage, x, policy);
      load_x(ring.stage, x);
    }
  }
};

using GemmAccumulators = float[2][kHalfRegs];  // [half column]

// One warpgroup's products.
template <class Element>
struct Multiplier {
  GemmSmem& s;
  const int warpgroup;
  GemmRing ring;

  // The producers of both CTAs may refill a stage once all warps of both have read it.
  __device__ __forceinline__ void release(int stage) {
    const int lane = threadIdx.x % kWarpSize;
    if (lane < kPairCtas) ptx::mbarrier_arrive_at(&s.empty[stage], lane);
  }

  template <int kHalves>
  __device__ __forceinline__ void multiply(GemmAccumulators& r_acc, int num_k_tiles) {
    if constexpr (sizeof(Element) == 1)
      multiply_promoting<kHalves>(r_acc, num_k_tiles);
    else
      multiply_in_place<kHalves>(r_acc, num_k_tiles);
  }

  // wgmma keeps only some 14 bits of an e4m3 sum: it is added to FP32 registers after every k tile. While one
  // warpgroup adds, the other's products keep the tensor cores busy.
  template <int kHalves>
  __device__ __forceinline__ void multiply_promoting(GemmAccumulators& r_acc, int num_k_tiles) {
    constexpr Element kTag{};
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < kHalfRegs; ++i) r_acc[half][i] = 0.0f;
    }
#pragma unroll 1
    for (; num_k_tiles > 0; --num_k_tiles, ring.advance()) {
      const auto& stage = s.stage[ring.stage];
      const uint64_t weight = ptx::wgmma_descriptor(stage.weight[warpgroup]);
      ptx::mbarrier_wait(&s.full[ring.stage], ring.parity);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const uint64_t x = ptx::wgmma_descriptor(stage.x[half]);
        float r_tile[kHalfRegs];
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kTileRowBytes / ptx::kWgmmaStepBytes; ++k)
          ptx::wgmma(kTag, r_tile, ptx::wgmma_advance(weight, k), ptx::wgmma_advance(x, k), k > 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait();
        if (half == kHalves - 1) release(ring.stage);
#pragma unroll
        for (int i = 0; i < kHalfRegs; ++i) {
          r_acc[half][i] += r_tile[i];
          // here, not between the next products, which would serialise them
          asm volatile("" : "+f"(r_acc[half][i]));
        }
      }
    }
  }

  // The products of the stage at `ring`, not waited for.
  template <int kHalves>
  __device__ __forceinline__ void start_products(GemmAccumulators& r_acc, bool accumulate) {
    constexpr Element kTag{};
    const auto& stage = s.stage[ring.stage];
    const uint64_t weight = ptx::wgmma_descriptor(stage.weight[warpgroup]),
                   x = ptx::wgmma_descriptor(stage.x[0]);
    ptx::mbarrier_wait(&s.full[ring.stage], ring.parity);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileRowBytes / ptx::kWgmmaStepBytes; ++k) {
      const uint64_t a = ptx::wgmma_advance(weight, k), b = ptx::wgmma_advance(x, k);
      if constexpr (kHalves == 2)
        ptx::wgmma(kTag, r_acc[0], r_acc[1], a, b, accumulate || k > 0);
      else
        ptx::wgmma(kTag, r_acc[0], a, b, accumulate || k > 0);
    }
    ptx::wgmma_commit();
  }

  template <int kHalves>
  __device__ __forceinline__ void multiply_in_place(GemmAccumulators& r_acc, int num_k_tiles) {
    start_products<kHalves>(r_acc, false);
#pragma unroll 1
    for (int i = 1; i < num_k_tiles; ++i) {
      const int previous = ring.stage;
      ring.advance();
      start_products<kHalves>(r_acc, true);
      ptx::wgmma_wait<1>();
      release(previous);
    }
    ptx::wgmma_wait();
    release(ring.stage);
    ring.advance();
  }
};

template <class Element>
__device__ __forceinline__ void gemm_consume(GemmSmem& s, const PackedLinearParams& p,
                                             const LinearSchedule& schedule, int rank, int warp) {
  constexpr int kWarps = kWarpgroupThreads / kWarpSize;
  const int warpgroup = warp / kWarps, thread = threadIdx.x % kWarpgroupThreads, lane = thread % kWarpSize;
  const int cluster = blockIdx.x / kPairCtas;
  Multiplier<Element> multiplier{s, warpgroup, {}};
  Pieces pieces(schedule, cluster, gridDim.x / kPairCtas);
  const auto slot = [&](int cta, int half) {
    return slot_of(p.workspace, cta, warpgroup, kColumnTokens, thread) +
           half * (kHalfRegs / 4) * kWarpgroupThreads;
  };
  for (Piece piece; pieces.next(piece);) {
    const Tile tile = schedule.tile(piece.tile);
    const int halves = uniform(num_halves(p, tile.column)),
              num_k_tiles = uniform(piece.k_end - piece.k_begin);
    GemmAccumulators r_acc;
    if (halves == 2)
      multiplier.template multiply<2>(r_acc, num_k_tiles);
    else
      multiplier.template multiply<1>(r_acc, num_k_tiles);
    const auto finish_half = [&](auto half) {
      if (piece.k_begin > 0) {
        publish(r_acc[half], slot(blockIdx.x, half));
        return;
      }
      if (piece.k_end < schedule.k_tiles)
        for_later_pieces(schedule, cluster, piece.tile, rank,
                         [&](int cta) { add_published(r_acc[half], slot(cta, half)); });
      const HalfTile share{.p = p,
                           .staging = s.staging[warpgroup],
                           .barrier = kEpilogue + warpgroup,
                           .row = (tile.pair * kPairCtas + rank) * kBlockRows + warpgroup * kTileRows,
                           .token = tile.column * kColumnTokens + half * kHalfColumnTokens};
      share.store(r_acc[half], warp % kWarps, lane);
    };
    finish_half(std::integral_constant<int, 0>{});
    if (halves == 2) finish_half(std::integral_constant<int, 1>{});
  }
}

#endif

template <class Element>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ PackedLinearParams p,
                const __grid_constant__ LinearSchedule schedule) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t s_bytes[];
  auto& s = *reinterpret_cast<GemmSmem*>(s_bytes);
  const int warp = uniform(threadIdx.x / kWarpSize);
  const int rank = ptx::cluster_rank();
  const bool is_producer = threadIdx.x == kConsumerWarps * kWarpSize;
  GemmProducer<Element> producer{s, x_map, p, schedule, rank};
  if (is_producer) producer.init_barriers();
  ptx::cluster_sync();  // the barriers of both rings exist

  if (warp < kConsumerWarps) {
    ptx::take_registers<232>();
    wait_for_predecessor();
    gemm_consume<Element>(s, p, schedule, rank, warp);
  } else {
    ptx::leave_registers<40>();
    if (is_producer) producer.run();
  }
  ptx::cluster_sync();  // the other CTA writes to our shared memory no more
#else
  __trap();
#endif
}

template <class Element>
void launch_gemm(const PackedLinearParams& p, cudaStream_t stream) {
  static_assert(sizeof(GemmSmem) <= 227 * 1024);
  constexpr auto kKernel = gemm_kernel<Element>;
  NF_CHECK(can_overlap<kKernel>(), "a GPU or a build without sm_90a");
  constexpr int kElementBytes = int(sizeof(Element));
  const CUtensorMap x_map = ptx::swizzled_rows_map(p.x, p.num_tokens, int64_t(p.num_cols) * kElementBytes,
                                                   p.x_stride * kElementBytes, kBoxTokens, kElementBytes);
  const int num_clusters = p.num_sms / kPairCtas;
  const LinearSchedule schedule =
      make_linear_schedule(p.num_rows, p.num_cols, kElementBytes, p.num_tokens, num_clusters);
  launch<kKernel>({.ctas = dim3(unsigned(num_clusters * kPairCtas)),
                   .threads = kThreads,
                   .smem_bytes = int(sizeof(GemmSmem)),
                   .cluster = kPairCtas},
                  stream, x_map, p, schedule);
}

}  // namespace
}  // namespace nf
