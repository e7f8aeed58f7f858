// SPDX-License-Identifier: Apache-2.0
// The packed weight format, version 1. Plain arithmetic: kernels, tests and Python share it.
//
// A weight [N, K] of 1-byte (e4m3) or 2-byte (bf16) elements, N and K multiples of 16, becomes a sequence of
// 8 KB tiles, each the exact shared-memory image that wgmma reads (K-major, 128-byte swizzle), in the order
// in which a CTA streams them:
//
//   packed [num_blocks][k_tiles][2][64 rows][8 chunks][16 bytes]
//
//   num_blocks  ceil(N / 128)
//   k_tiles     ceil(K bytes / 128)
//   block       128 consecutive output rows: two tiles, one for each of a CTA's two warpgroups
//   k tile      128 bytes of K: 128 e4m3 or 64 bf16 values; K is innermost among the tiles of a block
//   chunk       16 bytes of K; chunk c of a row lies at position c ^ (row % 8): the eight rows of a core
//               matrix then fall in eight different bank groups
//
// Rows from N and values from K on are zero. So the size is num_blocks * k_tiles * 16 KB, and one (block, k
// tile) is one 16 KB bulk copy from an address that is a multiple of 16 KB within the weight.
//
// A gate_up weight [2F, K] (rows: gate, then up) is packed with its rows interleaved by eights: packed row 16
// i + j is gate row 8 i + j for j < 8 and up row 8 i + j - 8 otherwise, so that one thread's wgmma
// accumulators hold both factors of a SwiGLU.
#pragma once

#include <cstdint>

namespace nf {

constexpr int kTileRows = 64;       // the M of wgmma
constexpr int kTileRowBytes = 128;  // the widest swizzle
constexpr int kChunkBytes = 16;     // what the swizzle moves as one
constexpr int kTileBytes = kTileRows * kTileRowBytes;
constexpr int kBlockRows = 2 * kTileRows;
constexpr int kBlockTileBytes = 2 * kTileBytes;  // one stage of the ring

struct PackedShape {
  int64_t num_rows;   // N
  int64_t row_bytes;  // K times the element size

  constexpr int64_t num_blocks() const { return (num_rows + kBlockRows - 1) / kBlockRows; }
  constexpr int64_t k_tiles() const { return (row_bytes + kTileRowBytes - 1) / kTileRowBytes; }
  constexpr int64_t packed_bytes() const { return num_blocks() * k_tiles() * kBlockTileBytes; }

  // Of the 16 KB that hold one k tile of one block.
  constexpr int64_t tile_offset(int64_t block, int64_t k_tile) const {
    return (block * k_tiles() + k_tile) * kBlockTileBytes;
  }
  // Of byte `k_byte` of row `row` of the packed order.
  constexpr int64_t offset(int64_t row, int64_t k_byte) const {
    const int64_t in_row = k_byte % kTileRowBytes;
    const int64_t chunk = in_row / kChunkBytes ^ row % 8;
    return tile_offset(row / kBlockRows, k_byte / kTileRowBytes) + row % kBlockRows * kTileRowBytes +
           chunk * kChunkBytes + in_row % kChunkBytes;
  }
};

// The row of a gate_up weight [2F, K] that is packed at `packed_row`.
constexpr int64_t gate_up_row(int64_t packed_row, int64_t num_rows) {
  const int64_t in_gate = packed_row / 16 * 8 + packed_row % 8;
  return packed_row % 16 < 8 ? in_gate : num_rows / 2 + in_gate;
}

// Where wgmma leaves the accumulator of a 64-row tile: register r (of tokens / 2) of thread t of the
// warpgroup.
constexpr int fragment_row(int thread, int reg) {
  return thread / 32 * 16 + thread % 32 / 4 + (reg / 2 % 2) * 8;
}
constexpr int fragment_token(int thread, int reg) { return reg / 4 * 8 + thread % 4 * 2 + reg % 2; }

// Throws unless the shape can be packed. `element_bytes` is 1 or 2.
PackedShape packed_shape(int64_t num_rows, int64_t num_cols, int element_bytes);

}  // namespace nf
