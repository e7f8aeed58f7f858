// SPDX-License-Identifier: Apache-2.0
// Which tile of queries comes when in prefill attention: shared by the kernel and by its test on the CPU
// (tests/cpp/test_prefill_schedule.cpp).
//
// A tile has 128 rows: all query heads of one KV head, their number padded to a power of two, of
// 128 / heads consecutive queries. Tiles start at multiples of that in the sequence, not in the chunk that is
// computed: so a query's tile, and every bit of its result, depends on its position alone, and a tile's
// queries end in one block of 128 keys.
//
// All tiles of all heads and sequences form a line of items, which the CTAs take one at a time. Long ones
// come first, or one that begins last would keep the others waiting: sequences by length, their tiles from
// the last to the first. But the heads whose keys and values fill the L2 together come one section after
// another.
#pragma once

namespace nf::prefill {

constexpr int kTileRows = 128;
constexpr int kBlockKeys = 128;
constexpr int kSectionBytes = 32 << 20;  // of keys and values: half of a Hopper GPU's L2

// log2 of the rows that a query takes in a tile.
constexpr int row_shift(int group) {
  int shift = 0;
  while (1 << shift < group) ++shift;
  return shift;
}

// The tiles of the queries at positions [begin, end): numbers first .. first + count - 1.
struct TileRange {
  int first, count;
};
constexpr TileRange tiles_of(int begin, int end, int shift) {
  const int queries_shift = 7 - shift;  // log2 of a tile's queries
  const int first = begin >> queries_shift;
  return {first, ((end - 1) >> queries_shift) + 1 - first};
}

// Do the tiles of sequence a come before those of sequence b?
constexpr bool precedes(int length_a, int a, int length_b, int b) {
  return length_a > length_b || (length_a == length_b && a < b);
}

// KV heads of a section; a token of one head has `token_bytes` of keys and values.
constexpr int section_heads(int length, int token_bytes, int num_kv_heads) {
  const int heads = kSectionBytes / token_bytes / length;
  return heads < 1 ? 1 : heads < num_kv_heads ? heads : num_kv_heads;
}

// Item `item` of a sequence: a tile, counted from its first one, of a KV head.
struct Place {
  int tile, kv_head;
};
constexpr Place place_of(int item, int num_tiles, int num_kv_heads, int section_heads) {
  const int section = item / (num_tiles * section_heads), first_head = section * section_heads;
  const int heads_left = num_kv_heads - first_head,
            heads = heads_left < section_heads ? heads_left : section_heads;
  const int rest = item - first_head * num_tiles;
  return {num_tiles - 1 - rest / heads, first_head + rest % heads};
}

}  // namespace nf::prefill
