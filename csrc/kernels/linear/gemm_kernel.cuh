// SPDX-License-Identifier: Apache-2.0
// The linear of many tokens, tensor-core bound: 2 T N K operations. Weight rows are wgmma's M, as in
// packed_linear_kernel.cuh, and the packed weights are the same.
//
// Grid: one CTA per SM, in clusters of two, which stay for the whole launch (gemm_schedule.h says what each
// computes). A cluster's tile is 256 rows x 256 tokens, one block of rows for each CTA, so that both read the
// same activations: each loads half of them, for both. In a CTA a producer thread fills the ring, two
// warpgroups multiply 64 rows x 256 tokens each. L2 gives 32 KB for each 128 x 256 x 128 e4m3 products.
#pragma once

#include "host/gemm_schedule.h"
#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/launch.h"
#include "kernels/linear/gemm_epilogue.cuh"
#include "kernels/linear/linear.h"
#include "kernels/ptx/bulk_copy.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/tensor_map.h"
#include "kernels/ptx/wgmma.cuh"

namespace nf {
namespace {

constexpr int kStages = 4;
// Of 128 e4m3 values, between two promotions. Errors of a result, as parts of the root of the sum of its
// squared products, by an emulation of the 14-bit sums: 1.3e-4 after 1 tile, 2.1e-4 after 2, 3.4e-4 after 4,
// for any K; without promotion 4.3e-3 at K = 28672. Rounding it to bf16 costs 1.1e-3. The worst results of the
// tests, bound 2e-3, were off by 1.3e-3 with 1 on an H100 and by 4.2e-3 with 4;
// cuBLASLt's full accumulation was off by 1.2e-3 at K = 576, its fast one by 5.3e-3.
constexpr int kPromoteTiles = 1;
constexpr int kConsumerWarps = 2 * kWarpgroupThreads / kWarpSize;
constexpr int kThreads = 3 * kWarpgroupThreads;  // of the last warpgroup one thread produces
constexpr int kClusterCtas = 2;
constexpr uint16_t kBothCtas = (1 << kClusterCtas) - 1;
constexpr int kBoxTokens = kHalfTileTokens / kClusterCtas;  // of a copy: what one CTA loads of half a tile
constexpr int kBoxBytes = kBoxTokens * kTileRowBytes;

enum NamedBarrier { kAll, kEpilogue };  // kEpilogue + i is warpgroup i's

struct GemmSmem {
  struct Stage {
    alignas(1024) uint8_t weight[2][kTileBytes];          // [warpgroup], 64 swizzled rows
    alignas(1024) uint8_t x[2][kClusterCtas][kBoxBytes];  // [half][CTA that loads it], swizzled rows
  } stage[kStages];
  Staging staging[2];    // [warpgroup]
  TileScales scales[2];  // [warpgroup]
  alignas(8) uint64_t full[kStages], empty[kStages];
};

struct GemmRing {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
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

__device__ __forceinline__ int first_tile() { return blockIdx.x / kClusterCtas; }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The producer: one thread of each CTA fills the rings of both.
template <class Element>
struct GemmProducer {
  GemmSmem& s;
  const CUtensorMap& x_map;
  const PackedLinearParams& p;
  const GemmSchedule& schedule;
  const int rank;
  const int k_tiles;

  __device__ __forceinline__ void init_barriers() {
    ptx::prefetch_tensor_map(&x_map);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&s.full[i], 1);
      ptx::mbarrier_init(&s.empty[i], kConsumerWarps * kClusterCtas);  // a stage is refilled by both CTAs
    }
    ptx::fence_mbarrier_init();
  }

