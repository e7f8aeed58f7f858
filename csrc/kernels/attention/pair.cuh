// SPDX-License-Identifier: Apache-2.0
// The leaves of one pair (tile, KV head) on their way to its result, within a CTA and between those that
// share it (host/attention_schedule.h).
#pragma once

#include "kernels/attention/fold.cuh"

namespace nf::attn {

// What an owner must know of all CTAs' subtrees: lane i of each warp looks at leaf i.
struct Plan {
  int num_leaves;
  int part;         // whose leaf i is; past the end as for the last
  int level;        // of the largest aligned subtree around leaf i that one CTA has
  int index;        // of that subtree among those of its CTA
  uint32_t starts;  // where such subtrees start
  uint32_t others;  // those of other CTAs

  // Of the pair that has the page before `end`, the last one of this CTA's part.
  __device__ __forceinline__ Plan(const Line& line, LeafStart end, int own_part) {
    const int lane = threadIdx.x % kWarpSize, W = line.total(), at = end.at - 1;
    const int tile = at < line.pair_begin(end.tile, 0) ? end.tile - 1 : end.tile;
    const int pages = line.pages(tile), leaf_size = line.tiles[tile].leaf;
    num_leaves = ceil_div(pages, leaf_size);
    const int64_t begin = at - (at - line.pair_begin(tile, 0)) % pages;
    part = owner_of(begin + int64_t(min(lane, num_leaves - 1)) * leaf_size, W, int(gridDim.x));
    const uint32_t same = __match_any_sync(kFullWarp, part);  // neighbours
    level = 0;
#pragma unroll
    for (int l = 1; l <= kLevels; ++l) {
      const int low = lane >> l << l, high = low + (1 << l) - 1;
      if (high < num_leaves && (same >> low & same >> high & 1)) level = l;
    }
    starts = __ballot_sync(kFullWarp, lane < num_leaves && lane >> level << level == lane);
    index = __popc(starts & same & ((2u << lane) - 1)) - 1;
    others = starts & __ballot_sync(kFullWarp, part != own_part);
  }
};

// What one CTA does with its leaves of a pair (tile, head).
template <class C>
struct Pair {
  const AttentionParams<typename C::Scalar>& p;
  const LaunchConfig& config;
  const Line& line;
  Stack<C> stack;
  Partial<C>* near;    // in shared memory: kMany: what was fetched; or what an owner leaves, in its idle ring
  int part;            // the CTA's
  int tile, head;      // the pair's
  int first_leaf = 0;  // of this CTA
  int num_left = 0;    // subtrees in memory
  bool has_fetched = false;

  __device__ __forceinline__ void start(const Leaf& leaf, int index) {
    tile = leaf.tile, head = leaf.head;
    first_leaf = index;
    num_left = 0;
  }
  __device__ __forceinline__ bool is_owner() const { return first_leaf == 0; }

  // Subtree `index` of those that a CTA leaves.
  __device__ __forceinline__ Partial<C>* partial(int of_part, int index) const {
    if (!C::kMany && is_owner() && of_part == part) return near + index;
    return static_cast<Partial<C>*>(p.workspace) + of_part * kPartialsPerCta + index;
  }

  // This thread's words of the subtree that has leaf `leaf`.
  __device__ __forceinline__ uint4* of_leaf(const Plan& plan, int leaf) const {
    const auto of_lane = reinterpret_cast<unsigned long long>(partial(plan.part, plan.index));
    return reinterpret_cast<Partial<C>*>(__shfl_sync(kFullWarp, of_lane, leaf))->of_thread();
  }

  // Adds a subtree of 2^level leaves to the stack, or if it is the pair's last, all of the stack to it.
  // Returns whether the left sibling of what was put is not this CTA's: then nothing else is on the stack.
  __device__ __forceinline__ bool push(State<C>& state, int leaf, int level, bool is_last) {
    const Push plan = plan_push(leaf, level, first_leaf);
    stack.merge_left(level, is_last ? kLevels : plan.merged_level, state);
    if (!is_last) stack.put(plan.merged_level, state);
    return plan.leaves;
  }

  // Leaves all that is on the stack, in the order of the leaves.
  __device__ __forceinline__ void leave() {
#pragma unroll 1
    for (int level = kLevels - 1; level >= 0; --level) {
      if (!(stack.pending >> level & 1)) continue;
      State<C> state;
      stack.take(level, state);
      Parcel<C>(state).template store<C::kMany>(partial(part, num_left++)->of_thread());
    }
  }

