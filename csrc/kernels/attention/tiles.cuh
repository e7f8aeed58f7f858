// SPDX-License-Identifier: Apache-2.0
// The line of pages (host/attention_schedule.h) on the device: its tiles, and where a leaf of it lies.
#pragma once

#include "host/attention_schedule.h"
#include "kernels/common/device.cuh"

namespace nf::attn {

constexpr int kMaxTokens = 1 << 20;  // of a launch
constexpr int kManyBefore = 127;     // of a prompt

// Some queries of one sequence that are computed together.
struct alignas(16) Tile {
  int start_page;        // pages of all tiles before
  int length;            // cached tokens that the last of its queries sees
  uint32_t token : 20;   // first query, a row of q
  uint32_t queries : 5;  // 1..16
  uint32_t before : 7;   // new tokens of the sequence before these; kManyBefore means "as many or more"
  uint16_t seq;
  uint16_t leaf;  // pages of a leaf

  // Cached tokens that earlier steps have written, at least.
  __device__ __forceinline__ int num_old() const {
    return before < kManyBefore ? length - int(queries) - int(before) : 0;
  }
  // The row of q, k and v of the token at `position`, which is one of the new ones.
  __device__ __forceinline__ int row_of(int position) const {
    return int(token) + int(queries) - length + position;
  }
};

struct Line {
  const Tile* tiles;  // in shared memory; one more than num_tiles, whose start_page is the total
  int num_tiles;
  int num_kv_heads;

  __device__ __forceinline__ int pages(int tile) const {
    return tiles[tile + 1].start_page - tiles[tile].start_page;
  }
  __device__ __forceinline__ int total() const { return tiles[num_tiles].start_page * num_kv_heads; }
  __device__ __forceinline__ int pair_begin(int tile, int head) const {
    return tiles[tile].start_page * num_kv_heads + head * pages(tile);
  }
  // The last tile that starts at or before page `at`, which is less than total().
  __device__ __forceinline__ int tile_at(int at) const {
    int tile = 0;
    for (int count = num_tiles; count > 1;) {  // it is in [tile, tile + count)
      const int half = count / 2;
      if (tiles[tile + half].start_page * num_kv_heads <= at) {
        tile += half;
        count -= half;
      } else {
        count = half;
      }
    }
    return tile;
  }
};

// A leaf of the line: pages [first, end) of a tile and head.
struct Leaf {
  int tile, head, first, end;
  int pages;  // of the tile

  __device__ __forceinline__ int size() const { return end - first; }
  __device__ __forceinline__ bool ends_pair() const { return end == pages; }

  // To the next leaf, which exists.
  __device__ __forceinline__ void advance(const Line& line) {
    first = end;
    if (first == pages) {
      first = 0;
      if (++head == line.num_kv_heads) {
        head = 0;
        pages = line.pages(++tile);
      }
    }
    end = min(first + line.tiles[tile].leaf, pages);
  }
};

// The leaf that starts at page `at` of the line, which is less than total().
__device__ __forceinline__ Leaf leaf_at(const Line& line, int at) {
  const int tile = line.tile_at(at), pages = line.pages(tile);
  const int offset = at - line.pair_begin(tile, 0), head = offset / pages, first = offset - head * pages;
  return {tile, head, first, min(first + line.tiles[tile].leaf, pages), pages};
}

// The first leaf's start at or after page `at`.
__device__ __forceinline__ int next_leaf_start(const Line& line, int at) {
  if (at >= line.total()) return line.total();
  const int tile = line.tile_at(at), pages = line.pages(tile), leaf = line.tiles[tile].leaf;
  const int page = (at - line.pair_begin(tile, 0)) % pages;
  return at - page + min(ceil_div(page, leaf) * leaf, pages);
}

// By one warp: the tiles of all sequences with at most `most_queries` queries, of up to `queries_per_tile`.
// Returns their number.
__device__ __forceinline__ int build_tiles(Tile* tiles, int capacity, const int64_t* q_start,
                                           const int64_t* kv_len, int num_seqs, int most_queries,
                                           int queries_per_tile, int wanted) {
  const int lane = threadIdx.x % kWarpSize;
  const auto inclusive_sum = [&](int v) {
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int up = __shfl_up_sync(kFullWarp, v, step);
      if (lane >= step) v += up;
    }
    return v;
  };
  int num_tiles = 0;
#pragma unroll 1
  for (int base = 0; base < num_seqs; base += kWarpSize) {
    const int seq = base + lane;
    int first = 0, queries = 0, length = 0;
    if (seq < num_seqs) {
      first = int(q_start[seq]);
      queries = int(q_start[seq + 1]) - first;
      length = int(kv_len[seq]);
      if (queries > most_queries) queries = 0;
    }
    const int mine = queries == 1 ? 1 : ceil_div(queries, queries_per_tile), sum = inclusive_sum(mine);
#pragma unroll 1
    for (int i = 0, at = num_tiles + sum - mine; i < mine && at < capacity; ++i, ++at) {
      const int begin = i * queries_per_tile, end = min(begin + queries_per_tile, queries);
      tiles[at] = {.start_page = 0,
                   .length = length - queries + end,
                   .token = uint32_t(first + begin),
                   .queries = uint32_t(end - begin),
                   .before = uint32_t(min(begin, kManyBefore)),
                   .seq = uint16_t(seq),
                   .leaf = 0};
    }
    num_tiles += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  }
  num_tiles = min(num_tiles, capacity);
  __syncwarp();  // the tiles are written
  int start = 0;
#pragma unroll 1
  for (int base = 0; base < num_tiles; base += kWarpSize) {
    const int tile = base + lane;
    // A tile that sees nothing gets one page, all masked, so that its zeros are written.
    const int pages = tile < num_tiles ? max(1, ceil_div(tiles[tile].length, kPageSize)) : 0;
    const int sum = inclusive_sum(pages);
    if (tile < num_tiles) {
      tiles[tile].start_page = start + sum - pages;
      tiles[tile].leaf = uint16_t(leaf_pages(pages, wanted));
    }
    start += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  }
  if (lane == 0) tiles[num_tiles].start_page = start;
  return num_tiles;
}

}  // namespace nf::attn
