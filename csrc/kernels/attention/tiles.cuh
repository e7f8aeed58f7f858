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

// Where a leaf starts: the page of the line, and its tile, which at the end is num_tiles.
struct LeafStart {
  int at, tile;
};

// The leaf that starts there, which is not the end.
__device__ __forceinline__ Leaf leaf_at(const Line& line, LeafStart start) {
  const auto [at, tile] = start;
  const int pages = line.pages(tile);
  const int offset = at - line.pair_begin(tile, 0), head = offset / pages, first = offset - head * pages;
  return {tile, head, first, min(first + line.tiles[tile].leaf, pages), pages};
}

// The first leaf's start at or after page `at`.
__device__ __forceinline__ LeafStart next_leaf_start(const Line& line, int at) {
  if (at >= line.total()) return {line.total(), line.num_tiles};
  const int tile = line.tile_at(at), pages = line.pages(tile), leaf = line.tiles[tile].leaf;
  const int page = (at - line.pair_begin(tile, 0)) % pages;
  const int start = at - page + min(ceil_div(page, leaf) * leaf, pages);
  return {start, start < line.pair_begin(tile + 1, 0) ? tile : tile + 1};
}

// What each warp's threads have, in this turn and in the one before.
template <int kWarps>
struct TileSums {
  alignas(16) int2 of_warp[2][kWarps];  // tiles, pages
};

// By all threads: the tiles of all sequences with at most `most_queries` queries, of up to
// `queries_per_tile`. Returns their number. They are complete after the next barrier.
template <int kWarps>
__device__ __forceinline__ int build_tiles(TileSums<kWarps>& sums, Tile* tiles, int capacity,
                                           const int64_t* q_start, const int64_t* kv_len, int num_seqs,
                                           int most_queries, int queries_per_tile, int wanted) {
  constexpr int kThreads = kWarps * kWarpSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int num_tiles = 0, num_pages = 0;
  int first[2], end[2], length[2];  // loads of two turns are under way at once
#pragma unroll 1
  for (int turn = 0, base = 0; base < num_seqs; ++turn, base += kThreads) {
    const int seq = base + int(threadIdx.x);
    if (turn % 2 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int from = min(seq + i * kThreads, num_seqs - 1);
        first[i] = int(q_start[from]), end[i] = int(q_start[from + 1]), length[i] = int(kv_len[from]);
      }
    } else {
      first[0] = first[1], end[0] = end[1], length[0] = length[1];
    }
    int queries = seq < num_seqs ? end[0] - first[0] : 0;
    if (queries > most_queries) queries = 0;
    const auto end_of = [&](int i) { return min((i + 1) * queries_per_tile, queries); };
    // A tile that sees nothing gets one page, all masked, so that its zeros are written.
    const auto pages_of = [&](int i) { return max(1, ceil_div(length[0] - queries + end_of(i), kPageSize)); };
    const int mine = queries <= 1 ? queries : ceil_div(queries, queries_per_tile);
    int pages = 0;
#pragma unroll 1
    for (int i = 0; i < mine; ++i) pages += pages_of(i);
    int at = mine, start = pages;  // the sums up to this thread's
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int tiles_up = __shfl_up_sync(kFullWarp, at, step),
                pages_up = __shfl_up_sync(kFullWarp, start, step);
      if (lane >= step) at += tiles_up, start += pages_up;
    }
    if (lane == kWarpSize - 1) sums.of_warp[turn % 2][warp] = {at, start};
    __syncthreads();  // the sums are written
    at += num_tiles - mine, start += num_pages - pages;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int2 sum = sums.of_warp[turn % 2][w];
      num_tiles += sum.x, num_pages += sum.y;
      if (w < warp) at += sum.x, start += sum.y;
    }
#pragma unroll 1
    for (int i = 0; i < mine && at <= capacity; ++i, ++at) {  // up to the one more, for its start_page
      const int begin = i * queries_per_tile, tile_pages = pages_of(i);
      tiles[at] = {.start_page = start,
                   .length = length[0] - queries + end_of(i),
                   .token = uint32_t(first[0] + begin),
                   .queries = uint32_t(end_of(i) - begin),
                   .before = uint32_t(min(begin, kManyBefore)),
                   .seq = uint16_t(seq),
                   .leaf = uint16_t(leaf_pages(tile_pages, wanted))};
      start += tile_pages;
    }
  }
  if (threadIdx.x == 0 && num_tiles <= capacity) tiles[num_tiles].start_page = num_pages;
  return min(num_tiles, capacity);
}

}  // namespace nf::attn
