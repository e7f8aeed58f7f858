// SPDX-License-Identifier: Apache-2.0
// The split of decode attention, emulated: every CTA walks its part of the line of pages, merges and leaves
// subtrees as the kernel does, and the owner of a shared pair merges what it finds, in both of its ways. A
// leaf's value is a hash of the pages in it and merging hashes two values, so that equal results mean equal
// trees: the same with 1 and with 528 CTAs, alone and in a batch.
#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <vector>

#include "host/attention_schedule.h"
#include "testing.h"

namespace {

using namespace nf::attn;
using Hash = uint64_t;

Hash merge(Hash left, Hash right) { return (left * 0x9E3779B97F4A7C15u ^ right) * 0xBF58476D1CE4E5B9u + 1; }

struct Emulation {
  std::vector<int> pages;  // of each tile
  int num_kv_heads;
  int num_ctas;
  int batch_level;  // of merging partials: 2^batch_level leaves at a time; 0: one by one, as with many pairs

  struct Stack {
    Hash value[kLevels];
    uint32_t pending = 0;

    void put(int level, Hash v) {
      EXPECT_EQ(level < kLevels, true);
      EXPECT_EQ(pending >> level & 1, 0u);
      value[level] = v;
      pending |= 1u << level;
    }
    Hash take(int level) {
      EXPECT_EQ(pending >> level & 1, 1u);
      pending &= ~(1u << level);
      return value[level];
    }
    // v, a subtree of 2^level leaves, is the pair's last.
    Hash merge_all(int level, Hash v) {
      for (int l = level; l < kLevels; ++l)
        if (pending >> l & 1) v = merge(take(l), v);
      EXPECT_EQ(pending, 0u);
      return v;
    }
  };
  Stack kept;  // by the owner of a shared pair, if it takes the others' subtrees one by one
  // (CTA, index): in memory, of a CTA's first pair; and in an owner's ring, of its last.
  std::map<std::pair<int, int>, Hash> partials, own;
  std::vector<Hash> results;        // of each pair
  std::vector<int64_t> pages_done;  // of each CTA

  // All that is on the stack.
  void leave(Stack* stack, int cta, bool is_owner, int* num_left) {
    for (int level = kLevels - 1; level >= 0; --level) {
      if (!(stack->pending >> level & 1)) continue;
      EXPECT_EQ(*num_left < (is_owner ? kLevels : kPartialsPerCta), true);
      auto& to = is_owner ? own : partials;
      EXPECT_EQ(to.emplace(std::pair(cta, (*num_left)++), stack->take(level)).second, true);
    }
  }

  void run() {
    int64_t W = 0;
    for (int n : pages) W += int64_t(n) * num_kv_heads;
    pages_done.assign(num_ctas, 0);
    int64_t begin = 0;
    std::vector<std::function<void()>> collections;  // after all that CTAs leave, as late as can be
    for (size_t tile = 0; tile < pages.size(); ++tile) {
      const int leaf_size = leaf_pages(pages[tile], leaves_wanted(num_kv_heads)),
                num_leaves = ceil_div(pages[tile], leaf_size);
      EXPECT_EQ(num_leaves <= kMaxLeaves, true);
      for (int head = 0; head < num_kv_heads; ++head, begin += pages[tile])
        if (const auto result = run_pair(int(tile), begin, W, leaf_size, num_leaves)) {
          results.push_back(*result);
        } else {
          collections.push_back([=, this, pair = results.size(), stack = kept] {
            const auto cta_of = [&](int leaf) {
              return owner_of(begin + int64_t(leaf) * leaf_size, W, num_ctas);
            };
            results[pair] =
                batch_level == 0 ? take_all(stack, cta_of, num_leaves) : collect(cta_of, num_leaves);
          });
          results.push_back(0);
        }
    }
    for (const auto& collect_one : collections) collect_one();
  }

