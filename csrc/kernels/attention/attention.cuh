// SPDX-License-Identifier: Apache-2.0
// The kernel, from the parts in kernel.cuh, and its launch. Included by one file for each type of q.
#pragma once

#include <algorithm>
#include <climits>
#include <string>

#include "kernels/attention/kernel.cuh"
#include "kernels/common/check.h"
#include "kernels/common/dispatch.h"
#include "kernels/common/launch.h"

namespace nf {
namespace attn {

constexpr int kMaxTiles = 4096;
constexpr int64_t kCounters = 1 << 16;  // pairs of a launch
constexpr int kCtasPerSm = 2;

// Consecutive parts go to different SMs: the first half of a grid of two CTAs an SM fills all SMs, so it
// takes the even parts. With few leaves only every second or so of the parts has one.
__device__ __forceinline__ int part_of_cta(const LaunchConfig& config) {
  const int half = int(gridDim.x) / 2, cta = int(blockIdx.x);
  if (!config.two_ctas_per_sm) return cta;
  return cta < half ? 2 * cta : 2 * (cta - half) + 1;
}

// What one CTA does with the leaves of a pair (tile, head).
template <class C>
struct Pair {
  const AttentionParams<typename C::Scalar>& p;
  const LaunchConfig& config;
  const Line& line;
  Smem<C>& s;
  Stack<C> stack;
  int part;        // the CTA's
  Cursor at;       // the pair's tile and head
  int first_leaf;  // of this CTA
  bool whole;      // are all leaves this CTA's?
  int num_emitted;

  __device__ __forceinline__ float* partial(int of_part, int index) const {
    return p.workspace.partials + (int64_t(of_part) * kPartialsPerCta + index) * C::kPartialFloats;
  }

  __device__ __forceinline__ void emit(const State<C>& state) {
    float* to = partial(part, partial_index(first_leaf, num_emitted++));
    store_state<C>(to, to + C::kStateFloats * C::kThreads, threadIdx.x < kWarpSize, state);
  }

  // Takes a leaf. True: `state` is the result of the whole pair.
  __device__ __forceinline__ bool push(State<C>& state, int leaf, bool is_last) {
    const Push plan = plan_push(leaf, 0, first_leaf, whole);
    for (int level = 0; level < plan.merged_level; ++level) stack.merge_left(level, state);
    if (whole && is_last) {
      stack.merge_all(state);
      return true;
    }
    if (plan.emit)
      emit(state);
    else
      stack.put(plan.merged_level, state);
    return false;
  }