  __device__ __forceinline__ void load_weight(int stage, const GemmTile& tile, int k, uint64_t policy) {
    // Where a lone last block has no partner, the partner reads it too, and stores nothing.
    const int block = min(tile.pair * kClusterCtas + rank, (p.num_rows - 1) / kBlockRows);
    const int64_t packed_tile = int64_t(block) * k_tiles + k;
    ptx::mbarrier_arrive_expect(&s.full[stage], kBlockTileBytes + tile.num_halves * kClusterCtas * kBoxBytes);
    ptx::bulk_load(s.stage[stage].weight, static_cast<const char*>(p.packed) + packed_tile * kBlockTileBytes,
                   kBlockTileBytes, &s.full[stage], policy);
  }
  __device__ __forceinline__ void load_x(int stage, const GemmTile& tile, int k) {
    for (int half = 0; half < tile.num_halves; ++half)
      ptx::tensor_load_multicast(
          s.stage[stage].x[half][rank], &x_map, k * (kTileRowBytes / int(sizeof(Element))),
          tile.token + half * kHalfTileTokens + rank * kBoxTokens, &s.full[stage], kBothCtas);
  }

  __device__ __forceinline__ void run() {
    const uint64_t policy =
        p.num_tokens > kTileTokens ? ptx::evict_normal_policy() : ptx::evict_first_policy();
    if (first_tile() >= schedule.num_tiles) return;
    GemmTile tile = schedule.tile(first_tile());
    const int num_early = min(kStages, k_tiles);  // weights depend on no other kernel
    for (int k = 0; k < num_early; ++k) load_weight(k, tile, k, policy);
    let_successor_start();
    wait_for_predecessor();  // x is its result
    for (int k = 0; k < num_early; ++k) load_x(k, tile, k);
    GemmRing ring;
    for (int k = 0; k < num_early; ++k) ring.advance();
    ring.parity ^= 1;  // the first wait is for the first release
    for (int i = first_tile(), k = num_early;;) {
      for (; k < k_tiles; ++k, ring.advance()) {
        ptx::mbarrier_wait(&s.empty[ring.stage], ring.parity);
        load_weight(ring.stage, tile, k, policy);
        load_x(ring.stage, tile, k);
      }
      i += gridDim.x / kClusterCtas;
      if (i >= schedule.num_tiles) break;
      tile = schedule.tile(i), k = 0;
    }
  }
};

using GemmAccumulators = float[2][kHalfRegs];  // [half]

// One warpgroup's products.
template <class Element>
struct Multiplier {
  GemmSmem& s;
  const int warpgroup;
  GemmRing ring;

  // The producers of both CTAs may refill a stage once all warps of both have read it.
  __device__ __forceinline__ void release(int stage) {
    const int lane = threadIdx.x % kWarpSize;
    if (lane < kClusterCtas) ptx::mbarrier_arrive_at(&s.empty[stage], lane);
  }

  template <int kHalves>
  __device__ __forceinline__ void multiply(GemmAccumulators& r_acc, int num_k_tiles) {
    if constexpr (sizeof(Element) == 1)
      multiply_promoting<kHalves>(r_acc, num_k_tiles);
    else
      multiply_in_place<kHalves>(r_acc, num_k_tiles);
  }

  // wgmma keeps only some 14 bits of an e4m3 sum: it is added to FP32 registers after every kPromoteTiles k
  // tiles. While one warpgroup adds, the other's products keep the tensor cores busy.
  template <int kHalves>
  __device__ __forceinline__ void multiply_promoting(GemmAccumulators& r_acc, int num_k_tiles) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < kHalfRegs; ++i) r_acc[half][i] = 0.0f;
    }
#pragma unroll 1
    for (; num_k_tiles >= kPromoteTiles; num_k_tiles -= kPromoteTiles)
      add_products<kHalves, kPromoteTiles>(r_acc);