  __device__ __forceinline__ void write(const State<C>& state, const Divisor& out_scale) const {
    using Scalar = typename C::Scalar;
    const Tile tile = line.tiles[this->tile];
    const float v_scale = C::kFp8 ? p.v_scale : 1.0f;
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
      const int row = n * 8 + int(threadIdx.x) / 16, query = config.query_of(row);
      if (query >= int(tile.queries)) continue;
      const float scale = state.l[n] > 0.0f ? v_scale / state.l[n] : 0.0f;
      const int64_t at = (int64_t(tile.token) + query) * p.out_stride +
                         (head * p.group + row - query * p.group) * C::kHeadDim + threadIdx.x % 16 * 4;
      uint2 rounded[C::kParts];
#pragma unroll
      for (int i = 0; i < C::kParts; ++i) {
        const float4 o = state.o[n][i];
        rounded[i] = {round_pair<Scalar>({o.x * scale, o.y * scale}),
                      round_pair<Scalar>({o.z * scale, o.w * scale})};
        if (p.out_scale == nullptr)
          *reinterpret_cast<uint2*>(static_cast<Scalar*>(p.out) + at + i * 64) = rounded[i];
      }
      if (p.out_scale == nullptr) continue;
#pragma unroll
      for (int i = 0; i < C::kParts; ++i) {
        const uint32_t low = to_fp8(widen_pair<Scalar>(rounded[i].x), out_scale),
                       high = to_fp8(widen_pair<Scalar>(rounded[i].y), out_scale);
        *reinterpret_cast<uint32_t*>(static_cast<char*>(p.out) + at + i * 64) = low | high << 16;
      }
    }
  }

  // kMany, before the owner computes the pair, the last of its part: brings the first subtrees that other
  // CTAs left to shared memory, if they are there. In a large batch they are: these others began with them.
  // At the end of the part nothing hides a trip to L2.
  __device__ __forceinline__ void fetch(const Plan& plan) {
    uint4* from[C::kFetched];
    Parcel<C> parcel[C::kFetched];
    uint32_t others = plan.others;
#pragma unroll
    for (int i = 0; i < C::kFetched; ++i) {
      from[i] = of_leaf(plan, __ffs(int(others)) - 1);
      if (others & (others - 1)) others &= others - 1;  // or the last one again
      parcel[i].template load<true>(from[i]);
    }
    bool complete = true;
#pragma unroll
    for (int i = 0; i < C::kFetched; ++i) complete &= parcel[i].is_complete();
    has_fetched = __all_sync(kFullWarp, complete);
    if (!has_fetched) return;
#pragma unroll
    for (int i = 0; i < C::kFetched; ++i) {
      parcel[i].template store<false>(near[i].of_thread());
      Parcel<C>::template clear<true>(from[i]);
    }
  }

  // kMany, when the owner's leaves are on its stack: the others' subtree that starts with leaf `first`. As in
  // collect(), the wait ends.
  __device__ __forceinline__ void take(const Plan& plan, int first, State<C>& state) const {
    const int rank = __popc(plan.others & ((1u << first) - 1));
    Parcel<C> parcel;
    if (has_fetched && rank < C::kFetched) {
      parcel.template load<false>(near[rank].of_thread());
    } else {
      uint4* const from = of_leaf(plan, first);
      do parcel.template load<true>(from);
      while (!parcel.is_complete());
      Parcel<C>::template clear<true>(from);
    }
    parcel.open(state);
  }

  // Not kMany: this CTA owns the pair, has left its own subtrees and waits for the other CTAs'. They are
  // later parts and wait for nothing before they leave these; all CTAs of a launch are resident at once, and
  // the next launch's come after them: so the wait ends. (After a launch that failed half-way the workspace
  // must be filled anew.)
  __device__ __forceinline__ void collect(const Plan& plan, State<C>& state) {
    // A batch's part of the tree is in registers: a subtree lies where its first leaf would, what its other
    // leaves would fill is not used. All loads of a batch are under way before the first is used. The stack
    // merges the batches.
    constexpr int kBatchLevel = C::kTilesN * C::kParts >= 4 ? 2 : 3, kBatch = 1 << kBatchLevel;
#pragma unroll 1
    for (int first = 0; first < plan.num_leaves; first += kBatch) {
      const uint32_t present = plan.starts >> first;
      if (!(present & 1)) continue;  // part of a subtree that began before
      uint4* from[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        from[i] = of_leaf(plan, first + i);
        asm volatile("" : "+l"(from[i]));  // or nvcc keeps what it comes from, too, and adds in the loop
      }
      Parcel<C> parcel[kBatch];
      bool complete;
      do {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) parcel[i].template load<false>(from[i]);
        complete = true;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) complete &= parcel[i].is_complete();
      } while (!complete);
      State<C> batch[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        parcel[i].open(batch[i]);
        Parcel<C>::template clear<false>(from[i]);
      }
#pragma unroll
      for (int step = 1; step < kBatch; step *= 2) {
#pragma unroll
        for (int i = 0; i < kBatch; i += 2 * step)
          if (present >> (i + step) & 1) merge<C>(batch[i], batch[i + step]);
      }
      state = batch[0];
      const int level = max(kBatchLevel, __shfl_sync(kFullWarp, plan.level, first));
      push(state, first, level, present >> kBatch == 0);
    }
  }
};

}  // namespace nf::attn