  __device__ __forceinline__ void write(const State<C>& state) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, q = lane % 4;
    const Tile tile = line.tiles[at.tile];
    const int num_queries = tile.queries;
    const float v_scale = C::kFp8 ? p.v_scale : 1.0f;
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = n * 8 + 2 * q + i, query = config.query_of(row);
        if (query >= num_queries) continue;
        const float scale = state.l[n][i] > 0.0f ? v_scale / state.l[n][i] : 0.0f;
        typename C::Scalar* to = p.out + (int64_t(tile.token) + query) * p.out_stride +
                                 (at.head * p.group + row - query * p.group) * C::kHeadDim;
#pragma unroll
        for (int t = 0; t < C::kTilesM; ++t) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int d = (warp * C::kTilesM + t) * 16 + (C::kFp8 ? 2 * g + half : g + 8 * half);
            to[d] = round_to<typename C::Scalar>(state.o[t][n][2 * half + i] * scale);
          }
        }
      }
    }
  }

  // This CTA has had its leaves of a pair that it shares, up to the end of leaf `last_leaf`: leaves its
  // subtrees in memory, and merges all if it is the last to arrive.
  __device__ __forceinline__ void leave(State<C>& state, int last_leaf, int64_t W) {
    for (int level = kGroupLevel; level >= 0; --level) {
      if (!(stack.pending >> level & 1)) continue;
      stack.take(level, state);
      emit(state);
    }
    const int leaf_size = line.tiles[at.tile].leaf, num_leaves = ceil_div(at.pages, leaf_size);
    int* counter = &p.workspace.counters[at.tile * line.num_kv_heads + at.head];
    __syncthreads();  // all threads' partials are written
    if (threadIdx.x == 0) {
      const int num_done = last_leaf + 1 - first_leaf;
      __threadfence();  // the partials are visible before the arrival is
      s.arrived = atomicAdd(counter, num_done) + num_done;
      __threadfence();  // the others' partials are read after their arrivals
    }
    __syncthreads();  // `arrived` is known
    if (s.arrived != num_leaves) return;
    if (threadIdx.x == 0) *counter = 0;  // for the next launch
    merge_partials(leaf_size, num_leaves, W);
  }

  __device__ __forceinline__ void merge_partials(int leaf_size, int num_leaves, int64_t W) {
    // Lane i looks at leaf i: the largest aligned subtree around it that one CTA has.
    const int lane = threadIdx.x % kWarpSize;
    const int64_t begin = line.pair_begin(at.tile, at.head);
    const int owner = lane < num_leaves ? owner_of(begin + int64_t(lane) * leaf_size, W, int(gridDim.x)) : -1;
    int level = 0;
#pragma unroll
    for (int l = 1; l <= kGroupLevel; ++l) {
      const int low = lane >> l << l, high = low + (1 << l) - 1;
      const int a = __shfl_sync(kFullWarp, owner, low), b = __shfl_sync(kFullWarp, owner, high);
      if (high < num_leaves && a == b) level = l;
    }
    const uint32_t starts = __ballot_sync(kFullWarp, lane < num_leaves && lane >> level << level == lane);
    const uint32_t same = __match_any_sync(kFullWarp, owner);
    const int index = partial_index(__ffs(int(same)) - 1, __popc(starts & same & ((1u << lane) - 1)));

    // A batch's part of the tree is in registers: a subtree lies where its first leaf would, what its other
    // leaves would fill is empty. All loads of a batch are under way before the first is used. The stack
    // merges the batches.
    constexpr int kBatchLevel = C::kStateFloats >= 16 ? 2 : 3,
                  kBatch = 1 << kBatchLevel;  // what registers allow
#pragma unroll 1
    for (int first = 0; first < num_leaves; first += kBatch) {
      const uint32_t present = starts >> first;
      if (!(present & 1)) continue;  // part of a subtree that began before
      State<C> batch[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int of_part = __shfl_sync(kFullWarp, owner, first + i),
                  at = __shfl_sync(kFullWarp, index, first + i);
        const float* from = partial(of_part, at);
        if (present >> i & 1) load_state<true, C>(from, from + C::kStateFloats * C::kThreads, batch[i]);
      }
#pragma unroll
      for (int step = 1; step < kBatch; step *= 2) {
#pragma unroll
        for (int i = 0; i < kBatch; i += 2 * step)
          if (present >> (i + step) & 1) merge_into_left<C>(batch[i], batch[i + step]);
      }
      const int batch_level = max(kBatchLevel, __shfl_sync(kFullWarp, level, first));
      const Push plan = plan_push(first, batch_level, 0, true);
      for (int l = batch_level; l < plan.merged_level; ++l) stack.merge_left(l, batch[0]);
      if (present >> kBatch) {
        stack.put(plan.merged_level, batch[0]);
      } else {
        stack.merge_all(batch[0]);
        write(batch[0]);
      }
    }
  }
};

// Scores -> weights in shared memory, in units of the maximum, which every warp then knows; the state is
// rescaled to it.
template <class C>
__device__ __forceinline__ void mask_and_share_maxima(Smem<C>& s, float (&score)[C::kTilesN][4], float scale,
                                                      const Queries<C>& queries, int page) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, q = lane % 4;
  const bool masks = (page + 1) * kPageSize > queries.least_limit;
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    float largest[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& v = score[n][2 * half + i];
        v *= scale;
        if (masks && page * kPageSize + warp * 16 + g + 8 * half >= queries.limit[n][i]) v = -INFINITY;
      }
      largest[i] = fmaxf(score[n][i], score[n][2 + i]);
#pragma unroll
      for (int mask = 4; mask < kWarpSize; mask *= 2)
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(kFullWarp, largest[i], mask));
    }
    if (lane < 4) *reinterpret_cast<float2*>(&s.maxima[warp][n * 8 + 2 * q]) = {largest[0], largest[1]};
  }
}

template <class C>
__device__ __forceinline__ void share_weights(Smem<C>& s, const float (&score)[C::kTilesN][4],
                                              State<C>& state) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, q = lane % 4;
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    float m[2] = {state.m[n][0], state.m[n][1]};
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      const float2 v = *reinterpret_cast<const float2*>(&s.maxima[w][n * 8 + 2 * q]);
      m[0] = fmaxf(m[0], v.x), m[1] = fmaxf(m[1], v.y);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float rescale = weight_of(state.m[n][i], m[i]);
      state.m[n][i] = m[i];
      state.l[n][i] *= rescale;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        s.weights[n * 8 + 2 * q + i][warp * 16 + g + 8 * half] =
            round_to<typename C::Product>(weight_of(score[n][2 * half + i], m[i]));
