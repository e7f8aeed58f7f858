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

// Of a part of a row: {sum of squares, largest |x * w|}, or where nobody wants the latter the sum alone.
__device__ __forceinline__ float2 merge_stats(float2 a, float2 b) { return {a.x + b.x, fmaxf(a.y, b.y)}; }
__device__ __forceinline__ float merge_stats(float a, float b) { return a + b; }

// Of two neighbouring columns x with norm weights w.
__device__ __forceinline__ float2 pair_stats(float2 x, float2 w) {
  return {fmaf(x.x, x.x, x.y * x.y), fmaxf(fabsf(x.x * w.x), fabsf(x.y * w.y))};
}

__device__ __forceinline__ float shuffle_xor(float v, int mask) {
  return __shfl_xor_sync(kFullWarp, v, mask);
}
__device__ __forceinline__ float2 shuffle_xor(float2 v, int mask) {
  return {shuffle_xor(v.x, mask), shuffle_xor(v.y, mask)};
}

// Lane `lane`'s of each 16.
__device__ __forceinline__ float2 shuffle(float2 v, int lane) {
  return {__shfl_sync(kFullWarp, v.x, lane, 16), __shfl_sync(kFullWarp, v.y, lane, 16)};
}

constexpr int kStripLanes = 2, kBlockStrips = 8, kBlockLanes = kStripLanes * kBlockStrips;

// Of a strip of 16 columns of which two neighbouring lanes have 8 each (zeros beyond the row), in both. Added
// in the order in which the epilogue of packed_linear adds, so that it makes no difference to a row who made
// its statistics: blocks of strips, within a strip as a wgmma fragment has them. Stats: float2 or float.
template <class Stats, class Scalar>
__device__ __forceinline__ Stats strip_stats(const Vec<Scalar>& x, const Vec<Scalar>& weight) {
  Stats pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 both = pair_stats(x.pair(i), weight.pair(i));
    if constexpr (std::is_same_v<Stats, float>)
      pair[i] = both.x;
    else
      pair[i] = both;
    pair[i] = merge_stats(pair[i], shuffle_xor(pair[i], 1));
  }
  return merge_stats(merge_stats(pair[0], pair[1]), merge_stats(pair[2], pair[3]));
}

// Of a block of 128 columns; `strip(i)` gives its i-th strip's.
template <class Stats, class F>
__device__ __forceinline__ Stats block_stats(F&& strip) {
  Stats block{};
#pragma unroll
  for (int i = 0; i < kBlockStrips; ++i) block = merge_stats(block, strip(i));
  return block;
}

__device__ __forceinline__ float inv_rms_of(float sum_of_squares, int dim, float eps) {
  return rsqrtf(sum_of_squares / float(dim) + eps);
}
// largest: |x * w| of the row.
__device__ __forceinline__ float own_fp8_scale(float largest, float inv_rms) {
  const float scale = largest * inv_rms / kMaxFp8;
  return scale < kMinScale ? kMinScale : scale;  // NaN stays
}

// A row's statistics from those of its blocks, by one warp, the same in each lane; `block(i)` gives a
// block's. kAtOnce: loads under way.
template <int kAtOnce, class F>
__device__ __forceinline__ auto merge_blocks(int num_blocks, F&& block) {
  using Stats = decltype(block(0));
  Stats row{};
#pragma unroll 1
  for (int first = int(threadIdx.x % kWarpSize); first < num_blocks; first += kAtOnce * kWarpSize) {
    Stats part[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      part[i] = first + i * kWarpSize < num_blocks ? block(first + i * kWarpSize) : Stats{};
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
  const float inv_rms = p.norm_weight ? inv_rms_of(row.x, dim, p.eps) : 1.0f;
  return {inv_rms, p.fp8_scale ? *p.fp8_scale : own_fp8_scale(row.y, inv_rms)};
}

// v * inv_rms, rounded, times the norm's weight, rounded again: as rms_norm.h has it.
template <class Pair>
__device__ __forceinline__ Pair normalize(Pair v, float inv_rms, Pair weight) {
  using Scalar = std::conditional_t<std::is_same_v<Pair, __half2>, __half, __nv_bfloat16>;
  const float2 f = PairOf<Scalar>::widen(v);
  return __hmul2_rn(PairOf<Scalar>::round({f.x * inv_rms, f.y * inv_rms}), weight);
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
