// SPDX-License-Identifier: Apache-2.0
// From a warpgroup's finished sums of 64 rows x 128 tokens to the output: scaled and rounded to bf16 in
// registers, turned round through shared memory, stored as whole 16-byte vectors of a token's row. The
// rounding points are those of epilogue.cuh.
#pragma once

#include "host/gemm_schedule.h"
#include "kernels/linear/epilogue.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/named_barrier.cuh"
#include "kernels/ptx/reduce.cuh"
#include "kernels/quant/fp8.cuh"

namespace nf {
namespace {

constexpr int kHalfRegs = kHalfTileTokens / 2;  // accumulators of a thread for half a tile

using Staging = uint8_t[kHalfTileTokens * kTileRows * 2];  // [tokens][rows] bf16, chunks of 8 rows permuted

__device__ __forceinline__ uint32_t bits_of(__nv_bfloat162 v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof(bits));
  return bits;
}

// What a warpgroup's tile is scaled by. Copied while it multiplies: a load at the end would wait for L2.
struct TileScales {
  alignas(8) float token[kTileTokens];
  float row[kTileRows];
  Divisor out;  // the same for all tiles

  __device__ __forceinline__ void start_loading(const PackedLinearParams& p, int first_row, int first_token,
                                                int thread) {
#pragma unroll
    for (int i = thread; i < kTileTokens; i += kWarpgroupThreads) {
      const int at = p.x_scale_per_token ? min(first_token + i, p.num_tokens - 1) : 0;
      load(token[i], p.x_scale, at);
    }
    if (thread < kTileRows) {
      const int packed_row = min(first_row + thread, p.num_rows - 1);
      load(row[thread], p.weight_scale, row_scale_index(p, packed_row));
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

// Where chunk `chunk` of kChunks of a token's row is: 8 tokens' same chunks lie in different banks.
template <int kChunks>
__device__ __forceinline__ int staged_offset(int token, int chunk) {
  return (token * kChunks + (chunk ^ token / (8 / kChunks) % kChunks)) * kChunkBytes;
}

// A warpgroup's share of half a tile: 64 rows x kHalfTileTokens tokens.
struct HalfTile {
  const PackedLinearParams& p;
  Staging& staging;
  const TileScales& scales;
  int barrier;     // for this warpgroup alone
  int row, token;  // of the tile
  int first;       // the half's first token, from `token` on

  __device__ __forceinline__ void sync() const { ptx::barrier_sync(barrier, kWarpgroupThreads); }

  // f(values of token 2q and 2q + 1 of the thread's row g, of its row g + 8) for its i-th 8 tokens
  template <class F>
  __device__ __forceinline__ void scaled(const float* r, int i, float low_scale, float high_scale, int lane,
                                         F&& f) const {
    const float2 x_scale = *reinterpret_cast<const float2*>(&scales.token[first + i * 8 + lane % 4 * 2]);
    f(float2{r[0] * x_scale.x * low_scale, r[1] * x_scale.y * low_scale},
      float2{r[2] * x_scale.x * high_scale, r[3] * x_scale.y * high_scale});
  }

  __device__ __forceinline__ void stage_rows(const float (&r_acc)[kHalfRegs], float low_scale,
                                             float high_scale, int warp, int lane) const {
    const uint32_t base = ptx::smem_address(staging);
#pragma unroll
    for (int i = 0; i < kHalfRegs / 4; i += 2) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        scaled(&r_acc[(i + j) * 4], i + j, low_scale, high_scale, lane, [&](float2 low, float2 high) {
          words[2 * j] = bits_of(__float22bfloat162_rn(low));
          words[2 * j + 1] = bits_of(__float22bfloat162_rn(high));
        });
      }
      ptx::store_matrices_trans(
          base + staged_offset<8>((i + lane / 16) * 8 + lane % 8, warp * 2 + lane / 8 % 2), words);
    }
  }

  __device__ __forceinline__ void stage_swiglu(const float (&r_acc)[kHalfRegs], float gate_scale,
                                               float up_scale, int warp, int lane) const {
    const uint32_t base = ptx::smem_address(staging);
#pragma unroll
    for (int i = 0; i < kHalfRegs / 4; i += 4) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scaled(&r_acc[(i + j) * 4], i + j, gate_scale, up_scale, lane, [&](float2 gate, float2 up) {
          words[j] = bits_of(__floats2bfloat162_rn(silu_mul(gate.x, up.x), silu_mul(gate.y, up.y)));
        });
      }
      ptx::store_matrices_trans(base + staged_offset<4>((i + lane / 8) * 8 + lane % 8, warp), words);
    }
  }

