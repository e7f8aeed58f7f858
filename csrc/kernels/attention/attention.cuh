// SPDX-License-Identifier: Apache-2.0
// The kernel, from the parts in kernel.cuh, and its launch. Included by one file for each type of q.
#pragma once

#include <algorithm>
#include <climits>
#include <string>

#include "kernels/attention/append.cuh"
#include "kernels/attention/fold.cuh"
#include "kernels/common/check.h"
#include "kernels/common/dispatch.h"
#include "kernels/common/launch.h"

namespace nf {
namespace attn {

constexpr int kMaxTiles = 4096;
constexpr int kMaxCtasPerSm = 2;
// Up to so many pairs leave room for the next kernel on each SM: attention is short, or one CTA an SM reads
// as fast as two. (An H100, 8 KV heads, one CTA an SM / two. BF16, between linears: 8 sequences of 1,024
// tokens 16.9 / 19.7 us, 16 of 2,048 51.7 / 55.6, 128 of 1,024 222 / 193. e4m3, a step with weights of zero:
// one is 0.2 ms faster for 4 to 12 sequences of 128, the same for them of 8,192, 0.2 slower for 32 of 128.)
constexpr int few_pairs(bool fp8) { return fp8 ? 96 : 256; }

template <class C>
struct Smem {
  alignas(128) uint8_t ring[C::kWarps][C::kSlots][C::kSlotBytes];
  StackSmem<C> stack;
  MeetingSmem<C> meeting;
  TileSums<C::kWarps> tile_sums;
  alignas(16) Tile tiles[1];  // as many as the launch provides for, and one more
};

// Consecutive parts go to different SMs: the first half of a grid of two CTAs an SM fills all SMs, so it
// takes the even parts. With few leaves only every second or so of the parts has one. Owners wait for later
// parts: these have lower indices, which start earlier.
__device__ __forceinline__ int part_of_cta(const LaunchConfig& config) {
  const int last = int(gridDim.x) - 1, half = int(gridDim.x) / 2, cta = int(blockIdx.x);
  if (!config.two_ctas_per_sm) return last - cta;
  return last - (cta < half ? 2 * cta : 2 * (cta - half) + 1);
}

// What an owner must know of all CTAs' subtrees: lane i of each warp looks at leaf i.
struct Plan {
  int num_leaves;
  int part;         // whose leaf i is; past the end as for the last
  int level;        // of the largest aligned subtree around leaf i that one CTA has
  int index;        // of that subtree among those of its CTA
  uint32_t starts;  // where such subtrees start

  // Of the pair that has the page before `end`.
  __device__ __forceinline__ Plan(const Line& line, LeafStart end) {
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
  }
};

// What one CTA does with its leaves of a pair (tile, head).
template <class C>
struct Pair {
  const AttentionParams<typename C::Scalar>& p;
  const LaunchConfig& config;
  const Line& line;
  Stack<C> stack;
  Partial<C>* own;     // for what the owner itself leaves: its ring, which is free by then
  int part;            // the CTA's
  int tile, head;      // the pair's
  int first_leaf = 0;  // of this CTA
  int num_left = 0;    // subtrees in memory

  __device__ __forceinline__ void start(const Leaf& leaf, int index) {
    tile = leaf.tile, head = leaf.head;
    first_leaf = index;
    num_left = 0;
  }
  __device__ __forceinline__ bool is_owner() const { return first_leaf == 0; }

