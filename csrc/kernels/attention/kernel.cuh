// SPDX-License-Identifier: Apache-2.0
// Attention over paged KV, a few queries a sequence. Grid: two CTAs an SM, whatever the batch; each streams
// an equal part of the line of pages (host/attention_schedule.h) through a ring of K and V pages. Bandwidth
// bound: reads 2*length*D elements a sequence and KV head, once per tile of 8 or 16 rows (a row = one query
// of one head).
//
// A page of 64 tokens: warp w scores tokens 16w.. as S^T [16, rows] = K [16, D] * Q^T: the keys are the
// product's long side, so 8 rows fill it. The warps agree on the rows' maxima, share the weights P [rows, 64]
// in 16 bits, and warp w computes O^T [D/4, rows] = V^T * P^T for its quarter of D. So the result is nowhere
// doubled, and merging leaves costs each thread 4 to 16 values. An e4m3 page is widened to half in registers,
// its pairs of neighbours in whatever order the widening gives: Q and O are permuted to match.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "kernels/attention/attention.h"
#include "kernels/attention/fold.cuh"
#include "kernels/attention/tiles.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/mma.cuh"

namespace nf::attn {

// (torch's build hides the constructors.)
template <class T>
__device__ __forceinline__ T round_to(float v) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

template <class Scalar_, bool kFp8_, int kHeadDim_, int kTilesN_>
struct Config {
  using Scalar = Scalar_;                                      // of q and out
  using Product = std::conditional_t<kFp8_, __half, Scalar_>;  // of the products' operands
  static constexpr bool kFp8 = kFp8_;                          // pages of e4m3?
  static constexpr int kHeadDim = kHeadDim_;                   // D
  static constexpr int kTilesN = kTilesN_;                     // 8 rows each
  static constexpr int kColumns = 8 * kTilesN;                 // rows of a tile: columns of the products
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kTilesM = kHeadDim / kWarps / 16;       // of a warp's share of D
  static constexpr int kStateFloats = kTilesM * kTilesN * 4;   // of o, a thread
  static constexpr int kRowBytes = kHeadDim * (kFp8 ? 1 : 2);  // of a page: one token
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kSlotBytes = kPageSize * kRowBytes;
  // With the stack, two CTAs fit an SM: 64 to 80 KB of pages in flight each.
  static constexpr int kRingBytes = (kTilesN == 1 ? 80 : 64) * 1024;
  static constexpr int kSlots = kRingBytes / kSlotBytes < 12 ? kRingBytes / kSlotBytes : 12;
  static constexpr int kPartialFloats = kStateFloats * kThreads + 2 * kColumns;
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

template <class C>
struct Smem {
  alignas(128) uint8_t ring[C::kSlots][C::kSlotBytes];
  StackSmem<C> stack;
  // Weights of a page; rows of 72 so that the 8 rows of a matrix fall into different banks.
  alignas(16) typename C::Product weights[C::kColumns][kPageSize + 8];
  alignas(16) float maxima[C::kWarps][C::kColumns];
  int num_tiles;
  int arrived;
  alignas(16) Tile tiles[1];  // as many as the launch provides for, and one more
};

// A page's 16-byte chunks are permuted within a row, so that the 8 rows of a matrix fall into different
// banks.
template <class C>
__device__ __forceinline__ uint32_t chunk_offset(int token, int chunk) {
  const int permuted = C::kChunks >= 8 ? chunk ^ (token & 7) : chunk ^ ((token >> 1) & 3);
  return uint32_t(token * C::kRowBytes + permuted * 16);
}

__device__ __forceinline__ uint32_t widen_e4m3(uint32_t pair) {  // the two low bytes
  const __half2_raw h = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(pair), __NV_E4M3);
  return uint32_t(h.x) | uint32_t(h.y) << 16;
}

// Brings pages of this CTA's part into the ring, K and V by turns.
template <class C>
struct Loader {
  const AttentionParams<typename C::Scalar>& p;
  const Line& line;
  uint32_t ring;  // shared address
  Cursor at, ahead;
  int64_t page_id, next_id;  // of `at`; of `ahead`, the page after it, which is fetched early
  int pages_left;            // from `at` on
  int slot;
  bool is_v;

