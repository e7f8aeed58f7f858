// SPDX-License-Identifier: Apache-2.0
// Attention over paged KV, a few queries a sequence. Grid: one or two CTAs an SM, whatever the lengths; each
// streams an equal part of the line of pages (host/attention_schedule.h). Bandwidth bound: reads 2*length*D
// elements a sequence and KV head, once per tile of 8 or 16 rows (a row = one query of one head).
//
// The four warps work on their own, without a barrier, until a leaf ends. A CTA takes two pages at a time:
// warp w tokens 32 (w % 2) .. of page w / 2, through a ring that only it reads and fills. It scores them as
// S^T [32, rows] = K [32, D] * Q^T and adds O^T [D, rows] += V^T * P^T: the keys are the product's long side,
// so 8 rows fill it, and P turns from result to operand within a register (movmatrix). An e4m3 page is
// widened to half in registers, its pairs of neighbours in whatever order the widening gives: Q and O are
// permuted to match. At a leaf's end the warps' results are merged through shared memory, and are then spread
// over the threads by rows (fold.cuh).
//
// At batch 1 and short contexts all is latency. So the tiles, the page ids and the ring's first loads, all
// that the predecessor does not write, come before wait_for_predecessor(); attention.h says what that
// demands. (The kernels that may still run then are of the same step: each of them waits for its predecessor
// before it ends, and a step starts without overlap.) What CTAs tell each other is its own flag (fold.cuh).
// And a CTA takes little enough of an SM that the next linear fits beside it and fills its own ring.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "kernels/attention/attention.h"
#include "kernels/attention/tiles.cuh"
#include "kernels/common/vec.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/l2_policy.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/rope/rotate.cuh"

namespace nf::attn {

// (torch's build hides the constructors.)
template <class T>
__device__ __forceinline__ T round_to(float v) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

template <class T>
__device__ __forceinline__ uint32_t round_pair(float2 v) {
  const auto rounded = PairOf<T>::round(v);
  uint32_t word;
  memcpy(&word, &rounded, sizeof(word));
  return word;
}
template <class T>
__device__ __forceinline__ float2 widen_pair(uint32_t word) {
  typename PairOf<T>::Type v;
  memcpy(&v, &word, sizeof(v));
  return PairOf<T>::widen(v);
}

template <class Scalar_, bool kFp8_, int kHeadDim_, int kTilesN_, bool kMany_ = false>
struct Config {
  using Scalar = Scalar_;                                      // of q and the result
  using Product = std::conditional_t<kFp8_, __half, Scalar_>;  // of the products' operands
  static constexpr bool kFp8 = kFp8_;                          // pages of e4m3?
  static constexpr int kHeadDim = kHeadDim_;                   // D
  static constexpr int kTilesN = kTilesN_;                     // 8 rows each
  static constexpr int kColumns = 8 * kTilesN;                 // rows of a tile: columns of the products
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;

  static constexpr int kStepTokens = 32;                       // of a warp
  static constexpr int kTilesM = kHeadDim / 16;                // of O^T
  static constexpr int kRowBytes = kHeadDim * (kFp8 ? 1 : 2);  // of a page: one token
  static constexpr int kChunks = kRowBytes / 16;

  // A slot of a warp's ring: 32 * D bytes of K or of V, also what 8 rows of floats take.
  static constexpr int kSlotBytes = 32 * kHeadDim;
  static constexpr int kSlotTokens = kSlotBytes / kRowBytes;
  static constexpr int kUnitSlots = kStepTokens / kSlotTokens;  // a unit: K or V of a step
  static constexpr int kPhases = 2 * kUnitSlots;                // slots of a step
  // The stack takes 20 or 41 KB: so two CTAs fit an SM, or one and the next linear; kMany's also have 18 KB
  // for what they fetch. In a long ring a CTA has all that it reads of a single short sequence; with many
  // pairs more in flight is slower. (An H100, e4m3: a single sequence of 1,024 tokens, between linears, 6.7
  // us, with 48 KB 8.3 us. A step of 128 of them 22.07 ms with 48 KB, 22.18 with 64, 22.26 with 80.)
  static constexpr bool kMany = kMany_;  // more than few_pairs(), and kTilesN == 1
  static constexpr int kRingBytes = (kMany && kFp8 ? 48 : kMany || kTilesN == 2 ? 64 : 80) * 1024;
  static constexpr int kSlots = kRingBytes / kWarps / kSlotBytes;
  static_assert(kSlots >= 2 * kUnitSlots);