#pragma unroll
        for (int t = 0; t < C::kTilesM; ++t) state.o[t][n][2 * half + i] *= rescale;
      }
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, kCtasPerSm)
    attention_kernel(const AttentionParams<typename C::Scalar> p, const LaunchConfig config) {
  extern __shared__ __align__(128) uint8_t smem[];
  Smem<C>& s = *reinterpret_cast<Smem<C>*>(smem);
  let_successor_start();
  wait_for_predecessor();

  if (threadIdx.x < kWarpSize) {
    const int num_tiles = build_tiles(s.tiles, config.max_tiles, p.q_start, p.kv_len, p.num_seqs,
                                      p.most_queries, config.queries_per_tile, config.leaves_wanted);
    if (threadIdx.x == 0) s.num_tiles = num_tiles;
  }
  __syncthreads();  // the tiles are built
  const Line line{s.tiles, s.num_tiles, p.num_kv_heads};
  const int W = line.total(), part = part_of_cta(config);
  if (W == 0) return;
  // Odd lanes find the end while even lanes find the beginning.
  const int end_or_begin =
      next_leaf_start(line, int(part_begin(part + int(threadIdx.x % 2), W, int(gridDim.x))));
  const int begin = __shfl_sync(kFullWarp, end_or_begin, 0), end = __shfl_sync(kFullWarp, end_or_begin, 1);
  if (begin == end) return;

  Cursor at = cursor_at(line, begin);
  Loader<C> loader(p, line, uint32_t(__cvta_generic_to_shared(s.ring)), at, end - begin);
  for (int i = 0; i < C::kSlots - 1; ++i) loader.issue();

  Queries<C> queries;
  State<C> state;
  Pair<C> pair{p, config, line, s, {s.stack, 0}, part, at, 0, false, 0};
  int leaf = 0, leaf_size = 1, pages_of_leaf = 0, slot = 0;  // leaf in its pair; its pages that are done
  bool new_pair = true;
  const uint32_t ring = uint32_t(__cvta_generic_to_shared(s.ring));
  const uint32_t weights = uint32_t(__cvta_generic_to_shared(s.weights));
  const auto next_entry =
      [&] {  // waits for the entry that is read next, and refills the one that was read before it
        ptx::wait_for_copies<C::kSlots - 2>();
        __syncthreads();  // the entry is complete, and the one before it, maxima and weights too, read by all
        loader.issue();
        const uint32_t page = ring + uint32_t(slot * C::kSlotBytes);
        slot = slot + 1 == C::kSlots ? 0 : slot + 1;
        return page;
      };

  for (int pages_left = end - begin; pages_left > 0; --pages_left) {
    if (new_pair) {
      queries.load(p, config, line.tiles[at.tile], at.head);
      leaf_size = line.tiles[at.tile].leaf;
      leaf = at.page == 0 ? 0 : at.page / leaf_size;
      pages_of_leaf = 0;
      pair.at = at;
      pair.first_leaf = leaf;
      pair.whole = at.page == 0 && pages_left >= at.pages;
      pair.num_emitted = 0;
    }
    if (pages_of_leaf == 0) state.clear();

    float score[C::kTilesN][4];
    score_page<C>(score, next_entry(), queries);
    mask_and_share_maxima<C>(s, score, config.score_scale, queries, at.page);
    const uint32_t values = next_entry();  // maxima are complete, too
    share_weights<C>(s, score, state);
    __syncthreads();  // the weights are complete
    add_values<C>(state, values, weights);

    const bool ends_pair = at.page + 1 == at.pages, ends_leaf = ends_pair || pages_of_leaf + 1 == leaf_size;
    if (ends_leaf && pair.push(state, leaf, ends_pair)) pair.write(state);
    if (!pair.whole && (ends_pair || pages_left == 1)) pair.leave(state, leaf, W);
    pages_of_leaf = ends_leaf ? 0 : pages_of_leaf + 1;
    leaf += ends_leaf;
    new_pair = ends_pair;
    at.advance(line);
  }
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
  config.two_ctas_per_sm = kCtasPerSm * (smem_bytes + smem_reserved) <= smem_per_sm;
  NF_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));

  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = dim3(unsigned(num_sms * (config.two_ctas_per_sm ? kCtasPerSm : 1)));
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
  NF_CHECK(p.num_tokens >= 0 && p.num_tokens < 1 << 27, "T=" + std::to_string(p.num_tokens));
  NF_CHECK(p.num_seqs >= 0 && p.num_seqs <= UINT16_MAX, "S=" + std::to_string(p.num_seqs));
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
  NF_CHECK(max_tiles * p.num_kv_heads <= kCounters, "K=" + std::to_string(p.num_kv_heads));
  const LaunchConfig config{
      .queries_per_tile = queries_per_tile,
      .max_tiles = int(max_tiles),
      .leaves_wanted = leaves_wanted(p.num_kv_heads),
      .group_inverse = uint32_t((1 << 16) / p.group + 1),
      .score_scale = p.softmax_scale * (p.fp8_cache ? p.k_scale : 1.0f) * 1.44269504f,
      .two_ctas_per_sm = false,
  };
  dispatch<64, 128>("D", p.head_dim, [&](auto head_dim) {
    dispatch<1, 2>("tiles_n", tiles_n, [&](auto tiles_n) {
      if (p.fp8_cache)
        launch_attention<Config<Scalar, true, head_dim, tiles_n>>(p, config, stream);
      else
        launch_attention<Config<Scalar, false, head_dim, tiles_n>>(p, config, stream);
    });
  });
}

}  // namespace nf
