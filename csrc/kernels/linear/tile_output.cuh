// SPDX-License-Identifier: Apache-2.0
// From a warpgroup's finished sums to the output, in two steps: scaled and rounded to bf16, which halves the
// registers; then turned round through shared memory and stored by the bulk engine, 32 tokens at a time,
// which may be while the products of the next tile run. (With stores of the warps' own between those products
// all linears of a step of 2,048 tokens took 166 ms on an H100, so 146: a product seems to wait for them.)
// The rounding points are those of epilogue.cuh.
#pragma once

#include "host/weight_layout.h"
#include "kernels/linear/epilogue.cuh"
#include "kernels/ptx/bulk_copy.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/named_barrier.cuh"
#include "kernels/ptx/tensor_map.h"
#include "kernels/quant/fp8.cuh"

namespace nf {
namespace {

constexpr int kGroupTokens = 8;   // of which a thread has two, 2q and 2q + 1 for q = lane % 4
constexpr int kBoxTokens = 16;    // of a store
constexpr int kPieceTokens = 32;  // that are staged at once
constexpr int kPieceGroups = kPieceTokens / kGroupTokens, kPieceBoxes = kPieceTokens / kBoxTokens;

using Staging = uint8_t[kPieceTokens * kTileRows * 2];  // [tokens][rows] bf16 or e4m3, swizzled as boxes

// Sums of a thread, in 64 rows x C::kTokens tokens of a warpgroup.
template <class C>
using Accumulators = float[C::kTokens / 2];

// What a warpgroup's tile is scaled by. Copied while it multiplies: a load at the end would wait for L2.
template <class C>
struct TileScales {
  alignas(8) float token[C::kTokens];
  float row[kTileRows];

  // By a warp.
  __device__ __forceinline__ void start_loading(const PackedLinearParams& p, int first_row, int first_token,
                                                int lane) {
#pragma unroll
    for (int i = lane; i < C::kTokens; i += kWarpSize) {
      const int at = p.x_scale_per_token ? min(first_token + i, p.num_tokens - 1) : 0;
      load(token[i], p.x_scale, at);
    }
#pragma unroll
    for (int i = lane; i < kTileRows; i += kWarpSize) {
      const int packed_row = min(first_row + i, p.num_rows - 1);
      load(row[i], p.weight_scale, row_scale_index(p, packed_row));
    }
    ptx::commit_copies();
  }

 private:
  __device__ __forceinline__ void load(float& to, const float* from, int at) {
    if (from)
      ptx::copy_word_async(ptx::smem_address(&to), from + at);
    else
      to = 1.0f;
  }
};

// Where chunk `chunk` of kChunks of a token's row is, in a box of that width (tensor_map.h).
template <int kChunks>
__device__ __forceinline__ int staged_offset(int token, int chunk) {
  return (token * kChunks + (chunk ^ token / (8 / kChunks) % kChunks)) * kChunkBytes;
}

__device__ __forceinline__ uint32_t bits_of(__nv_bfloat162 v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof(bits));
  return bits;
}

// A warpgroup's 64 rows of a tile: what is left to store of its last tile; and, once that is stored, the
// upper parts of sums of the present one. C has kTokens and kFolds.
template <class C>
struct TileOutput {
  static constexpr int kStoreSteps = 2 * (C::kTokens / kPieceTokens);  // of a tile, each behind a k tile

  const PackedLinearParams& p;
  const CUtensorMap& out_map;
  Staging (&staging)[2];
  const Divisor& out_scale;
  const int barrier;       // for this warpgroup alone
  int row = 0, token = 0;  // the first
  int num_boxes = 0;       // left to store, the first ones of `r_words`
  int buffer = 0;          // of `staging`, the next
  // For each 8 tokens, of the thread's two, 2q and 2q + 1: values in row g, and in row g + 8, of the
  // warp's 16. q = lane % 4, g = lane / 4.
  uint32_t r_words[C::kTokens / kGroupTokens][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& words : r_words) words[0] = words[1] = 0;
  }

  // r_acc + words is rounded to FP32; what of it bf16 can hold goes to the words.
  template <int kHalves>
  __device__ __forceinline__ void fold(Accumulators<C>& r_acc) {
#pragma unroll
    for (int i = 0; i < kHalves * C::kTokens / kGroupTokens; ++i) {
      uint32_t& word = r_words[i / 2][i % 2];
      float* r = &r_acc[i * 2];
      const float2 upper = widen_bf16(word), sum{upper.x + r[0], upper.y + r[1]};
      word = bits_of(__float22bfloat162_rn(sum));
      const float2 kept = widen_bf16(word);
      r[0] = sum.x - kept.x, r[1] = sum.y - kept.y;
    }
  }