  static constexpr int kParts = kHeadDim / 64;  // of a thread's share of a row, 4 floats each

  // kMany: subtrees of other CTAs that an owner takes out of memory early (Pair::fetch). All there are, if
  // one CTA has them and the pair has 8 leaves, or up to 6.
  static constexpr int kFetched = 3;
};

struct LaunchConfig {
  int queries_per_tile;
  int max_tiles;
  int leaves_wanted;
  uint32_t group_inverse;  // 2^16 / G, rounded up
  float score_scale;       // softmax_scale * k_scale * log2(e)
  bool two_ctas_per_sm;

  // Exact for the 16 rows of a tile, and much faster than a division.
  __device__ __forceinline__ int query_of(int row) const { return int(uint32_t(row) * group_inverse >> 16); }
};

// A slot's 16-byte chunks are permuted within a row, so that the 8 rows of a matrix fall into different
// banks.
template <class C>
__device__ __forceinline__ uint32_t chunk_offset(int token, int chunk) {
  const int permuted = C::kChunks >= 8 ? chunk ^ (token & 7) : chunk ^ ((token >> 1) & 3);
  return uint32_t(token * C::kRowBytes + permuted * 16);
}

// Of a warp's unit: two tokens' worth of slots may be apart, where the ring wraps.
template <class C>
struct Unit {
  uint32_t slot[C::kUnitSlots];  // shared addresses

  // The address of a chunk, where `token` is first + offset, `first` a constant and a multiple of 8.
  __device__ __forceinline__ uint32_t chunk(int first, int offset, int chunk) const {
    return slot[first / C::kSlotTokens] + chunk_offset<C>(first % C::kSlotTokens + offset, chunk);
  }
  // The same for any token.
  __device__ __forceinline__ uint32_t token(int token, int chunk) const {
    const uint32_t of = C::kUnitSlots == 2 && token >= C::kSlotTokens ? slot[C::kUnitSlots - 1] : slot[0];
    return of + chunk_offset<C>(token % C::kSlotTokens, chunk);
  }
};

// A warp's way through its pages of the CTA's leaves; starts before the first.
struct WarpPages {
  const Line& line;
  Leaf leaf;
  int page;
  int pages_left;  // of the CTA's, from `leaf` on

  __device__ __forceinline__ WarpPages(const Line& line, const Leaf& first, int num_pages)
      : line(line), leaf(first), page(first_page(first) - kPagesAtOnce), pages_left(num_pages) {}
  static __device__ __forceinline__ int first_page(const Leaf& leaf) {
    return leaf.first + int(threadIdx.x) / (2 * kWarpSize);
  }
  // First token of the warp's share of a page.
  static __device__ __forceinline__ int first_token(int page) {
    return page * kPageSize + int(threadIdx.x) / kWarpSize % 2 * (kPageSize / 2);
  }
  // The warp's first token from `token` on. (Leaves start at multiples of kPagesAtOnce.)
  static __device__ __forceinline__ int first_token_from(int token) {
    constexpr int kShare = kPageSize / 2, kShares = 2 * kPagesAtOnce;
    const int share = token / kShare, to_skip = (int(threadIdx.x) / kWarpSize - share) & (kShares - 1);
    return to_skip == 0 ? token : (share + to_skip) * kShare;
  }
  __device__ __forceinline__ bool done() const { return pages_left == 0; }
  __device__ __forceinline__ void advance() {
    page += kPagesAtOnce;
#pragma unroll 1
    while (page >= leaf.end) {  // the leaf ends before the warp's page
      pages_left -= leaf.size();
      if (pages_left == 0) return;
      leaf.advance(line);
      page = first_page(leaf);
    }
  }
};

// Brings this warp's pages into its ring, K and V by turns.
template <class C>
struct Loader {
  const AttentionParams<typename C::Scalar>& p;
  WarpPages at;
  int64_t page_id;  // of `at`
  int offset;       // of this lane's first chunk of the warp's share, bytes from the page's beginning
  int num_valid;    // tokens of the share that are cached; the rest may be NaN
  int num_old;      // those that earlier steps have written
  // As a rule: pages of several tiles, or of a beginning that sequences share, are read again. (These have
  // not been timed.)
  const uint64_t read_once = ptx::evict_first_policy();

