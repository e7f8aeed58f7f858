// SPDX-License-Identifier: Apache-2.0
// How decode attention is split: shared by the kernel and by its emulation on the CPU
// (tests/cpp/test_attention_schedule.cpp).
//
// A tile is a few queries of one sequence, all heads of the group: they see `pages` pages, and are computed
// once per KV head. All (tile, head) pairs one after another make a line of W pages, which num_ctas CTAs cut
// into equal parts. But the arithmetic must not depend on the cuts, or a sequence would get other bits in
// another batch. So the pages of a pair are first grouped to leaves, whose length depends on `pages` only; a
// leaf is always computed whole, by the CTA in whose part it starts; and leaves are merged along a fixed
// binary tree over aligned leaves. A CTA merges what it has into aligned subtrees. Where CTAs share a pair,
// the one with leaf 0 owns it: the others leave their subtrees in memory, and the owner merges those along
// the same tree. It is the last pair of the owner's part but the first of everyone else's, so that in a large
// batch the owner finds all done.
#pragma once

#include <cstdint>

namespace nf::attn {

constexpr int kPageSize = 64;             // tokens
constexpr int kLevels = 5;                // of the tree
constexpr int kMaxLeaves = 1 << kLevels;  // of a pair: one per lane of a warp
constexpr int kPagesAtOnce = 2;           // that a CTA reads at a time
// A leaf has no fewer pages, but for a pair's last. On an H100 one sequence of 2,048 tokens in BF16 takes 6.8
// us, with 2 or 8 pages 9.0 us; 64 of 1,024 tokens in e4m3 take 53.6 us, with 2 or 8 pages 56.4 and 50.5 us.
constexpr int kShortLeaf = 2 * kPagesAtOnce;
constexpr int kLongLeaf = 32;  // longer ones only where there would be too many

// Subtrees that one CTA can leave: leaves 1..30 are 1 + 2 + 4 + 8 + 8 + 4 + 2 + 1.
constexpr int kPartialsPerCta = 8;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Leaves of a head's pages, unless they get too long or too short. 128 leaves in all heads together keep all
// SMs of a Hopper GPU busy with a single long sequence.
constexpr int leaves_wanted(int num_kv_heads) {
  const int per_head = 128 / num_kv_heads;
  return per_head < 16 ? 16 : per_head > kMaxLeaves ? kMaxLeaves : per_head;
}

// Pages of a leaf. Long sequences get more leaves, for balance in mixed batches.
constexpr int leaf_pages(int pages, int wanted) {
  if (pages <= kShortLeaf) return pages;
  const auto of = [pages](int leaves) {
    const int size = ceil_div(pages, leaves * kPagesAtOnce) * kPagesAtOnce;
    return size < kShortLeaf ? kShortLeaf : size;
  };
  if (of(wanted) <= kLongLeaf) return of(wanted);
  return of(kMaxLeaves) > kLongLeaf ? of(kMaxLeaves) : kLongLeaf;
}

// First page of CTA `cta`'s part of the line: floor(cta * W / num_ctas).
constexpr int64_t part_begin(int cta, int64_t W, int num_ctas) { return cta * W / num_ctas; }

// The CTA whose part holds page `at` of the line: the largest c with part_begin(c) <= at.
constexpr int owner_of(int64_t at, int64_t W, int num_ctas) { return int(((at + 1) * num_ctas - 1) / W); }

// What becomes of a subtree of 2^level leaves from `leaf` on: first it is merged with its left siblings on
// levels [level, merged_level), then stored on a stack until its right sibling comes, or left in memory if
// its left one is another CTA's.
struct Push {
  int merged_level;
  bool leaves;
};

// first_leaf: where the CTA starts within the pair.
constexpr Push plan_push(int leaf, int level, int first_leaf) {
  while ((leaf >> level & 1) && leaf - (1 << level) >= first_leaf) leaf -= 1 << level++;
  return {level, (leaf >> level & 1) != 0};
}

}  // namespace nf::attn