  // Scales the sums of a finished tile. Floats are stored at once, others are rounded and left for
  // store_piece.
  template <int kHalves>
  __device__ __forceinline__ void take(const Accumulators<C>& r_acc, const TileScales<C>& scales,
                                       int first_row, int first_token, int thread) {
    row = first_row, token = first_token;
    if (p.out_type == OutType::kFloat) {
      const int lane = thread % kWarpSize, g = lane / 4;
      const int strip = row + thread / kWarpSize * kStripRows;  // all of its rows or none are inside
      if (strip >= p.num_rows) return;
      const int first = token + lane % 4 * 2;
      float* to = static_cast<float*>(p.out) + first * p.out_stride + strip + g;
      for_scaled<kHalves>(r_acc, scales, thread, [&](int i, float2 low, float2 high) {
        const int t = first + i * kGroupTokens;
        if (t < p.num_tokens) to[0] = low.x, to[8] = high.x;
        if (t + 1 < p.num_tokens) to[p.out_stride] = low.y, to[p.out_stride + 8] = high.y;
        to += kGroupTokens * p.out_stride;
      });
    } else {
      for_scaled<kHalves>(r_acc, scales, thread, [&](int i, float2 low, float2 high) {
        r_words[i][0] = bits_of(__float22bfloat162_rn(low));
        r_words[i][1] = bits_of(__float22bfloat162_rn(high));
      });
      const int boxes_left = (p.num_tokens - token + kBoxTokens - 1) / kBoxTokens;
      num_boxes = row < p.num_rows ? min(kHalves * C::kTokens / (2 * kBoxTokens), boxes_left) : 0;
    }
  }

  // Stores what is first, in two steps: turns it round in shared memory, and starts the bulk engine. Each
  // hides behind the products of a k tile, both together would not. The rest moves to the front, so that the
  // same code stores it. (Unrolled for every piece, in each of its places, the GEMM for 256 tokens had 285 KB
  // of machine code, and was slower.)
  __device__ __forceinline__ void stage_piece(int thread) {
    stage(staging[buffer], thread);
    ptx::fence_proxy_async();
  }
  __device__ __forceinline__ void store_staged(int thread) {
    const Staging& from = staging[buffer];
    buffer ^= 1;
    await_buffer(thread);  // the other one, for the next piece; and all of this one is written
    if (thread == 0) {
      const bool swiglu = p.epilogue == Epilogue::kSwiglu, fp8 = p.out_type == OutType::kFp8;
      const int column = swiglu ? row / 2 : row, box_bytes = kBoxTokens * kTileRows * 2 >> swiglu >> fp8;
#pragma unroll 1
      for (int i = 0; i < min(kPieceBoxes, num_boxes); ++i) {
        if (p.epilogue == Epilogue::kAdd)
          ptx::tensor_add(&out_map, column, token + i * kBoxTokens, &from[i * box_bytes]);
        else
          ptx::tensor_store(&out_map, column, token + i * kBoxTokens, &from[i * box_bytes]);
      }
      ptx::commit_stores();
    }
    __syncwarp();
    next_piece();
  }

  __device__ __forceinline__ void store(int thread) {
#pragma unroll 1
    while (num_boxes > 0) stage_piece(thread), store_staged(thread);
  }
  // The same, but runs through the code also where nothing is left.
  __device__ __forceinline__ void store_or_rehearse(int thread) {
#pragma unroll 1
    do stage_piece(thread), store_staged(thread);
    while (num_boxes > 0);
    num_boxes = 0;  // not -2
  }

 private:
  // The first piece.
  __device__ __forceinline__ void stage(Staging& to, int thread) const {
    const int warp = thread / kWarpSize, lane = thread % kWarpSize;
    if (p.epilogue != Epilogue::kSwiglu)
      stage_rows(to, warp, lane);
    else if (p.out_type == OutType::kFp8)
      stage_swiglu_fp8(to, warp, lane);
    else
      stage_swiglu(to, warp, lane);
  }
  __device__ __forceinline__ void next_piece() {
    token += kPieceTokens, num_boxes -= kPieceBoxes;
#pragma unroll
    for (int i = 0; i + kPieceGroups < C::kTokens / kGroupTokens; ++i) {
      r_words[i][0] = r_words[i + kPieceGroups][0];
      r_words[i][1] = r_words[i + kPieceGroups][1];
    }
  }
  __device__ __forceinline__ void await_buffer(int thread) const {
    if (thread == 0) ptx::wait_until_stores_have_read();
    ptx::barrier_sync(barrier, kWarpgroupThreads);
  }