  // Called once the slots of the page before are filled, or before the first: page_id takes its time.
  __device__ __forceinline__ void next_page() {
    if (at.done()) return;
    at.advance();
    if (at.done()) return;
    const Tile& tile = at.line.tiles[at.leaf.tile];
    const int first = WarpPages::first_token(at.page);
    page_id = p.page_table[tile.seq * p.page_table_stride + at.page];  // not used before the next fill()
    offset =
        (at.leaf.head * kPageSize + first % kPageSize) * C::kRowBytes + int(threadIdx.x) % kWarpSize * 16;
    num_old = tile.num_old() - first;
    num_valid = p.append.k != nullptr ? num_old : tile.length - first;
  }
  // `phase`: the next slot's place in the step, of K's, then of V's.
  static __device__ __forceinline__ int token_in_share(int phase) {
    return phase % C::kUnitSlots * C::kSlotTokens;
  }

  // Does the next slot hold nothing that this step's kernels have yet to write?
  __device__ __forceinline__ bool is_old(int phase) const {
    return at.done() || p.append.k != nullptr || token_in_share(phase) + C::kSlotTokens <= num_old;
  }

  // Fills the next slot, `to`, or nothing at the end; one group of copies either way.
  __device__ __forceinline__ void fill(uint32_t to, int phase) {
    if (!at.done()) {
      const int lane = threadIdx.x % kWarpSize, first = token_in_share(phase);
      const bool is_v = phase >= C::kUnitSlots;
      const char* cache = static_cast<const char*>(is_v ? p.v_cache : p.k_cache);
      const int64_t page_bytes = (is_v ? p.v_page_stride : p.k_page_stride) * (C::kFp8 ? 1 : 2);
      const char* from = cache + page_id * page_bytes + offset + first * C::kRowBytes;
      // The warp takes kRows tokens at a time. The permutation of token i * kRows + j is that of j, and of
      // i * kRows, which is a constant.
      constexpr int kRows = kWarpSize / C::kChunks;
      const int row = lane / C::kChunks;
      const uint32_t place = chunk_offset<C>(row, lane % C::kChunks);
#pragma unroll
      for (int i = 0; i < C::kSlotTokens / kRows; ++i) {
        constexpr bool kPermutes = C::kChunks >= 8;
        const uint32_t permuted = place ^ uint32_t(kPermutes ? i * kRows % 8 * 16 : 0);
        ptx::copy_async(to + permuted + uint32_t(i * kRows * C::kRowBytes), from + i * kRows * C::kRowBytes,
                        first + i * kRows + row < num_valid, read_once);
      }
    }
    ptx::commit_copies();
  }
};

__device__ __forceinline__ uint32_t widen_e4m3(uint32_t pair) {  // the two low bytes
  const __half2_raw h = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(pair), __NV_E4M3);
  return uint32_t(h.x) | uint32_t(h.y) << 16;
}

// The queries of a tile and head, as fragments.
template <class C>
struct Queries {
  using Scalar = typename C::Scalar;
  uint32_t fragment[C::kTilesN][C::kHeadDim / 16][2];
  int limit[C::kTilesN][2];  // tokens that columns 2q and 2q+1 see
  int least_limit;

  // First element of a fragment's register.
  static __device__ __forceinline__ int element_of(int k, int half) {
    const int q = threadIdx.x % 4;
    return C::kFp8 ? k * 16 + 4 * q + 2 * half : k * 16 + 2 * q + 8 * half;
  }