  __device__ __forceinline__ void store_floats(const float (&r_acc)[kHalfRegs], float low_scale,
                                               float high_scale, int warp, int lane) const {
    const int strip = row + warp * kStripRows, token_in_group = token + first + lane % 4 * 2;
    if (strip >= p.num_rows) return;
#pragma unroll
    for (int i = 0; i < kHalfRegs / 4; ++i) {
      scaled(&r_acc[i * 4], i, low_scale, high_scale, lane, [&](float2 low, float2 high) {
        const int t = token_in_group + i * 8;
        float* to = static_cast<float*>(p.out) + t * p.out_stride + strip + lane / 4;
        if (t < p.num_tokens) to[0] = low.x, to[8] = high.x;
        if (t + 1 < p.num_tokens) to[p.out_stride] = low.y, to[p.out_stride + 8] = high.y;
      });
    }
  }

  // f(element offset in the output, 8 values) for this thread's share of the staged rows of kChunks * 8.
  template <int kChunks, class F>
  __device__ __forceinline__ void for_staged(int first_column, int num_columns, int thread, F&& f) const {
    const int chunk = thread % kChunks, column = first_column + chunk * 8;
    if (column >= num_columns) return;
    constexpr int kStep = kWarpgroupThreads / kChunks, kSteps = kHalfTileTokens / kStep;
    const int begin = thread / kChunks, num_left = p.num_tokens - (token + first + begin);
    Vec<__nv_bfloat16> staged[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      staged[i] = load_vec(
          reinterpret_cast<const __nv_bfloat16*>(&staging[staged_offset<kChunks>(begin + i * kStep, chunk)]), 0);
    const int64_t at = (token + first + begin) * p.out_stride + column, step = kStep * p.out_stride;
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (i * kStep < num_left) f(at + i * step, staged[i]);
  }

  __device__ __forceinline__ void store(const float (&r_acc)[kHalfRegs], int thread) const {
    const int warp = thread / kWarpSize, lane = thread % kWarpSize;
    auto* out = static_cast<__nv_bfloat16*>(p.out);
    sync();  // what was staged before has been read, the scales are there
    const float* row_scales = &scales.row[warp * kStripRows + lane / 4];
    const float low_scale = row_scales[0], high_scale = row_scales[8];
    if (p.out_type == OutType::kFloat) {
      store_floats(r_acc, low_scale, high_scale, warp, lane);
    } else if (p.epilogue == Epilogue::kSwiglu) {
      stage_swiglu(r_acc, low_scale, high_scale, warp, lane);
      sync();
      const Divisor scale = scales.out;
      for_staged<4>(row / 2, p.num_rows / 2, thread, [&](int64_t at, const Vec<__nv_bfloat16>& v) {
        if (p.out_type == OutType::kFp8)
          store_fp8(static_cast<__nv_fp8_e4m3*>(p.out) + at, 0, v, scale);
        else
          store_vec(out + at, 0, v);
      });
    } else {
      stage_rows(r_acc, low_scale, high_scale, warp, lane);
      sync();
      for_staged<8>(row, p.num_rows, thread, [&](int64_t at, const Vec<__nv_bfloat16>& v) {
        if (p.epilogue == Epilogue::kAdd)
          ptx::add_bf16(out + at, v.word);
        else
          store_vec(out + at, 0, v);
      });
    }
  }
};

}  // namespace
}  // namespace nf
