// SPDX-License-Identifier: Apache-2.0
// Rows with statistics (row_stats.h), inside kernels that read or write them.
#pragma once

#include <type_traits>

#include "kernels/common/device.cuh"
#include "kernels/common/vec.cuh"
#include "kernels/norm/row_stats.h"
#include "kernels/quant/fp8.cuh"

namespace nf {

// What a row's elements are multiplied with and divided by.
struct RowFactors {
  float inv_rms;      // 1 without a norm
  Divisor fp8_scale;  // of an e4m3 result
};

// A part of a row: {sum of squares, largest |x * w|}.
__device__ __forceinline__ float2 merge_stats(float2 a, float2 b) { return {a.x + b.x, fmaxf(a.y, b.y)}; }

// Of two neighbouring columns x with norm weights w.
__device__ __forceinline__ float2 pair_stats(float2 x, float2 w) {
  return {fmaf(x.x, x.x, x.y * x.y), fmaxf(fabsf(x.x * w.x), fabsf(x.y * w.y))};
}

__device__ __forceinline__ float2 shuffle_xor(float2 v, int mask) {
  return {__shfl_xor_sync(kFullWarp, v.x, mask), __shfl_xor_sync(kFullWarp, v.y, mask)};
}

// Of a block of 128 columns of which 16 neighbouring lanes have 8 each (zeros beyond the row), in all of them.
// Added in the order in which the epilogue of packed_linear adds, so that it makes no difference to a row who
// made its statistics: strips of 16 columns, within a strip as a wgmma fragment has them.
template <class Scalar>
__device__ __forceinline__ float2 block_stats(const Vec<Scalar>& x, const Vec<Scalar>& weight) {
  float2 pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pair[i] = pair_stats(x.pair(i), weight.pair(i));
    pair[i] = merge_stats(pair[i], shuffle_xor(pair[i], 1));
  }
  const float2 strip = merge_stats(merge_stats(pair[0], pair[1]), merge_stats(pair[2], pair[3]));
  float2 block{0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    block = merge_stats(block, {__shfl_sync(kFullWarp, strip.x, 2 * i, 16),
                                __shfl_sync(kFullWarp, strip.y, 2 * i, 16)});
  return block;
}

__device__ __forceinline__ RowFactors factors_of(float2 row, int dim, bool has_norm, float eps,
                                                 const float* fp8_scale) {
  const float inv_rms = has_norm ? rsqrtf(row.x / float(dim) + eps) : 1.0f;
  const float own_scale = row.y * inv_rms / kMaxFp8;
  return {inv_rms, fp8_scale ? *fp8_scale : own_scale < kMinScale ? kMinScale : own_scale};  // NaN stays
}

// A row's statistics from those of its blocks, by one warp, the same in each lane; `block(i)` gives a block's.
// kAtOnce: loads under way.
template <int kAtOnce, class F>
__device__ __forceinline__ float2 merge_blocks(int num_blocks, F&& block) {
  float2 row{0.0f, 0.0f};
  for (int first = int(threadIdx.x % kWarpSize); first < num_blocks; first += kAtOnce * kWarpSize) {
    float2 part[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      part[i] = first + i * kWarpSize < num_blocks ? block(first + i * kWarpSize) : float2{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) row = merge_stats(row, part[i]);
  }
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) row = merge_stats(row, shuffle_xor(row, mask));
  return row;
}

// Row `token`'s, by one warp, the same in each lane.
__device__ __forceinline__ RowFactors row_factors(const RowStatsParams& p, int64_t token, int dim) {
  const float2* blocks = p.stats + token * p.num_blocks;
  const float2 row = merge_blocks<8>(p.num_blocks, [&](int i) { return __ldcg(blocks + i); });
  return factors_of(row, dim, p.norm_weight != nullptr, p.eps, p.fp8_scale);
}

// v * inv_rms, rounded, times the norm's weight, rounded again: as rms_norm.h has it.
template <class Pair>
__device__ __forceinline__ Pair normalize(Pair v, float inv_rms, Pair weight) {
  using Scalar = std::conditional_t<std::is_same_v<Pair, __half2>, __half, __nv_bfloat16>;
  const float2 f = PairOf<Scalar>::widen(v), w = PairOf<Scalar>::widen(weight);
  const float2 n = round_through<Scalar>({f.x * inv_rms, f.y * inv_rms});
  return PairOf<Scalar>::round({n.x * w.x, n.y * w.y});
}

template <class Scalar>
__device__ __forceinline__ Vec<Scalar> normalize(const Vec<Scalar>& v, float inv_rms,
                                                 const Vec<Scalar>& weight) {
  Vec<Scalar> out;
#pragma unroll
  for (int i = 0; i < Vec<Scalar>::kPairs; ++i) {
    typename PairOf<Scalar>::Type a, b;
    memcpy(&a, &v.word[i], sizeof(a));
    memcpy(&b, &weight.word[i], sizeof(b));
    a = normalize(a, inv_rms, b);
    memcpy(&out.word[i], &a, sizeof(a));
  }
  return out;
}

}  // namespace nf
