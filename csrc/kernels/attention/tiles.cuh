// SPDX-License-Identifier: Apache-2.0
// The line of pages (host/attention_schedule.h) on the device: its tiles, and where a page of it lies.
#pragma once

#include "host/attention_schedule.h"
#include "kernels/common/device.cuh"

namespace nf::attn {

// Some queries of one sequence that are computed together.
struct alignas(16) Tile {
  int start_page;       // pages of all tiles before
  int length;           // cached tokens that the last of its queries sees
  uint32_t token : 27;  // first query, a row of q
  uint32_t queries : 5;
  uint16_t seq;
  uint16_t leaf;  // pages of a leaf
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
};

// A page of the line.
struct Cursor {
  int tile, head, page, pages;  // `pages` of the tile

  __device__ __forceinline__ void advance(const Line& line) {
    if (++page < pages) return;
    page = 0;
    if (++head < line.num_kv_heads) return;
    head = 0;
    if (++tile < line.num_tiles) pages = line.pages(tile);
  }
};

__device__ __forceinline__ Cursor cursor_at(const Line& line, int at) {  // at < total
  int tile = 0;
  for (int count = line.num_tiles;
       count > 1;) {  // of [tile, tile + count), the last that starts at or before `at`
    const int half = count / 2;
    if (line.tiles[tile + half].start_page * line.num_kv_heads <= at) {
      tile += half;
      count -= half;
    } else {
      count = half;
    }
  }
  const int pages = line.pages(tile), offset = at - line.tiles[tile].start_page * line.num_kv_heads;
  return {tile, offset / pages, offset % pages, pages};
}

// The first leaf's start at or after page `at`.
__device__ __forceinline__ int next_leaf_start(const Line& line, int at) {
  if (at >= line.total()) return line.total();
  const Cursor c = cursor_at(line, at);
  const int leaf = line.tiles[c.tile].leaf;
  return at - c.page + min(ceil_div(c.page, leaf) * leaf, c.pages);
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
    for (int i = 0, at = num_tiles + sum - mine; i < mine && at < capacity; ++i, ++at) {
      const int begin = i * queries_per_tile, end = min(begin + queries_per_tile, queries);
      tiles[at] = {0, length - queries + end, uint32_t(first + begin), uint32_t(end - begin), uint16_t(seq),
                   0};
    }
    num_tiles += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  }
  num_tiles = min(num_tiles, capacity);
  __syncwarp();  // the tiles are written
  int start = 0;
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
