// SPDX-License-Identifier: Apache-2.0
// Sizes, shared memory and barriers of prefill attention.
#pragma once

#include <type_traits>

#include "host/prefill_schedule.h"
#include "kernels/attention/prefill.h"
#include "kernels/common/device.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace nf::prefill {

constexpr int kPageTokens = 64;
constexpr int kBlockPages = kBlockKeys / kPageTokens;
constexpr int kSwizzleBytes = 128;  // of a row, in one chunk of a tile
constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupRows = 64;
constexpr int kWarpRows = 16;
constexpr int kConsumers = kTileRows / kWarpgroupRows;  // warpgroups
constexpr int kConsumerWarps = kConsumers * 4;

// Operands of the products: Scalar where the pages are, else halves (pages of e4m3 are widened) or e4m3
// (queries and weights are rounded).
template <class Scalar_, class CacheElement_, class Product_, int kHeadDim_>
struct Config {
  using Scalar = Scalar_;  // of q and out
  using CacheElement = CacheElement_;
  using Product = Product_;
  static constexpr bool kFp8 = sizeof(CacheElement) == 1;  // pages of e4m3?
  static constexpr bool kFp8Products = sizeof(Product) == 1;
  static constexpr bool kWidens = kFp8 && !kFp8Products;
  static constexpr int kHeadDim = kHeadDim_;                               // D
  static constexpr int kTokenBytes = 2 * kHeadDim * sizeof(CacheElement);  // of keys and values in a page
  static constexpr int kChunkBytes = 128 * kSwizzleBytes;
  static constexpr int kChunks = kHeadDim * 2 / kSwizzleBytes;  // of a tile of queries as they come
  static constexpr int kTileBytes = kChunks * kChunkBytes;
  static constexpr int kBlockChunks = kHeadDim * int(sizeof(Product)) / kSwizzleBytes;  // of keys or values
  static constexpr int kBlockBytes = kBlockChunks * kChunkBytes;
  static constexpr int kStages = kHeadDim == 64 ? 4 : kFp8Products ? 3 : 2;  // blocks of keys and of values
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  // One warp produces by the copy engine, four where pages have to be widened or transposed.
  static constexpr int kProducerWarps = kFp8 ? 4 : 1;
  // Of the 64512 that a CTA has. Consumers hold 64 x D results, 64 x 128 scores and as many weights of half
  // the size; with products of e4m3 weights of a quarter, and the product of a block.
  static constexpr int kProducerRegisters = kWidens ? 104 : 40, kConsumerRegisters = kWidens ? 200 : 232;

  static_assert(!kFp8Products || kHeadDim == 128);
};

// What the producer tells the consumers with each tile.
struct alignas(16) Tile {
  int num_blocks;  // of keys that its queries see; 0: no tile is left
  int position;    // of its first query in the sequence
  int token;       // row of q of its first query, which may lie before the sequence's new ones
  int begin, end;  // its queries that are new
  int kv_head;
  int seq;
  int kv_len;
};

struct alignas(16) Sequence {
  int seq;
  int token;  // row of q of its first new query
  int num_new;
  int kv_len;
};

// With products of e4m3: values as they come, a row a token, before they are transposed to a row a column of
// D, and the scales of the queries' rows.
template <class C>
struct Fp8Smem {
  alignas(1024) uint8_t values[2][C::kBlockBytes];
  alignas(8) uint64_t values_full[2];
  float q_scale[2][kTileRows];
};
struct Nothing {};

// A tile or block: chunks of 128 bytes of columns, each 128 swizzled rows. Queries have two places: the
// producer fills one while the other is in use, and the tile's result leaves through it.
template <class C>
struct Smem {
  alignas(1024) uint8_t q[2][C::kTileBytes];
  alignas(1024) uint8_t k[C::kStages][C::kBlockBytes];
  alignas(1024) uint8_t v[C::kStages][C::kBlockBytes];
  std::conditional_t<C::kFp8Products, Fp8Smem<C>, Nothing> fp8;
  Tile tile[2];
  alignas(8) uint64_t q_full[2], q_empty[2];
  alignas(8) uint64_t k_full[C::kStages], k_empty[C::kStages];
  alignas(8) uint64_t v_full[C::kStages], v_empty[C::kStages];
  Tile next;  // the producer's own
  // The line of items: sequences in order, what precedes each and, after the last, the total.
  int num_seqs;
  int first_item[kMaxPrefillSeqs + 1];
  Sequence sequence[kMaxPrefillSeqs];
  int length[kMaxPrefillSeqs];
};

// Named barriers, by number.
enum Barrier {
  kTurn = 1,                            // and the next: of each consumer warpgroup
  kWarpgroup = kTurn + kConsumers,      // the same
  kProducers = kWarpgroup + kConsumers  // among the producer's warps
};

// Of the 16 bytes `unit` of a row, in a chunk.
__device__ __forceinline__ uint32_t swizzled(int row, int unit) {
  return uint32_t(row * kSwizzleBytes + ((unit ^ (row & 7)) << 4));
}

// Steps through a ring of kSize places.
template <int kSize>
struct RingPosition {
  int place = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++place == kSize) place = 0, parity ^= 1;
  }
};

}  // namespace nf::prefill
