// SPDX-License-Identifier: Apache-2.0
// From a warp's finished FP32 sums to the output. Two lanes whose rows are neighbours exchange halves first,
// so that each then has two rows of one token: one 4-byte store of bf16 instead of two of 2 bytes.
#pragma once

#include "kernels/common/device.cuh"
#include "kernels/linear/linear.h"
#include "kernels/norm/row_stats.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/quant/fp8.cuh"

namespace nf {
namespace {

constexpr int kWarpgroupThreads = 128;
constexpr int kStripRows = 16;  // of a warp: a multiple of 16 rows is all inside the weight or all outside

// Rows r and r + 1, in that order, of one token.
struct RowPair {
  float v[2];
};

__device__ __forceinline__ float to_bf16(float v) { return __bfloat162float(__float2bfloat16_rn(v)); }

__device__ __forceinline__ __nv_bfloat162 pack_bf16(RowPair y) {
  return __floats2bfloat162_rn(y.v[0], y.v[1]);
}

// Of two tokens' values of its own row, each lane gives one to the lane of the neighbouring row: even rows
// keep the first token.
__device__ __forceinline__ RowPair exchange(float first, float second, bool odd_row) {
  constexpr int kNeighbour = 4;  // lanes from a row to the next, in a wgmma fragment
  const float theirs = __shfl_xor_sync(kFullWarp, odd_row ? first : second, kNeighbour);
  return odd_row ? RowPair{theirs, second} : RowPair{first, theirs};
}

__device__ __forceinline__ float silu_mul(float gate, float up) {
  gate = to_bf16(gate), up = to_bf16(up);
  // The errors of these, a few FP32 ulp, vanish in the rounding. Where the power overflows, silu is -0.
  constexpr float kLog2E = 1.44269504f;
  return to_bf16(gate * ptx::reciprocal_flush(1.0f + ptx::exp2_flush(-kLog2E * gate)) * up);
}

__device__ __forceinline__ int row_scale_index(const PackedLinearParams& p, int packed_row) {
  if (!p.weight_scale_per_row) return 0;
  return p.epilogue == Epilogue::kSwiglu ? gate_up_row(packed_row, p.num_rows) : packed_row;
}
__device__ __forceinline__ float row_scale(const PackedLinearParams& p, int packed_row) {
  return p.weight_scale ? p.weight_scale[row_scale_index(p, packed_row)] : 1.0f;
}
__device__ __forceinline__ float token_scale(const PackedLinearParams& p, int token) {
  return p.x_scale ? p.x_scale[p.x_scale_per_token ? token : 0] : 1.0f;
}

// What becomes of the 16 rows from a strip on of 2 * kRegs tokens. A lane has, of every 8 tokens, two rows of
// one token, and the two rows 8 further on.
template <int kRegs>
struct StripOutput {
  static constexpr int kGroups = kRegs / 4;  // of 8 tokens
  using Pairs = __nv_bfloat162[2];           // rows row + 8 h and row + 8 h + 1

  const PackedLinearParams& p;
  const int strip, lane;
  float weight_scale[2][2];
  float x_scale[kGroups];
  Pairs residuals[kGroups], norm_weight;

  __device__ __forceinline__ StripOutput(const PackedLinearParams& p, int strip, int lane)
      : p(p), strip(strip), lane(lane) {}
  __device__ __forceinline__ bool inside() const { return strip < p.num_rows; }
  __device__ __forceinline__ bool odd_row() const { return lane / 4 % 2 != 0; }
  __device__ __forceinline__ int row() const { return strip + lane / 8 * 2; }
  __device__ __forceinline__ int token_of(int group) const {
    return group * 8 + lane % 4 * 2 + int(odd_row());
  }
  __device__ __forceinline__ __nv_bfloat162* residual_at(int token, int h) const {
    return reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p.out) + token * p.out_stride +
                                             row() + 8 * h);
  }

  // All that is read from global memory: before the products, whose time hides it. At the end of a kernel
  // nothing would.
  template <bool kLoadsScalesOfX>
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 2; ++i) weight_scale[h][i] = inside() ? row_scale(p, row() + 8 * h + i) : 1.0f;
      norm_weight[h] = __floats2bfloat162_rn(1.0f, 1.0f);
      if (inside() && p.out_norm_weight)
        norm_weight[h] = *reinterpret_cast<const __nv_bfloat162*>(p.out_norm_weight + row() + 8 * h);
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int token = token_of(i);
      if (!inside() || token >= p.num_tokens) continue;
      if (kLoadsScalesOfX) x_scale[i] = token_scale(p, token);
      if (p.epilogue == Epilogue::kAdd)
#pragma unroll
        for (int h = 0; h < 2; ++h) residuals[i][h] = *residual_at(token, h);
    }
  }

  // Scales and stores the sums. s_stats [tokens]: what the warp leaves of their statistics, if they are
  // wanted.
  __device__ __forceinline__ void finish(const float (&r_acc)[kRegs], const Divisor& out_scale,
                                         float2* s_stats) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const float* r = &r_acc[i * 4];
      RowPair y[2] = {exchange(r[0], r[1], odd_row()), exchange(r[2], r[3], odd_row())};
      const int token = token_of(i);
      float2 stats{0.0f, 0.0f};
      if (inside() && token < p.num_tokens) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int j = 0; j < 2; ++j) y[h].v[j] *= x_scale[i], y[h].v[j] *= weight_scale[h][j];
        }
        stats = store(y, i, token, out_scale);
      }
      if (!p.out_stats) continue;
#pragma unroll
      for (int mask = 8; mask < kWarpSize; mask *= 2)  // the lanes that have the same token
        stats = merge_stats(stats, shuffle_xor(stats, mask));
      if (lane < 8) s_stats[token] = stats;
    }
  }

 private:
  // y[h]: rows row + 8 h and row + 8 h + 1 of one token. Returns the statistics of what it stores.
  __device__ __forceinline__ float2 store(const RowPair (&y)[2], int group, int token,
                                          const Divisor& out_scale) const {
    float2 stats{0.0f, 0.0f};
    if (p.epilogue == Epilogue::kSwiglu) {
      const RowPair h{silu_mul(y[0].v[0], y[1].v[0]), silu_mul(y[0].v[1], y[1].v[1])};
      const int64_t at = token * p.out_stride + row() / kStripRows * (kStripRows / 2) + row() % 8;
      if (p.out_type == OutType::kBfloat16) {
        *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p.out) + at) = pack_bf16(h);
        if (p.out_stats) stats = pair_stats({h.v[0], h.v[1]}, {1.0f, 1.0f});
      } else {
        *reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(p.out) + at) =
            uint16_t(to_fp8({h.v[0], h.v[1]}, out_scale));
      }
      return stats;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (p.out_type == OutType::kFloat) {
        const int64_t at = token * p.out_stride + row() + 8 * h;
        *reinterpret_cast<float2*>(static_cast<float*>(p.out) + at) = {y[h].v[0], y[h].v[1]};
        continue;
      }
      __nv_bfloat162* out = residual_at(token, h);
      if (p.epilogue == Epilogue::kAdd) {
        const float2 residual = widen_bf16(residuals[group][h]);
        const __nv_bfloat162 sum =
            pack_bf16({residual.x + to_bf16(y[h].v[0]), residual.y + to_bf16(y[h].v[1])});
        *out = sum;
        if (p.out_stats) stats = merge_stats(stats, pair_stats(widen_bf16(sum), widen_bf16(norm_weight[h])));
      } else {
        *out = pack_bf16(y[h]);
      }
    }
    return stats;
  }
};

}  // namespace
}  // namespace nf