  // Subtree `index` of those that a CTA leaves.
  __device__ __forceinline__ Partial<C>* partial(int of_part, int index) const {
    if (is_owner() && of_part == part) return own + index;
    return static_cast<Partial<C>*>(p.workspace) + of_part * kPartialsPerCta + index;
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
      Parcel<C>(state).store(partial(part, num_left++)->of_thread());
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

  // This CTA owns the pair, has left its own subtrees and waits for the other CTAs'. They are later parts
  // and wait for nothing before they leave these; all CTAs of a launch are resident at once, and the next
  // launch's come after them: so the wait ends. (After a launch that failed half-way the workspace must be
  // filled anew.)
  __device__ __forceinline__ void collect(const Plan& plan, State<C>& state) {
    // A batch's part of the tree is in registers: a subtree lies where its first leaf would, what its other
    // leaves would fill is not used. All loads of a batch are under way before the first is used. The stack
    // merges the batches.
    constexpr int kBatchLevel = C::kTilesN * C::kParts >= 4 ? 2 : 3, kBatch = 1 << kBatchLevel;
    Partial<C>* const of_lane = partial(plan.part, plan.index);
#pragma unroll 1
    for (int first = 0; first < plan.num_leaves; first += kBatch) {
      const uint32_t present = plan.starts >> first;
      if (!(present & 1)) continue;  // part of a subtree that began before
      uint4* from[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const auto base = __shfl_sync(kFullWarp, reinterpret_cast<unsigned long long>(of_lane), first + i);
        from[i] = reinterpret_cast<Partial<C>*>(base)->of_thread();
        asm volatile("" : "+l"(from[i]));  // or nvcc keeps `base`, too, and adds in the loop
      }
      Parcel<C> parcel[kBatch];
      bool complete;
      do {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) parcel[i].load(from[i]);
        complete = true;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) complete &= parcel[i].is_complete();
      } while (!complete);
      State<C> batch[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        parcel[i].open(batch[i]);
        Parcel<C>::clear(from[i]);
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

// A warp: its ring, and the leaf that it works on.
template <class C>
struct Worker {
  const AttentionParams<typename C::Scalar>& p;
  const LaunchConfig& config;
  Loader<C> loader;
  uint32_t ring;  // shared address
  int slot = 0;   // the next to read
  CacheScales scales;
  Queries<C> queries;
  NewToken<C> new_token;
  Fragments<C> result;

  __device__ __forceinline__ Unit<C> unit_from(int from) const {
    Unit<C> unit;
#pragma unroll
    for (int i = 0; i < C::kUnitSlots; ++i) {
      const int at = from + i < C::kSlots ? from + i : from + i - C::kSlots;
      unit.slot[i] = ring + uint32_t(at * C::kSlotBytes);
    }
    return unit;
  }
  __device__ __forceinline__ Unit<C> next_unit() {
    const Unit<C> unit = unit_from(slot);
    slot += C::kUnitSlots;
    if (slot >= C::kSlots) slot -= C::kSlots;
    return unit;
  }
  // Until the slots that are read next are complete, `kUnits` units.
  template <int kUnits>
  __device__ __forceinline__ void wait_for_units() const {
    ptx::wait_for_copies<C::kSlots - kUnits * C::kUnitSlots>();
    __syncwarp();  // all lanes' copies are complete
  }
  // With what comes kSlots slots later.
  __device__ __forceinline__ void refill(const Unit<C>& unit, bool is_values) {
    __syncwarp();  // all lanes have read it
#pragma unroll
    for (int i = 0; i < C::kUnitSlots; ++i) {
      const int phase = (C::kSlots + is_values * C::kUnitSlots + i) % C::kPhases;
      loader.fill(unit.slot[i], phase);
      if (phase == C::kPhases - 1) loader.next_page();
    }
  }

  // Starts loading q and the first of the pair's new tokens in this warp's share. (There are at most 8 new
  // ones: a warp has all of its in one step.)
  __device__ __forceinline__ void start_pair(const Line& line, const Leaf& leaf) {
    const Tile& tile = line.tiles[leaf.tile];
    if (p.append.k != nullptr) {
      const int position = WarpPages::first_token_from(max(tile.num_old(), 0));
      if (position < tile.length) new_token.load(p, tile, leaf.head, position);
    }
    queries.load(p, config, tile, leaf.head);
  }

  // K and V of the step are complete in the ring but for the new tokens: these, too.
  __device__ __forceinline__ void append(const Line& line, const Leaf& leaf, const NewTokens& tokens) {
    const Tile& tile = line.tiles[leaf.tile];
    const Unit<C> keys = unit_from(slot);
    const int second = slot + C::kUnitSlots;
    const Unit<C> values = unit_from(second < C::kSlots ? second : second - C::kSlots);
    wait_for_units<2>();
    for (int position = tokens.first; position < tokens.end; ++position) {
      if (position != new_token.position) new_token.load(p, tile, leaf.head, position);
      new_token.store(p, scales, tile, leaf.head, keys, values);
    }
  }

  // A leaf: the warp's shares of its pages, a step each, and then all warps' results.
  __device__ __forceinline__ void compute_leaf(MeetingSmem<C>& s, const Line& line, const Leaf& leaf,
                                               State<C>& sum) {
    constexpr bool kHoldsKeys = C::kTilesN > C::kUnitSlots;  // the last step's: for the results
    result.clear();
    for (int page = WarpPages::first_page(leaf);; page += kPagesAtOnce) {
      const bool works = page < leaf.end;  // not all warps if the leaf is a single page
      const bool is_last = page + kPagesAtOnce >= leaf.end;
      Unit<C> keys, values;
      if (works) {
        const int first_token = WarpPages::first_token(page);
        if (p.append.k != nullptr) {
          const NewTokens tokens(line.tiles[leaf.tile], first_token, C::kStepTokens);
          if (tokens.any()) append(line, leaf, tokens);
        }
        Scores<C> score;
        wait_for_units<1>();
        keys = next_unit();
        score_unit<C>(score, keys, queries);
        if (!(kHoldsKeys && is_last)) refill(keys, false);

        uint32_t weights[2][C::kTilesN][2];
        to_weights<C>(weights, result, score, config.score_scale, queries, first_token);

        if (kHoldsKeys && is_last)
          wait_for_units<2>();  // one refill less is under way
        else
          wait_for_units<1>();
        values = next_unit();
        add_values<C>(result, values, weights);
      }
      if (is_last) {
        if (works) {
          uint32_t slots[C::kTilesN] = {values.slot[0]};
          if constexpr (C::kTilesN == 2)
            slots[1] = kHoldsKeys ? keys.slot[0] : values.slot[C::kUnitSlots - 1];
          __syncwarp();  // all lanes have read the slots
          put_fragments<C>(s, slots, result);
        }
        __syncthreads();  // the results are in the slots
        take_sum<C>(s, leaf.size() > 1, sum);
        __syncthreads();  // and read
      }
      if (works) {
        if (kHoldsKeys && is_last) refill(keys, false);
        refill(values, true);
      }
      if (is_last) return;
    }
  }
};

// So that what reads the padding rows computes with numbers.
template <class C>
__device__ __forceinline__ void clear_rows(const AttentionParams<typename C::Scalar>& p, int64_t first) {
  const int element_bytes = p.out_scale == nullptr ? int(sizeof(typename C::Scalar)) : 1;
  const int words = p.num_kv_heads * p.group * C::kHeadDim * element_bytes / int(sizeof(uint32_t));
#pragma unroll 1
  for (int64_t row = first + blockIdx.x; row < p.num_tokens; row += gridDim.x) {
    auto* to = reinterpret_cast<uint32_t*>(static_cast<char*>(p.out) + row * p.out_stride * element_bytes);
#pragma unroll 1
    for (int i = threadIdx.x; i < words; i += C::kThreads) to[i] = 0;
  }
}

// Computed here, while the predecessor runs, not where it is used.
__device__ __forceinline__ Divisor early_divisor(float scale) {
  Divisor divisor = scale;
  asm volatile("" : "+f"(divisor.value), "+f"(divisor.inverse));
  return divisor;
}

// Pages from `begin` to `end`, which are whole leaves. Most of this runs once in a launch and finds the
// instruction cache cold, so what matters is its size: one inlined copy of everything, loops rolled.
template <class C>
__device__ __forceinline__ void compute_part(const AttentionParams<typename C::Scalar>& p,
                                             const LaunchConfig& config, Smem<C>& s, const Line& line,
                                             int part, LeafStart begin, LeafStart end) {
  Leaf leaf = leaf_at(line, begin);
  const int num_pages = end.at - begin.at;
  const uint32_t ring = uint32_t(__cvta_generic_to_shared(s.ring[threadIdx.x / kWarpSize]));
  Worker<C> worker{p, config, {p, WarpPages(line, leaf, num_pages)}, ring};
  Divisor out_scale = 1.0f;
  if (p.out_scale != nullptr) out_scale = early_divisor(*p.out_scale);
  if constexpr (C::kFp8) worker.scales = {early_divisor(p.k_scale), early_divisor(p.v_scale)};
#pragma unroll 1
  for (int i = 0;; ++i) {
    const int phase = i % C::kPhases;
    if (phase == 0) worker.loader.next_page();
    if (i == C::kSlots) break;
    if (!worker.loader.is_old(phase)) wait_for_predecessor();
    worker.loader.fill(ring + uint32_t(i * C::kSlotBytes), phase);
  }
  // The last pair of the part is the only one that this CTA may own and not have all of.
  const Plan plan(line, end);
  wait_for_predecessor();

  static_assert(kLevels * sizeof(Partial<C>) <= sizeof(s.ring));
  Pair<C> pair{p, config, line, {s.stack}, reinterpret_cast<Partial<C>*>(s.ring), part};
  int index = leaf.first / line.tiles[leaf.tile].leaf;
  bool new_pair = true;
#pragma unroll 1
  for (int pages_left = num_pages; pages_left > 0;) {
    if (new_pair) {
      pair.start(leaf, index);
      worker.start_pair(line, leaf);
    }
    State<C> state;
    worker.compute_leaf(s.meeting, line, leaf, state);

    pages_left -= leaf.size();
    const bool ends_pair = leaf.ends_pair();
    const bool is_whole = ends_pair && pair.is_owner(), is_last = ends_pair || pages_left == 0;
    const bool leaves = pair.push(state, index, 0, is_whole);
    if (!is_whole && (leaves || is_last)) pair.leave();
    if (is_last && pair.is_owner()) {
      if (!is_whole) pair.collect(plan, state);
      pair.write(state, out_scale);
    }
    new_pair = ends_pair;
    index = ends_pair ? 0 : index + 1;
    if (pages_left > 0) leaf.advance(line);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, kMaxCtasPerSm)
    attention_kernel(const __grid_constant__ AttentionParams<typename C::Scalar> p,
                     const __grid_constant__ LaunchConfig config) {
  extern __shared__ __align__(128) uint8_t smem[];
  Smem<C>& s = *reinterpret_cast<Smem<C>*>(smem);
  let_successor_start();

  const int num_queries = int(p.q_start[p.num_seqs]);
  const int num_tiles = build_tiles(s.tile_sums, s.tiles, config.max_tiles, p.q_start, p.kv_len, p.num_seqs,
                                    p.most_queries, config.queries_per_tile, config.leaves_wanted);
  __syncthreads();  // the tiles are built
  const Line line{s.tiles, num_tiles, p.num_kv_heads};
  const int W = line.total(), part = part_of_cta(config);
  // Odd lanes find the end while even lanes find the beginning.
  const LeafStart end_or_begin =
      next_leaf_start(line, int(part_begin(part + int(threadIdx.x % 2), W, int(gridDim.x))));
  const auto of_lane = [&](int lane) {
    return LeafStart{__shfl_sync(kFullWarp, end_or_begin.at, lane),
                     __shfl_sync(kFullWarp, end_or_begin.tile, lane)};
  };
  const LeafStart begin = of_lane(0), end = of_lane(1);
  if (begin.at < end.at)
    compute_part(p, config, s, line, part, begin, end);
  else
    wait_for_predecessor();  // also so that the kernel ends after it
  clear_rows<C>(p, num_queries);
}

template <class C>
void launch_attention(const AttentionParams<typename C::Scalar>& p, const LaunchConfig& wanted,
                      cudaStream_t stream) {
  LaunchConfig config = wanted;
  constexpr auto kKernel = attention_kernel<C>;
  int device, num_sms, smem_per_sm, smem_per_cta, smem_reserved;
  NF_CUDA(cudaGetDevice(&device));
  NF_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  NF_CUDA(cudaDeviceGetAttribute(&smem_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  NF_CUDA(cudaDeviceGetAttribute(&smem_per_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  NF_CUDA(cudaDeviceGetAttribute(&smem_reserved, cudaDevAttrReservedSharedMemoryPerBlock, device));
  const int smem_bytes = int(sizeof(Smem<C>) + size_t(config.max_tiles) * sizeof(Tile));
  NF_CHECK(smem_bytes <= smem_per_cta, std::to_string(smem_bytes) + " bytes of shared memory");
  config.two_ctas_per_sm = config.max_tiles * p.num_kv_heads > few_pairs(C::kFp8) &&
                           kMaxCtasPerSm * (smem_bytes + smem_reserved) <= smem_per_sm;
  NF_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
  NF_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared));

  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = dim3(unsigned(num_sms * (config.two_ctas_per_sm ? kMaxCtasPerSm : 1)));
  launch_config.blockDim = dim3(C::kThreads);
  launch_config.dynamicSmemBytes = size_t(smem_bytes);
  launch_config.stream = stream;
  launch_config.attrs = &overlap;
  launch_config.numAttrs = can_overlap<kKernel>() ? 1 : 0;
  NF_CUDA(cudaLaunchKernelEx(&launch_config, kKernel, p, config));
}

}  // namespace attn

template <class Scalar>
void attention(const AttentionParams<Scalar>& p, cudaStream_t stream) {
  using namespace attn;
  NF_CHECK(p.group >= 1 && p.group <= 16, "G=" + std::to_string(p.group));
  NF_CHECK(p.softmax_scale > 0.0f, "softmax_scale=" + std::to_string(p.softmax_scale));
  NF_CHECK(p.num_tokens >= 0 && p.num_tokens <= kMaxTokens, "T=" + std::to_string(p.num_tokens));
  NF_CHECK(p.num_seqs >= 0 && p.num_seqs <= UINT16_MAX, "S=" + std::to_string(p.num_seqs));
  NF_CHECK(p.append.k == nullptr || p.num_tokens <= int64_t(kMaxAppended) * p.num_seqs,
           "T=" + std::to_string(p.num_tokens) + " of S=" + std::to_string(p.num_seqs));
  if (p.num_tokens == 0 || p.num_seqs == 0) return;
  // Several queries of a sequence fill 16 rows; with one each, 8 will do where the group has no more.
  const int tiles_n = p.group > 8 || p.num_tokens > p.num_seqs ? 2 : 1;
  const int queries_per_tile = 8 * tiles_n / p.group;
  const int64_t most_of_seq =
      p.most_queries < p.num_tokens ? ceil_div(p.most_queries, queries_per_tile) : p.num_tokens;
  const int64_t max_tiles =
      std::min({p.num_tokens, p.num_tokens / queries_per_tile + p.num_seqs,  // of ragged sequences
                p.num_seqs * most_of_seq});
  NF_CHECK(max_tiles <= kMaxTiles, "T=" + std::to_string(p.num_tokens) + " queries, " +
                                       std::to_string(max_tiles) + " tiles of " +
                                       std::to_string(queries_per_tile) + ": run longer prompts in slices");
  const LaunchConfig config{
      .queries_per_tile = queries_per_tile,
      .max_tiles = int(max_tiles),
      .leaves_wanted = leaves_wanted(p.num_kv_heads),
      .group_inverse = uint32_t((1 << 16) / p.group + 1),
      .score_scale = p.softmax_scale * (p.fp8_cache ? p.k_scale : 1.0f) * 1.44269504f,
      .two_ctas_per_sm = false,
  };
  const bool long_ring = max_tiles * p.num_kv_heads <= few_pairs(true);
  dispatch<64, 128>("D", p.head_dim, [&](auto head_dim) {
    dispatch<1, 2>("tiles_n", tiles_n, [&](auto tiles_n) {
      if (!p.fp8_cache)
        launch_attention<Config<Scalar, false, head_dim, tiles_n>>(p, config, stream);
      else if (long_ring || tiles_n == 2)
        launch_attention<Config<Scalar, true, head_dim, tiles_n>>(p, config, stream);
      else
        launch_attention<Config<Scalar, true, head_dim, 1, true>>(p, config, stream);
    });
  });
}

}  // namespace nf