  __device__ __forceinline__ void load(const AttentionParams<Scalar>& p, const LaunchConfig& config,
                                       const Tile tile, int head) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, q = lane % 4;
    const int num_queries = tile.queries;
    least_limit = tile.length - (num_queries - 1);
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        limit[n][i] = min(tile.length, least_limit + config.query_of(n * 8 + 2 * q + i));
      const int row = n * 8 + g, query = config.query_of(row);
      const bool valid = query < num_queries;
      const Scalar* from = p.q + (int64_t(tile.token) + query) * p.q_stride +
                           (head * p.group + row - query * p.group) * C::kHeadDim;
#pragma unroll
      for (int k = 0; k < C::kHeadDim / 16; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          fragment[n][k][half] = valid ? *reinterpret_cast<const uint32_t*>(from + element_of(k, half)) : 0u;
      }
      if (p.append.k != nullptr && valid) rotate_row(n, p, least_limit - 1 + query);
      if constexpr (!std::is_same_v<Scalar, typename C::Product>) to_half(n);
    }
  }

 private:
  __device__ __forceinline__ void rotate_row(int n, const AttentionParams<Scalar>& p, int position) {
    const float* angles = p.append.cos_sin + position * p.append.cos_sin_stride;
    constexpr int kHalf = C::kHeadDim / 2;
#pragma unroll
    for (int k = 0; k < kHalf / 16; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = element_of(k, half);
        uint32_t &low = fragment[n][k][half], &high = fragment[n][k + kHalf / 16][half];
        const HalfPairs v = nf::rotate({widen_pair<Scalar>(low), widen_pair<Scalar>(high)},
                                       *reinterpret_cast<const float2*>(angles + d),
                                       *reinterpret_cast<const float2*>(angles + kHalf + d));
        low = round_pair<Scalar>(v.low), high = round_pair<Scalar>(v.high);
      }
    }
  }

  __device__ __forceinline__ void to_half(int n) {
#pragma unroll
    for (int k = 0; k < C::kHeadDim / 16; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const __half2 largest = __half2half2(__ushort_as_half(0x7bff));
        const __half2 v = PairOf<__half>::round(widen_pair<Scalar>(fragment[n][k][half]));
        const __half2 finite = __hmin2(__hmax2(v, __hneg2(largest)), largest);
        memcpy(&fragment[n][k][half], &finite, sizeof(finite));
      }
    }
  }
};

// A warp's result of a leaf, as the products leave it: rows 2q and 2q+1 of each n, d by t and lane.
template <class C>
struct Fragments {
  float o[C::kTilesM][C::kTilesN][4];
  float m[C::kTilesN][2];  // largest score, in units of log 2
  float l[C::kTilesN][2];  // sum of the weights

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) m[n][i] = -INFINITY, l[n][i] = 0.0f;
#pragma unroll
      for (int t = 0; t < C::kTilesM; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[t][n][e] = 0.0f;
      }
    }
  }
};

template <class C>
using Scores = float[2][C::kTilesN][4];  // of 16 tokens each: rows g and g+8, columns 2q and 2q+1

// score = the warp's 32 tokens * Q^T, unscaled. Even and odd steps in two chains, which are half as long.
template <class C>
__device__ __forceinline__ void score_unit(Scores<C>& score, const Unit<C>& keys, const Queries<C>& queries) {
  const int lane = threadIdx.x % kWarpSize, token = (lane >> 3 & 1) * 8 + lane % 8;
  Scores<C> chain[2] = {};
#pragma unroll
  for (int pair = 0; pair < C::kChunks / 2; ++pair) {  // 32 bytes of each row
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      uint32_t r[4];
      ptx::load_matrices(r, keys.chunk(tile * 16, token, pair * 2 + (lane >> 4)));
      if constexpr (!C::kFp8) {
#pragma unroll
        for (int n = 0; n < C::kTilesN; ++n)
          ptx::mma<typename C::Product>(chain[pair % 2][tile][n], r, queries.fragment[n][pair][0],
                                        queries.fragment[n][pair][1]);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t low = r[2 * half], high = r[2 * half + 1];  // rows g and g+8
          const uint32_t a[4] = {widen_e4m3(low & 0xffff), widen_e4m3(high & 0xffff), widen_e4m3(low >> 16),
                                 widen_e4m3(high >> 16)};
#pragma unroll
          for (int n = 0; n < C::kTilesN; ++n)
            ptx::mma<typename C::Product>(chain[half][tile][n], a, queries.fragment[n][2 * pair + half][0],
                                          queries.fragment[n][2 * pair + half][1]);
        }
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) score[tile][n][e] = chain[0][tile][n][e] + chain[1][tile][n][e];
    }
  }
}

