// SPDX-License-Identifier: Apache-2.0
// Which CTA multiplies what when there are many tokens.
//
// A CTA stays for the whole launch. It works on one tile at a time: a block of the packed weight (128 rows)
// times 32 to 256 tokens, or half of that, with all of K. The first of its two warpgroups multiplies the
// first half of a block, the second the second; or each multiplies the same half block by half of the tokens.
// So a result's bits do not depend on the GPU, nor on the number of tokens, once it is above kMaxFewTokens.
//
// Tiles are dealt out in order, i to CTA i % num_ctas. Full tiles come first, in groups of 8 columns of
// tokens; in a group two blocks by two, and for these column by column: the CTAs that run at the same time
// read few different weights and few different activations, and L2 serves the rest. Tiles 2i and 2i + 1 are
// neighbours in a column: their CTAs share a part of the GPU (gemm_kernel.cuh), to which L2 delivers at once
// what both read. Where the last round of full tiles would leave more than half of the CTAs idle, its tiles
// are cut into halves.
//
// Half a tile of a single column has half of the rows, so that each weight is read once: two CTAs that read
// the same ones, for half of the tokens each, have to keep step for the second to find them in L2. (Blocks
// and attention of 96, 128, 160, 192, 224 and 256 sequences take 0.43, 0.57, 0.43, 0.28, 0.37 and 0.25 ms
// less so, of 18 to 27, on an H100. Not so behind full tiles of more than 192 tokens, where it costs 0.05 to
// 0.5 ms.)
//
// With more than 192 tokens in a single column tiles of three quarters may end sooner: four CTAs share three
// blocks, so that each has one half of a block with all tokens and one with half of the tokens. (N = 10,240
// and 256 tokens: 107 CTAs instead of 80.)
#pragma once

#include <cstdint>

#include "host/linear_schedule.h"

namespace nf {

constexpr int kMinTileTokens = 96, kMaxTileTokens = 256, kTileTokensStep = 32;  // of more than kMaxFewTokens

// Of a full tile: the fewer tokens are multiplied in vain the better, but the wider a tile the less it reads
// for each product. What a tile takes beyond its products is put at 24 tokens. A half column of tiles reads
// all weights anew, which takes as long as a full one if there are few.
constexpr int gemm_tile_tokens(int num_tokens) {
  if (num_tokens <= kMaxFewTokens)
    return (num_tokens + kTileTokensStep - 1) / kTileTokensStep * kTileTokensStep;
  int best = 0;
  int64_t least = INT64_MAX;
  for (int tokens = kMaxTileTokens; tokens >= kMinTileTokens; tokens -= kTileTokensStep) {
    const int step = num_tokens > 4 * kMaxTileTokens ? tokens / 2 : tokens;
    const int64_t cost = (int64_t(num_tokens) + step - 1) / step * step * (tokens + 24) / tokens;
    if (cost < least) least = cost, best = tokens;
  }
  return best;
}

constexpr int kMaxReadBoundTokens = 192;  // up to which reading the weights bounds the time, not the products

struct GemmTile {
  int token, num_halves;  // the first, and how many times tile_tokens / 2
  // What a warpgroup multiplies.
  struct Part {
    int half_block;              // 64 rows of the weight; may lie beyond the last block
    int first_half, num_halves;  // of the tile's tokens
  } part[2];

  // Do both warpgroups multiply the same rows?
  constexpr bool shares_rows() const { return part[0].half_block == part[1].half_block; }
};

struct GemmSchedule {
  int num_ctas;  // of the launch
  int num_blocks;
  int num_columns;  // of tile_tokens
  int num_full;     // tiles of tile_tokens; the other num_blocks * num_columns - num_full are cut
  int num_tiles;    // all of them
  int tile_tokens;
  bool in_three_quarters;  // are all tiles such?
  bool cuts_rows;          // has half a tile half of the rows, or else half of the tokens?

  constexpr GemmTile tile(int i) const {
    if (in_three_quarters) {
      const int block = i / 4 * 3, turn = i % 4;
      if (turn < 2) return {0, 2, {{2 * (block + turn), 0, 2}, {2 * block + 1, turn, 1}}};
      return {0, 2, {{2 * (block + 2), turn - 2, 1}, {2 * (block + turn - 1) + 1, 0, 2}}};
    }
    constexpr int kGroup = 8;
    const int cut = i - num_full, num_cut = num_blocks * num_columns - num_full;
    if (cut >= 2 * num_cut)
      return of_block(cut - 2 * num_cut, num_columns * tile_tokens, 1);  // behind the last column
    const int full = cut < 0 ? i : num_full + cut / 2;
    const int group = full / (kGroup * num_blocks), in_group = full % (kGroup * num_blocks);
    const int left = num_columns - group * kGroup, width = left < kGroup ? left : kGroup;
    const int pair = in_group / 2;
    const int alone = in_group - num_blocks / 2 * 2 * width;  // of an odd number of blocks, the last
    const int token = (group * kGroup + (alone < 0 ? pair % width : alone)) * tile_tokens;
    const int block = alone < 0 ? pair / width * 2 + in_group % 2 : num_blocks - 1;
    if (cut < 0) return of_block(block, token, 2);
    if (!cuts_rows) return of_block(block, token + cut % 2 * (tile_tokens / 2), 1);
    const int half_block = 2 * block + cut % 2;
    return {token, 2, {{half_block, 0, 1}, {half_block, 1, 1}}};
  }

  // Has each tile half of the rows?
  constexpr bool is_narrow() const { return num_full == 0 && cuts_rows && !in_three_quarters; }

  // Until the last CTA ends, in quarters of a tile.
  constexpr int quarters() const {
    const auto share = [&](int tiles) { return (tiles + num_ctas - 1) / num_ctas; };
    return in_three_quarters ? 3 * share(num_tiles) : 2 * (share(num_full) + share(num_tiles));
  }

 private:
  static constexpr GemmTile of_block(int block, int token, int num_halves) {
    return {token, num_halves, {{2 * block, 0, num_halves}, {2 * block + 1, 0, num_halves}}};
  }
};

// `max_ctas`: how many run at once.
GemmSchedule make_gemm_schedule(int num_blocks, int num_tokens, int max_ctas, int tile_tokens);

}  // namespace nf
