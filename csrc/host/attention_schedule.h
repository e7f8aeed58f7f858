// SPDX-License-Identifier: Apache-2.0
// How decode attention is split: shared by the kernel and by its emulation on the CPU
// (tests/cpp/test_attention_schedule.cpp).
//
// A tile is a few queries of one sequence, all heads of the group: they see `pages` pages, and are computed
// once per KV head. All (tile, head) pairs one after another make a line of W pages, which num_ctas CTAs cut
// into equal parts. But the arithmetic must not depend on the cuts, or a sequence would get other bits in
// another batch. So the pages of a pair are first grouped to leaves, whose length depends on `pages` only; a
// leaf is always computed whole, by the CTA in whose part it starts; and leaves are merged along a fixed
// tree: a binary tree over up to 16 aligned leaves (a group), then the groups from left to right. A CTA
// merges what it has into aligned subtrees; where a pair is shared, each leaves its subtrees in memory, and
// the last CTA to arrive merges those along the same tree.
#pragma once

#include <cstdint>

namespace nf::attn {

constexpr int kPageSize = 64;   // tokens
constexpr int kGroupLevel = 4;  // a group has 2^4 leaves
constexpr int kMaxLeaves = 32;  // of a pair: one per lane of a warp
constexpr int kLongLeaf = 32;   // pages; longer leaves only where there would be too many

// Subtrees that one CTA can leave of a pair that it shares: at most 8 of the first pair of its part
// (leaves 1..30 are 1 + 2 + 4 + 8 + 8 + 4 + 2 + 1), and at most 5 of the last (leaves 0..30).
constexpr int kPartialsOfFirst = 8, kPartialsOfLast = 5;
constexpr int kPartialsPerCta = kPartialsOfFirst + kPartialsOfLast;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Leaves of a head's pages, unless they get too long or too short. 128 leaves in all heads together keep all
// SMs of a Hopper GPU busy with a single sequence.
constexpr int leaves_wanted(int num_kv_heads) {
  const int per_head = 128 / num_kv_heads;
  return per_head < 16 ? 16 : per_head > kMaxLeaves ? kMaxLeaves : per_head;
}

// Pages of a leaf. Long sequences get more leaves, for balance in mixed batches.
constexpr int leaf_pages(int pages, int wanted) {
  const int leaf = ceil_div(pages, wanted);
  if (leaf <= kLongLeaf) return leaf;
  const int shortest = ceil_div(pages, kMaxLeaves);
  return shortest > kLongLeaf ? shortest : kLongLeaf;
}

// a / b for positive a and b < 2^31: a GPU divides 64-bit numbers several times slower.
constexpr int64_t divide(int64_t a, int64_t b) {
  return a >> 32 == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

// First page of CTA `cta`'s part of the line: floor(cta * W / num_ctas).
constexpr int64_t part_begin(int cta, int64_t W, int num_ctas) { return divide(cta * W, num_ctas); }

// The CTA whose part holds page `at` of the line: the largest c with part_begin(c) <= at.
constexpr int owner_of(int64_t at, int64_t W, int num_ctas) {
  return int(divide((at + 1) * num_ctas - 1, W));
}

// What becomes of a subtree of 2^level leaves from `leaf` on: first it is merged with its left siblings on
// levels [level, merged_level), then stored on a stack until its right sibling comes, or emitted.
struct Push {
  int merged_level;
  bool emit;
};

// first_leaf: where the CTA starts within the pair; `whole`: it has all of the pair's leaves.
constexpr Push plan_push(int leaf, int level, int first_leaf, bool whole) {
  while (level < kGroupLevel && (leaf >> level & 1) && leaf - (1 << level) >= first_leaf)
    leaf -= 1 << level++;
  const bool lacks_sibling = level < kGroupLevel && (leaf >> level & 1);  // the left one is another CTA's
  return {level, !whole && (lacks_sibling || level == kGroupLevel)};
}

// Where in a CTA's partials its `ordinal`-th of a pair lies; the pair is its part's first unless it has leaf
// 0.
constexpr int partial_index(int first_leaf, int ordinal) {
  return (first_leaf > 0 ? 0 : kPartialsOfFirst) + ordinal;
}

}  // namespace nf::attn