  __device__ __forceinline__ int64_t id_of(const Cursor& c) const {
    return p.page_table[line.tiles[c.tile].seq * p.page_table_stride + c.page];
  }
  __device__ __forceinline__ Loader(const AttentionParams<typename C::Scalar>& p, const Line& line,
                                    uint32_t ring, const Cursor& begin, int num_pages)
      : p(p), line(line), ring(ring), at(begin), ahead(begin), pages_left(num_pages), slot(0), is_v(false) {
    page_id = id_of(at);
    ahead.advance(line);
    next_id = num_pages > 1 ? id_of(ahead) : 0;
  }

  // The next entry, or nothing at the end; one group of copies either way.
  __device__ __forceinline__ void issue() {
    if (pages_left > 0) {
      const int64_t element =
          page_id * (is_v ? p.v_page_stride : p.k_page_stride) + int64_t(at.head) * (kPageSize * C::kHeadDim);
      const char* from = static_cast<const char*>(is_v ? p.v_cache : p.k_cache) + element * (C::kFp8 ? 1 : 2);
      const int valid =
          line.tiles[at.tile].length - at.page * kPageSize;  // tokens; what is beyond may be NaN
      const uint32_t to = ring + uint32_t(slot * C::kSlotBytes);
#pragma unroll
      for (int i = 0; i < C::kSlotBytes / 16 / C::kThreads; ++i) {
        const int index = i * C::kThreads + int(threadIdx.x), token = index / C::kChunks;
        ptx::copy_async(to + chunk_offset<C>(token, index % C::kChunks), from + index * 16, token < valid);
      }
      if (is_v && --pages_left > 0) {
        at = ahead;
        page_id = next_id;
        ahead.advance(line);
        if (pages_left > 1) next_id = id_of(ahead);
      }
      is_v = !is_v;
      slot = slot + 1 == C::kSlots ? 0 : slot + 1;
    }
    ptx::commit_copies();
  }
};

// The queries of a tile and head, as fragments.
template <class C>
struct Queries {
  uint32_t fragment[C::kTilesN][C::kHeadDim / 16][2];
  int limit[C::kTilesN][2];  // tokens that columns 2q and 2q+1 see
  int least_limit;

  __device__ __forceinline__ void load(const AttentionParams<typename C::Scalar>& p,
                                       const LaunchConfig& config, const Tile tile, int head) {
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
      const typename C::Scalar* from = p.q + (int64_t(tile.token) + query) * p.q_stride +
                                       (head * p.group + row - query * p.group) * C::kHeadDim;
#pragma unroll
      for (int k = 0; k < C::kHeadDim / 16; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int d = C::kFp8 ? k * 16 + 4 * q + 2 * half : k * 16 + 2 * q + 8 * half;
          uint32_t v = valid ? *reinterpret_cast<const uint32_t*>(from + d) : 0u;
          if constexpr (!std::is_same_v<typename C::Scalar, typename C::Product>) {
            __nv_bfloat162 pair;
            memcpy(&pair, &v, sizeof(v));
            const float2 f = __bfloat1622float2(pair);
            constexpr float kMaxHalf = 65504.0f;
            const __half2 h = __floats2half2_rn(fminf(fmaxf(f.x, -kMaxHalf), kMaxHalf),
                                                fminf(fmaxf(f.y, -kMaxHalf), kMaxHalf));
            memcpy(&v, &h, sizeof(v));
          }
          fragment[n][k][half] = v;
        }
      }
    }
  }
};