  // Nothing where CTAs share the pair.
  std::optional<Hash> run_pair(int tile, int64_t begin, int64_t W, int leaf_size, int num_leaves) {
    const auto cta_of = [&](int leaf) { return owner_of(begin + int64_t(leaf) * leaf_size, W, num_ctas); };
    const auto value_of = [&](int leaf) { return Hash(tile) << 40 | Hash(leaf) << 20 | Hash(leaf_size); };
    for (int leaf = 0; leaf < num_leaves; ++leaf) {
      const int64_t at = begin + int64_t(leaf) * leaf_size;
      const int cta = cta_of(leaf);
      EXPECT_EQ(part_begin(cta, W, num_ctas) <= at && at < part_begin(cta + 1, W, num_ctas), true);
      pages_done[cta] += std::min(leaf_size, pages[tile] - leaf * leaf_size);
    }
    for (int first = 0; first < num_leaves;) {  // the CTAs that share the pair, one after another
      const int cta = cta_of(first);
      int last = first;
      while (last + 1 < num_leaves && cta_of(last + 1) == cta) ++last;
      Stack stack;
      int num_left = 0;
      for (int leaf = first; leaf <= last; ++leaf) {  // as Pair::push of the kernel
        Hash value = value_of(leaf);
        const Push plan = plan_push(leaf, 0, first);
        for (int l = 0; l < plan.merged_level; ++l) value = merge(stack.take(l), value);
        if (leaf + 1 == num_leaves && first == 0) return stack.merge_all(0, value);
        if (plan.leaves) EXPECT_EQ(stack.pending, 0u);
        stack.put(plan.merged_level, value);
        if (plan.leaves) leave(&stack, cta, first == 0, &num_left);
      }
      if (first == 0 && batch_level == 0)
        kept = stack;
      else
        leave(&stack, cta, first == 0, &num_left);
      first = last + 1;
    }
    return std::nullopt;
  }

  // What a lane of the owner's warp finds out about its leaf (Plan).
  template <class F>
  int level_of(F&& cta_of, int num_leaves, int leaf) const {
    int level = 0;
    for (int l = 1; l <= kLevels; ++l) {
      const int low = leaf >> l << l, high = low + (1 << l) - 1;
      if (high < num_leaves && cta_of(low) == cta_of(high)) level = l;
    }
    return level;
  }
  template <class F>
  bool is_start(F&& cta_of, int num_leaves, int leaf) const {
    const int level = level_of(cta_of, num_leaves, leaf);
    return leaf >> level << level == leaf;
  }
  template <class F>
  Hash subtree_of(F&& cta_of, int num_leaves, int leaf) {
    int first = leaf, ordinal = 0;
    while (first > 0 && cta_of(first - 1) == cta_of(leaf)) ordinal += is_start(cta_of, num_leaves, --first);
    auto& from = cta_of(leaf) == cta_of(0) ? own : partials;
    const auto found = from.find({cta_of(leaf), ordinal});
    EXPECT_EQ(found != from.end(), true);
    const Hash value = found->second;
    from.erase(found);
    return value;
  }

  // The owner, as Pair::take: the others' subtrees come onto its stack.
  template <class F>
  Hash take_all(Stack stack, F&& cta_of, int num_leaves) {
    std::vector<int> others;
    for (int leaf = 0; leaf < num_leaves; ++leaf)
      if (cta_of(leaf) != cta_of(0) && is_start(cta_of, num_leaves, leaf)) others.push_back(leaf);
    for (const int leaf : others) {
      Hash value = subtree_of(cta_of, num_leaves, leaf);
      const int level = level_of(cta_of, num_leaves, leaf);
      if (leaf == others.back()) return stack.merge_all(level, value);
      const Push plan = plan_push(leaf, level, 0);
      for (int l = level; l < plan.merged_level; ++l) value = merge(stack.take(l), value);
      stack.put(plan.merged_level, value);
    }
    throw std::runtime_error("no other CTA has leaves of the pair");
  }

