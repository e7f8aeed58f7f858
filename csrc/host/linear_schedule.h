// SPDX-License-Identifier: Apache-2.0
// Which CTAs multiply what over a packed weight (weight_layout.h).
//
// Two neighbouring CTAs work together: on a pair of blocks (256 rows of the weight), one block each, with the
// same tokens. Tokens are cut into columns of 256; a column of at most 128 costs half. A pair times a column
// is a tile; its k tiles, in order, are units.
//
// Tiles come in this order: groups of 8 full columns; in a group pair by pair, and for a pair column by
// column; then the last column if it is a half one. So the CTAs that run at the same time read few different
// weights and few different activations: L2 serves the rest.
//
// The first `num_whole` tiles are dealt out one by one. The units of the others form one sequence, which is
// cut into as many slices of equal cost as there are pairs of CTAs (stream-K): no SM idles in a last,
// incomplete wave. A slice is a run of pieces, each within one tile:
//
//   [tail of a tile] [whole tiles ...] [head of a tile]
//
// each of which may be absent; or it is one middle part of a single tile. The CTA that has the first k tile
// owns its rows of the tile. Any other piece is some slice's first: its CTA leaves the FP32 sums in its own
// slot of the workspace, and the owner adds the slots in the order of K. So the bits of a result do not
// depend on which CTA ran first; and up to 256 tokens, where nothing is dealt out whole, on (N, K, element
// size, SM count) alone: not on the number of tokens.
#pragma once

#include <cstdint>

namespace nf {

constexpr int kColumnTokens = 256;
constexpr int kHalfColumnTokens = 128;
constexpr int kMaxDecodeTokens = 64;  // up to here the kernel of few tokens, from here on the GEMM

struct UnitRange {
  int begin, end;  // units: unit / k_tiles is the tile, unit % k_tiles the k tile
};

struct Tile {
  int pair;    // blocks 2 pair, 2 pair + 1
  int column;  // tokens from kColumnTokens * column on
};

struct LinearSchedule {
  int num_pairs;
  int k_tiles;
  int num_full_columns;
  bool has_half_column;  // after a full one; a lone column counts as full
  int num_whole;         // tiles that are dealt out
  int num_slices;        // of the units of the other tiles

  constexpr int num_full_tiles() const { return num_pairs * num_full_columns; }
  constexpr int num_tiles() const { return num_full_tiles() + (has_half_column ? num_pairs : 0); }

  constexpr Tile tile(int i) const {
    if (i >= num_full_tiles()) return {i - num_full_tiles(), num_full_columns};
    constexpr int kGroup = 8;
    const int group = i / (kGroup * num_pairs), in_group = i % (kGroup * num_pairs);
    const int columns =
        num_full_columns - group * kGroup < kGroup ? num_full_columns - group * kGroup : kGroup;
    return {in_group / columns, group * kGroup + in_group % columns};
  }

  // The first unit of slice i, or the end of the last. Slices differ by one unit's cost at most.
  constexpr int slice_begin(int i) const {
    const int full_cost = has_half_column ? 2 : 1;  // of a unit
    const int full_units = (num_full_tiles() - num_whole) * k_tiles;
    const int half_units = (num_tiles() - num_full_tiles()) * k_tiles;
    const int cost = full_units * full_cost + half_units, longer = cost % num_slices;
    const int at = i * (cost / num_slices) + (i < longer ? i : longer);
    return num_whole * k_tiles +
           (at < full_units * full_cost ? at / full_cost : full_units + at - full_units * full_cost);
  }
  constexpr UnitRange slice(int i) const { return {slice_begin(i), slice_begin(i + 1)}; }
  bool operator==(const LinearSchedule&) const = default;
};

// A run of k tiles of one tile.
struct Piece {
  int tile, k_begin, k_end;
};

// The pieces of pair `worker` of CTAs, in order: those of its slice, then its whole tiles.
struct Pieces {
  const LinearSchedule& schedule;
  int num_workers;
  int unit, end;   // what is left of the slice
  int next_whole;  // tile

  constexpr Pieces(const LinearSchedule& schedule, int worker, int num_workers)
      : schedule(schedule), num_workers(num_workers), unit(0), end(0), next_whole(worker) {
    if (worker < schedule.num_slices) {
      unit = schedule.slice_begin(worker);
      end = schedule.slice_begin(worker + 1);
    }
  }
  constexpr bool next(Piece& piece) {
    if (unit < end) {
      const int tile = unit / schedule.k_tiles, first = tile * schedule.k_tiles;
      const int last = first + schedule.k_tiles < end ? first + schedule.k_tiles : end;
      piece = {tile, unit - first, last - first};
      unit = last;
      return true;
    }
    if (next_whole >= schedule.num_whole) return false;
    piece = {next_whole, 0, schedule.k_tiles};
    next_whole += num_workers;
    return true;
  }
};

// `num_workers`: pairs of CTAs that run at once.
LinearSchedule make_linear_schedule(int64_t num_rows, int64_t num_cols, int element_bytes, int num_tokens,
                                    int num_workers);

// The workspace of a launch: slots [CTA][2 warpgroups][tokens / 8][128 threads][4] float. A value is its own
// flag: before the first launch, and after each, all bits are set (a NaN that no sum is), which the owner
// takes for "not there yet".
int64_t linear_workspace_bytes(int num_tokens, int num_sms);

// The tokens of a column that the kernel for `num_tokens` computes: 8, 16, 32, 64 or 256.
int padded_tokens(int num_tokens);

}  // namespace nf
