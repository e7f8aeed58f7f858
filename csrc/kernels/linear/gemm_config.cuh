// SPDX-License-Identifier: Apache-2.0
// What the roles of the GEMM's CTA (gemm_kernel.cuh) share: its sizes, its shared memory, and the steps
// through both.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "host/gemm_schedule.h"
#include "kernels/common/device.cuh"
#include "kernels/linear/tile_output.cuh"

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

// A CTA's tiles one after another, and where the plan of each is.
struct TileTurn {
  int count = 0;
  __device__ __forceinline__ int tile() const { return int(blockIdx.x) + count * int(gridDim.x); }
  __device__ __forceinline__ int index() const { return count & 1; }
  __device__ __forceinline__ uint32_t parity() const { return count >> 1 & 1; }
};

}  // namespace
}  // namespace nf