#pragma unroll 1
    for (; num_k_tiles > 0; --num_k_tiles) add_products<kHalves, 1>(r_acc);
  }

  // r_acc += the products of the next kTiles k tiles.
  template <int kHalves, int kTiles>
  __device__ __forceinline__ void add_products(GemmAccumulators& r_acc) {
    constexpr Element kTag{};
    int stages[kTiles];
#pragma unroll
    for (int j = 0; j < kTiles; ++j, ring.advance()) {
      stages[j] = uniform(ring.stage);
      ptx::mbarrier_wait(&s.full[ring.stage], ring.parity);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float r_sum[kHalfRegs];
      ptx::wgmma_fence();
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint64_t weight = ptx::wgmma_descriptor(s.stage[stages[j]].weight[warpgroup]);
        const uint64_t x = ptx::wgmma_descriptor(s.stage[stages[j]].x[half]);
#pragma unroll
        for (int k = 0; k < kTileRowBytes / ptx::kWgmmaStepBytes; ++k)
          ptx::wgmma(kTag, r_sum, ptx::wgmma_advance(weight, k), ptx::wgmma_advance(x, k), j > 0 || k > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait();
      if (half == kHalves - 1) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) release(stages[j]);
      }
#pragma unroll
      for (int i = 0; i < kHalfRegs; ++i) {
        r_acc[half][i] += r_sum[i];
        // here, not between the next products, which would serialise them
        asm volatile("" : "+f"(r_acc[half][i]));
      }
    }
  }

  // The products of the stage at `ring`, not waited for.
  template <int kHalves>
  __device__ __forceinline__ void start_products(GemmAccumulators& r_acc, bool accumulate) {
    constexpr Element kTag{};
    const auto& stage = s.stage[uniform(ring.stage)];
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
                                             const GemmSchedule& schedule, int k_tiles, int rank, int warp) {
  const int warpgroup = warp / (kWarpgroupThreads / kWarpSize);
  Multiplier<Element> multiplier{s, warpgroup, {}};
  if (p.out_scale && threadIdx.x % kWarpgroupThreads == 0) s.scales[warpgroup].out = *p.out_scale;
  for (int i = first_tile(); i < schedule.num_tiles; i += gridDim.x / kClusterCtas) {
    const GemmTile tile = schedule.tile(i);
    const int halves = uniform(tile.num_halves);
    const int row = (tile.pair * kClusterCtas + rank) * kBlockRows + warpgroup * kTileRows;
    s.scales[warpgroup].start_loading(p, row, tile.token, here(threadIdx.x % kWarpgroupThreads));
    GemmAccumulators r_acc;
    if (halves == 2)
      multiplier.template multiply<2>(r_acc, k_tiles);
    else
      multiplier.template multiply<1>(r_acc, k_tiles);
    ptx::wait_for_copies<0>();  // of the scales
    const int thread = here(threadIdx.x % kWarpgroupThreads);
    HalfTile half{p, s.staging[warpgroup], s.scales[warpgroup], kEpilogue + warpgroup, row, tile.token, 0};
    half.store(r_acc[0], thread);
    if (halves == 2) {
      half.first = kHalfTileTokens;
      half.store(r_acc[1], thread);
    }
  }
}

#endif

template <class Element>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ PackedLinearParams p,
                const __grid_constant__ GemmSchedule schedule, const int k_tiles) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t s_bytes[];
  auto& s = *reinterpret_cast<GemmSmem*>(s_bytes);
  const int warp = uniform(threadIdx.x / kWarpSize), rank = ptx::cluster_rank();
  const bool is_producer = threadIdx.x == kConsumerWarps * kWarpSize;
  GemmProducer<Element> producer{s, x_map, p, schedule, rank, k_tiles};
  if (is_producer) producer.init_barriers();
  ptx::cluster_sync();  // the barriers of both rings exist

  if (warp < kConsumerWarps) {
    ptx::take_registers<232>();
    wait_for_predecessor();
    gemm_consume<Element>(s, p, schedule, k_tiles, rank, warp);
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
  const int num_clusters = p.num_sms / kClusterCtas;
  launch<kKernel>({.ctas = dim3(unsigned(num_clusters * kClusterCtas)),
                   .threads = kThreads,
                   .smem_bytes = int(sizeof(GemmSmem)),
                   .cluster = kClusterCtas},
                  stream, x_map, p, make_gemm_schedule(p.num_rows, p.num_tokens, num_clusters),
                  int(packed_shape(p.num_rows, p.num_cols, kElementBytes).k_tiles()));
}

}  // namespace
}  // namespace nf