// s [tile of rows][4] = this warp's 16 tokens of the page at `page` * Q^T, unscaled.
template <class C>
__device__ __forceinline__ void score_page(float (&s)[C::kTilesN][4], uint32_t page,
                                           const Queries<C>& queries) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int token = warp * 16 + (lane >> 3 & 1) * 8 + lane % 8;
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
  for (int pair = 0; pair < C::kChunks / 2; ++pair) {  // 32 bytes of each row
    uint32_t r[4];
    ptx::load_matrices(r, page + chunk_offset<C>(token, pair * 2 + (lane >> 4)));
    if constexpr (!C::kFp8) {
#pragma unroll
      for (int n = 0; n < C::kTilesN; ++n)
        ptx::mma<typename C::Product>(s[n], r, queries.fragment[n][pair][0], queries.fragment[n][pair][1]);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t low = r[2 * half], high = r[2 * half + 1];  // rows g and g+8
        const uint32_t a[4] = {widen_e4m3(low & 0xffff), widen_e4m3(high & 0xffff), widen_e4m3(low >> 16),
                               widen_e4m3(high >> 16)};
#pragma unroll
        for (int n = 0; n < C::kTilesN; ++n)
          ptx::mma<typename C::Product>(s[n], a, queries.fragment[n][2 * pair + half][0],
                                        queries.fragment[n][2 * pair + half][1]);
      }
    }
  }
}

// One step over 32 tokens of a page: the fragments of V^T for the first and the second 16 of them, for m-tile
// `t`.
template <class C>
__device__ __forceinline__ void load_values(uint32_t (&a)[2][4], uint32_t page, int tokens, int t) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int m_tile = warp * C::kTilesM + t;
  if constexpr (!C::kFp8) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = tokens + half * 16 + (lane >> 4) * 8 + lane % 8;
      ptx::load_matrices_trans(a[half], page + chunk_offset<C>(token, m_tile * 2 + (lane >> 3 & 1)));
    }
  } else {
    uint32_t r[4];
    ptx::load_matrices_trans(r, page + chunk_offset<C>(tokens + lane, m_tile));
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // a register has tokens 2q, 2q+1 of d = 2g, 2g+1
      const uint32_t first = __byte_perm(r[2 * half], 0, 0x3120),
                     second = __byte_perm(r[2 * half + 1], 0, 0x3120);
      a[half][0] = widen_e4m3(first & 0xffff), a[half][1] = widen_e4m3(first >> 16);
      a[half][2] = widen_e4m3(second & 0xffff), a[half][3] = widen_e4m3(second >> 16);
    }
  }
}

// o and l += V^T * P^T and 1 * P^T: the sum of the weights comes from the same product, rounded as they are.
template <class C>
__device__ __forceinline__ void add_values(State<C>& state, uint32_t page, uint32_t weights) {
  const int lane = threadIdx.x % kWarpSize;
  constexpr uint32_t kOne = std::is_same_v<typename C::Product, __half> ? 0x3C003C00u : 0x3F803F80u;
  const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
#pragma unroll
  for (int tokens = 0; tokens < kPageSize; tokens += 32) {
    uint32_t p[C::kTilesN][4];
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
      const int row = n * 8 + lane % 8, column = tokens + lane / 8 * 8;
      ptx::load_matrices(p[n], weights + uint32_t(row * (kPageSize + 8) + column) * 2);
    }
#pragma unroll
    for (int t = 0; t < C::kTilesM; ++t) {
      uint32_t a[2][4];
      load_values<C>(a, page, tokens, t);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < C::kTilesN; ++n)
          ptx::mma<typename C::Product>(state.o[t][n], a[half], p[n][2 * half], p[n][2 * half + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
      float sum[4] = {state.l[n][0], state.l[n][1], 0.0f, 0.0f};
      ptx::mma<typename C::Product>(sum, ones, p[n][0], p[n][1]);
      ptx::mma<typename C::Product>(sum, ones, p[n][2], p[n][3]);
      state.l[n][0] = sum[0], state.l[n][1] = sum[1];
    }
  }
}

}  // namespace nf::attn
