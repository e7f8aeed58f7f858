// SPDX-License-Identifier: Apache-2.0
// KV append within attention: the warp whose unit holds a new token rotates its k, puts k and v where the
// ring has zeros, and writes them to the cache, for whoever reads that page in later steps.
#pragma once

#include "kernels/attention/kernel.cuh"
#include "kernels/quant/fp8.cuh"

namespace nf::attn {

// Of what is appended to pages of e4m3.
struct CacheScales {
  Divisor k, v;
};

// One new token's k and v of a KV head: a lane has two neighbours and their partners D/2 further on.
template <class C>
struct NewToken {
  using Scalar = typename C::Scalar;
  static constexpr int kHalf = C::kHeadDim / 2;
  int position = -1;  // in its sequence
  int64_t page_id;
  uint32_t k[2], v[2];
  float2 cos, sin;

  static __device__ __forceinline__ int element() { return int(threadIdx.x % kWarpSize) * 2; }
  static __device__ __forceinline__ bool is_used() { return element() < kHalf; }

  __device__ __forceinline__ void load(const AttentionParams<Scalar>& p, const Tile& tile, int head, int at) {
    position = at;
    if (!is_used()) return;
    const int64_t row = tile.row_of(position) * p.q_stride + head * C::kHeadDim + element();
    const float* angles = p.append.cos_sin + position * p.append.cos_sin_stride + element();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      k[half] = *reinterpret_cast<const uint32_t*>(p.append.k + row + half * kHalf);
      v[half] = *reinterpret_cast<const uint32_t*>(p.append.v + row + half * kHalf);
    }
    cos = *reinterpret_cast<const float2*>(angles);
    sin = *reinterpret_cast<const float2*>(angles + kHalf);
    page_id = p.page_table[tile.seq * p.page_table_stride + position / kPageSize];
  }

  // Into the units; and, by the tile that has its query, into the cache.
  __device__ __forceinline__ void store(const AttentionParams<Scalar>& p, const CacheScales& scales,
                                        const Tile& tile, int head, const Unit<C>& keys,
                                        const Unit<C>& values) const {
    if (!is_used()) return;
    const HalfPairs rotated = nf::rotate({widen_pair<Scalar>(k[0]), widen_pair<Scalar>(k[1])}, cos, sin);
    uint32_t new_k = round_pair<Scalar>(rotated.low), new_v = v[0];
    const bool is_mine = position >= tile.length - int(tile.queries);
    const int64_t row = int64_t(head * kPageSize + position % kPageSize) * C::kHeadDim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int d = element() + half * kHalf, token = position % C::kStepTokens;
      const Stored of_k = stored(new_k, scales.k), of_v = stored(new_v, scales.v);
      put(keys, token, d, of_k);
      put(values, token, d, of_v);
      if (is_mine) {
        static_cast<Stored*>(p.k_cache)[(page_id * p.k_page_stride + row + d) / 2] = of_k;
        static_cast<Stored*>(p.v_cache)[(page_id * p.v_page_stride + row + d) / 2] = of_v;
      }
      new_k = round_pair<Scalar>(rotated.high), new_v = v[1];
    }
  }

 private:
  using Stored = std::conditional_t<C::kFp8, __nv_fp8x2_storage_t, uint32_t>;  // two elements

  static __device__ __forceinline__ Stored stored(uint32_t pair, const Divisor& scale) {
    if constexpr (C::kFp8)
      return Stored(to_fp8(widen_pair<Scalar>(pair), scale));
    else
      return pair;
  }
  static __device__ __forceinline__ void put(const Unit<C>& unit, int token, int d, Stored pair) {
    const int byte = d / 2 * int(sizeof(Stored));
    *static_cast<Stored*>(__cvta_shared_to_generic(unit.token(token, byte / 16) + byte % 16)) = pair;
  }
};

// The new tokens of a warp's share of a page, [first, end), by position; may be none.
struct NewTokens {
  int first, end;

  __device__ __forceinline__ NewTokens(const Tile& tile, int first_token, int num_tokens)
      : first(max(tile.num_old(), first_token)), end(min(tile.length, first_token + num_tokens)) {}
  __device__ __forceinline__ bool any() const { return first < end; }
};

}  // namespace nf::attn