  // f(i-th group of tokens, values of the thread's two in its row g, and in its row g + 8)
  template <int kHalves, class F>
  __device__ __forceinline__ void for_scaled(const Accumulators<C>& r_acc, const TileScales<C>& scales,
                                             int thread, F&& f) const {
    const int lane = thread % kWarpSize;
    const float* row_scales = &scales.row[thread / kWarpSize * kStripRows + lane / 4];
    const float low_scale = row_scales[0], high_scale = row_scales[8];
#pragma unroll
    for (int i = 0; i < kHalves * C::kTokens / (2 * kGroupTokens); ++i) {
      const float* r = &r_acc[i * 4];
      float2 low{r[0], r[1]}, high{r[2], r[3]};
      if constexpr (C::kFolds) {
        const float2 low_upper = widen_bf16(r_words[i][0]), high_upper = widen_bf16(r_words[i][1]);
        low.x += low_upper.x, low.y += low_upper.y, high.x += high_upper.x, high.y += high_upper.y;
      }
      const float2 x_scale = *reinterpret_cast<const float2*>(&scales.token[i * kGroupTokens + lane % 4 * 2]);
      f(i, float2{low.x * x_scale.x * low_scale, low.y * x_scale.y * low_scale},
        float2{high.x * x_scale.x * high_scale, high.y * x_scale.y * high_scale});
    }
  }

  __device__ __forceinline__ void stage_rows(Staging& to, int warp, int lane) const {
    const uint32_t base = ptx::smem_address(to);
#pragma unroll
    for (int j = 0; j < kPieceGroups; j += 2) {
      const auto *first = r_words[j], *second = r_words[j + 1];
      const uint32_t words[4] = {first[0], first[1], second[0], second[1]};
      ptx::store_matrices_trans(
          base + staged_offset<8>((j + lane / 16) * kGroupTokens + lane % 8, warp * 2 + lane / 8 % 2), words);
    }
  }

  // silu(gate) * up of the piece's j-th group of tokens: of the thread's two, in the warp's column g.
  __device__ __forceinline__ uint32_t swiglu_words(int j) const {
    const auto& word = r_words[j];
    const float2 gate = widen_bf16(word[0]), up = widen_bf16(word[1]);
    return bits_of(__floats2bfloat162_rn(silu_mul(gate.x, up.x), silu_mul(gate.y, up.y)));
  }

  __device__ __forceinline__ void stage_swiglu(Staging& to, int warp, int lane) const {
    uint32_t words[kPieceGroups];
#pragma unroll
    for (int j = 0; j < kPieceGroups; ++j) words[j] = swiglu_words(j);
    ptx::store_matrices_trans(ptx::smem_address(to) + staged_offset<4>(lane, warp), words);
  }

  __device__ __forceinline__ void stage_swiglu_fp8(Staging& to, int warp, int lane) const {
#pragma unroll
    for (int j = 0; j < kPieceGroups; ++j) {
      const uint32_t word = ptx::transpose_matrix(swiglu_words(j));  // token g, columns 2q and 2q + 1
      const int token_in_piece = j * kGroupTokens + lane / 4;
      *reinterpret_cast<uint16_t*>(
          &to[staged_offset<2>(token_in_piece, warp / 2) + warp % 2 * 8 + lane % 4 * 2]) =
          uint16_t(to_fp8(widen_bf16(word), out_scale));
    }
  }
};

// Where a launch stores what it does not store as floats.
inline CUtensorMap out_map(const PackedLinearParams& p) {
  if (p.out_type == OutType::kFloat) return {};
  const int element_bytes = p.out_type == OutType::kFp8 ? 1 : 2;
  const int halved = p.epilogue == Epilogue::kSwiglu ? 2 : 1;
  return ptx::swizzled_rows_map(p.out, p.num_tokens, int64_t(p.num_rows / halved) * element_bytes,
                                p.out_stride * element_bytes, kBoxTokens, element_bytes,
                                kTileRows / halved * element_bytes);
}

}  // namespace
}  // namespace nf
