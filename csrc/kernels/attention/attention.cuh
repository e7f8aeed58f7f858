// SPDX-License-Identifier: Apache-2.0
// The kernel, from the parts in kernel.cuh, and its launch. Included by one file for each type of q.
#pragma once

#include <algorithm>
#include <climits>
#include <string>

#include "kernels/attention/append.cuh"
#include "kernels/attention/pair.cuh"
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
  alignas(16) uint8_t fetched[C::kMany ? C::kFetched * sizeof(Partial<C>) : 16];
  TileSums<C::kWarps> tile_sums;
  alignas(16) Tile tiles[1];  // as many as the launch provides for, and one more
};

// Consecutive parts go to different SMs: the first half of a grid of two CTAs an SM fills all SMs, so it
// takes the even parts. With few leaves only every second or so of the parts has one. Owners wait for later
// parts: of one CTA an SM these have lower indices, which start earlier; of two, all are resident at once.
__device__ __forceinline__ int part_of_cta(const LaunchConfig& config) {
  const int last = int(gridDim.x) - 1, half = int(gridDim.x) / 2, cta = int(blockIdx.x);
  if (!config.two_ctas_per_sm) return last - cta;
  return last - (cta < half ? 2 * cta : 2 * (cta - half) + 1);
}

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
  const Plan plan(line, end, part);
  wait_for_predecessor();

  static_assert(kLevels * sizeof(Partial<C>) <= sizeof(s.ring));
  void* const near = C::kMany ? static_cast<void*>(s.fetched) : s.ring;
  Pair<C> pair{p, config, line, {s.stack}, static_cast<Partial<C>*>(near), part};
  int index = leaf.first / line.tiles[leaf.tile].leaf, level = 0;
  // kMany: where subtrees start that are still to be taken from other CTAs. They come through this loop: its
  // code is in the instruction cache by then. collect(), which brings more of them at once, would not be.
  uint32_t others = 0;
  bool new_pair = true;
#pragma unroll 1
  for (int pages_left = num_pages;;) {
    State<C> state;
    bool ends_pair;
    if (!C::kMany || others == 0) {
      if (new_pair) {
        pair.start(leaf, index);
        worker.start_pair(line, leaf);
        if constexpr (C::kMany)
          if (pages_left < num_pages && pages_left < leaf.pages) pair.fetch(plan);
      }
      worker.compute_leaf(s.meeting, line, leaf, state);
      pages_left -= leaf.size();
      ends_pair = leaf.ends_pair();
      if (C::kMany && pages_left == 0 && !ends_pair && pair.is_owner()) others = plan.others;
    } else if constexpr (C::kMany) {
      index = __ffs(int(others)) - 1, level = __shfl_sync(kFullWarp, plan.level, index);
      others &= others - 1;
      pair.take(plan, index, state);
      ends_pair = others == 0;
    }
    const bool owns = pair.is_owner(), completes = owns && ends_pair, is_last = ends_pair || pages_left == 0;
    const bool leaves = pair.push(state, index, level, completes);
    const bool keeps = C::kMany ? owns : completes;
    if (!keeps && (leaves || is_last)) pair.leave();
    if (!C::kMany && owns && is_last && !completes) pair.collect(plan, state);
    if (C::kMany ? completes : owns && is_last) pair.write(state, out_scale);
    if (pages_left == 0) {
      if (others == 0) break;
      continue;
    }
    new_pair = ends_pair;
    index = ends_pair ? 0 : index + 1;
    leaf.advance(line);
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

// Where a sequence has several new tokens, they may fill a page that another one shares, for which they are
// old: rope_append, right before us, has to have finished.
template <class Scalar>
bool may_overlap(const AttentionParams<Scalar>& p) {
  return p.append.k != nullptr || p.num_tokens <= p.num_seqs;
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
  config.two_ctas_per_sm &= kMaxCtasPerSm * (smem_bytes + smem_reserved) <= smem_per_sm;
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
  launch_config.numAttrs = can_overlap<kKernel>() && may_overlap(p) ? 1 : 0;
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
  const int tiles_n = p.group > 8 || (p.num_tokens > p.num_seqs && !p.per_query) ? 2 : 1;
  const int queries_per_tile = p.per_query ? 1 : 8 * tiles_n / p.group;
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
      .two_ctas_per_sm = max_tiles * p.num_kv_heads > few_pairs(p.fp8_cache),  // if they fit
  };
  dispatch<64, 128>("D", p.head_dim, [&](auto head_dim) {
    dispatch<1, 2>("tiles_n", tiles_n, [&](auto tiles_n) {
      const auto launch = [&]<bool kMany>(std::bool_constant<kMany>) {
        if (p.fp8_cache)
          launch_attention<Config<Scalar, true, head_dim, tiles_n, kMany>>(p, config, stream);
        else
          launch_attention<Config<Scalar, false, head_dim, tiles_n, kMany>>(p, config, stream);
      };
      if constexpr (tiles_n == 1)
        if (config.two_ctas_per_sm) return launch(std::true_type{});
      launch(std::false_type{});
    });
  });
}

}  // namespace nf