// exp2(m - reference), 0 for a state without keys.
__device__ __forceinline__ float weight_of(float m, float reference) {
  return ptx::exp2_flush(m - (reference == -INFINITY ? 0.0f : reference));
}

// Scores -> weights, in units of the maximum, to which the state is rescaled; as the fragments of P^T that
// its product with V^T takes: weights[tile] are 16 tokens.
template <class C>
__device__ __forceinline__ void to_weights(uint32_t (&weights)[2][C::kTilesN][2], Fragments<C>& state,
                                           Scores<C>& score, float scale, const Queries<C>& queries,
                                           int first_token) {
  const int g = threadIdx.x % kWarpSize / 4;
  const bool masks = first_token + C::kStepTokens > queries.least_limit;
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    float rescale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = state.m[n][i];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& v = score[tile][n][2 * half + i];
          v *= scale;
          if (masks && first_token + tile * 16 + half * 8 + g >= queries.limit[n][i]) v = -INFINITY;
          largest = fmaxf(largest, v);
        }
      }
#pragma unroll
      for (int mask = 4; mask < kWarpSize; mask *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, mask));
      rescale[i] = weight_of(state.m[n][i], largest);
      state.m[n][i] = largest;
      state.l[n][i] *= rescale[i];
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 pair{weight_of(score[tile][n][2 * half], state.m[n][0]),
                          weight_of(score[tile][n][2 * half + 1], state.m[n][1])};
        weights[tile][n][half] = ptx::transpose_matrix(round_pair<typename C::Product>(pair));
      }
    }
#pragma unroll
    for (int t = 0; t < C::kTilesM; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state.o[t][n][e] *= rescale[e & 1];
    }
  }
}

// The fragments of V^T of the unit's 2 x 16 tokens, for m-tile t.
template <class C>
__device__ __forceinline__ void load_values(uint32_t (&a)[2][4], const Unit<C>& values, int t) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (!C::kFp8) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      ptx::load_matrices_trans(a[tile],
                               values.chunk(tile * 16, (lane >> 4) * 8 + lane % 8, t * 2 + (lane >> 3 & 1)));
  } else {
    uint32_t r[4];
    ptx::load_matrices_trans(r, values.chunk(0, lane, t));
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {  // a register has tokens 2q, 2q+1 of d = 2g, 2g+1
      const uint32_t first = __byte_perm(r[2 * tile], 0, 0x3120),
                     second = __byte_perm(r[2 * tile + 1], 0, 0x3120);
      a[tile][0] = widen_e4m3(first & 0xffff), a[tile][1] = widen_e4m3(first >> 16);
      a[tile][2] = widen_e4m3(second & 0xffff), a[tile][3] = widen_e4m3(second >> 16);
    }
  }
}

// o and l += V^T * P^T and 1 * P^T: the sum of the weights comes from the same product, rounded as they are.
template <class C>
__device__ __forceinline__ void add_values(Fragments<C>& state, const Unit<C>& values,
                                           const uint32_t (&weights)[2][C::kTilesN][2]) {
  constexpr uint32_t kOne = std::is_same_v<typename C::Product, __half> ? 0x3C003C00u : 0x3F803F80u;
  const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
#pragma unroll
  for (int t = 0; t < C::kTilesM; ++t) {
    uint32_t a[2][4];
    load_values<C>(a, values, t);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int n = 0; n < C::kTilesN; ++n)
        ptx::mma<typename C::Product>(state.o[t][n], a[tile], weights[tile][n][0], weights[tile][n][1]);
    }
  }
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    float sum[4] = {state.l[n][0], state.l[n][1], 0.0f, 0.0f};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      ptx::mma<typename C::Product>(sum, ones, weights[tile][n][0], weights[tile][n][1]);
    state.l[n][0] = sum[0], state.l[n][1] = sum[1];
  }
}

}  // namespace nf::attn