  // The owner, as Pair::collect: a batch's part of the tree, then the stack.
  template <class F>
  Hash collect(F&& cta_of, int num_leaves) {
    Stack stack;
    const auto level_of = [&](int leaf) { return this->level_of(cta_of, num_leaves, leaf); };
    const auto is_start = [&](int leaf) { return this->is_start(cta_of, num_leaves, leaf); };
    const auto subtree_of = [&](int leaf) { return this->subtree_of(cta_of, num_leaves, leaf); };
    const auto any_start_from = [&](int leaf) {
      while (leaf < num_leaves && !is_start(leaf)) ++leaf;
      return leaf < num_leaves;
    };
    const int batch = 1 << batch_level;
    for (int first = 0; first < num_leaves; first += batch) {
      if (!is_start(first)) continue;  // part of a subtree that began before
      std::vector<Hash> value(batch);
      const auto present = [&](int i) { return first + i < num_leaves && is_start(first + i); };
      for (int i = 0; i < batch; ++i)
        if (present(i)) value[i] = subtree_of(first + i);
      for (int step = 1; step < batch; step *= 2) {
        for (int i = 0; i < batch; i += 2 * step)
          if (present(i + step)) value[i] = merge(value[i], value[i + step]);
      }
      // Whole unless it is the last; the last merges with all that is pending, whatever its size.
      const int level = std::max(batch_level, level_of(first));
      const Push plan = plan_push(first, level, 0);
      for (int l = level; l < plan.merged_level; ++l) value[0] = merge(stack.take(l), value[0]);
      if (!any_start_from(first + batch)) return stack.merge_all(level, value[0]);
      stack.put(plan.merged_level, value[0]);
    }
    throw std::runtime_error("the walk over the subtrees has no end");
  }
};

std::vector<Hash> results_of(const std::vector<int>& pages, int num_kv_heads, int num_ctas, int batch_level) {
  Emulation e{pages, num_kv_heads, num_ctas, batch_level, {}, {}, {}, {}, {}};
  e.run();
  EXPECT_EQ(e.partials.size() + e.own.size(), 0u);  // what was left was read
  int64_t W = 0, longest = 0;
  for (int n : pages) {
    W += int64_t(n) * num_kv_heads;
    longest = std::max<int64_t>(longest, leaf_pages(n, leaves_wanted(num_kv_heads)));
  }
  for (int64_t done : e.pages_done)
    EXPECT_EQ(done <= W / num_ctas + 1 + longest, true);  // equal but for a leaf
  return e.results;
}

void check_leaves() {
  EXPECT_EQ(leaf_pages(1, leaves_wanted(8)), 1);
  EXPECT_EQ(leaf_pages(3, leaves_wanted(8)), 3);
  EXPECT_EQ(leaf_pages(5, leaves_wanted(8)), 4);
  EXPECT_EQ(leaf_pages(32, leaves_wanted(8)), 4);     // 2048 tokens: the shortest
  EXPECT_EQ(leaf_pages(128, leaves_wanted(8)), 8);    // 8192 tokens: 16 leaves in each of 8 heads, 128 in all
  EXPECT_EQ(leaf_pages(512, leaves_wanted(8)), 32);   // 32768 tokens: the longest with 16
  EXPECT_EQ(leaf_pages(2048, leaves_wanted(8)), 64);  // 131072 tokens: 32
  EXPECT_EQ(leaf_pages(2048, leaves_wanted(1)), 64);
  EXPECT_EQ(leaf_pages(128, leaves_wanted(1)), 4);
  for (int pages = 1; pages <= 5000; ++pages)
    EXPECT_EQ(ceil_div(pages, leaf_pages(pages, 16)) <= kMaxLeaves, true);
}

void check_random_batches() {
  std::mt19937 random(0);
  const auto draw = [&](int low, int high) { return int(random() % unsigned(high - low + 1)) + low; };
  for (int round = 0; round < 400; ++round) {
    const int num_kv_heads = 1 << draw(0, 3), num_tiles = draw(1, 12);
    std::vector<int> pages(num_tiles);
    for (int& n : pages) n = draw(0, 3) == 0 ? draw(1, 2048) : draw(1, 70);
    const std::vector<Hash> want = results_of(pages, num_kv_heads, 1, 0);
    for (int num_ctas : {2, 7, 132, 216, 264, draw(1, 528)})
      for (int batch_level : {0, 2, 3})
        EXPECT_EQ(results_of(pages, num_kv_heads, num_ctas, batch_level) == want, true);
    // The first tile alone, on a whole GPU.
    const std::vector<Hash> alone = results_of({pages[0]}, num_kv_heads, 264, 3);
    EXPECT_EQ(std::equal(alone.begin(), alone.end(), want.begin()), true);
  }
}

}  // namespace

int main() {
  return testing::run([] {
    check_leaves();
    check_random_batches();
  });
}
