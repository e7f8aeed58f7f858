// SPDX-License-Identifier: Apache-2.0
// The products and the softmax of prefill attention: a warpgroup with 64 rows of each tile.
#pragma once

#include "kernels/attention/prefill_config.cuh"
#include "kernels/common/vec.cuh"
#include "kernels/ptx/bulk_copy.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/named_barrier.cuh"
#include "kernels/quant/fp8.cuh"

namespace nf::prefill {

__device__ __forceinline__ float exp2_approx(float x) {  // without exp2f's detour for results below 2^-126
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T>
__device__ __forceinline__ uint32_t round_pair(float a, float b) {
  const auto rounded = PairOf<T>::round({a, b});
  uint32_t word;
  memcpy(&word, &rounded, sizeof(word));
  return word;
}

// Lane 4g + q of a warp has rows g and g + 8 of its 16, and of every 8 columns 2q and 2q + 1:
// fragment[4 * i + 2 * half + e] is row g + 8 * half, column 8 * i + 2 * q + e.
template <class C>
struct Consumer {
  Smem<C>& s;
  const PrefillAttentionParams<typename C::Scalar>& p;
  const int row_shift;
  const float score_scale;         // softmax_scale * k_scale * log2(e)
  const int warpgroup, first_row;  // of the tile, this warp's
  const int lane = int(threadIdx.x) % kWarpSize, g = lane / 4, q = lane % 4;

  static constexpr int kScores = kBlockKeys / 2, kOutputs = C::kHeadDim / 2;  // of a thread
  RingPosition<2> q_ring;
  RingPosition<C::kStages> k_ring, v_ring;

  struct Fragments {
    float scores[kScores], out[kOutputs];
    uint32_t weights[kScores / 2];  // of 16 bits, two neighbours each
    // Of rows g and g + 8: largest score so far, this thread's part of the sum of the weights, that of the
    // tile before, and what remains of earlier results.
    float largest[2], sum[2] = {0.0f, 0.0f}, last_sum[2], rescale[2];

    __device__ __forceinline__ void pack() {
#pragma unroll
      for (int i = 0; i < kScores / 2; ++i)
        weights[i] = round_pair<typename C::Product>(scores[2 * i], scores[2 * i + 1]);
    }
  };

  __device__ __forceinline__ void arrive(uint64_t* barrier) const {  // for the warp
    if (lane == 0) ptx::mbarrier_arrive(barrier);
  }

  // scores = Q * K^T, started.
  __device__ __forceinline__ void start_scores(float (&scores)[kScores], const uint8_t* queries,
                                               const uint8_t* keys) const {
    const uint64_t a = ptx::wgmma_descriptor(queries + warpgroup * kWarpgroupRows * kSwizzleBytes);
    const uint64_t b = ptx::wgmma_descriptor(keys);
#pragma unroll
    for (int c = 0; c < C::kChunks; ++c) {
#pragma unroll
      for (int k = 0; k < kSwizzleBytes / ptx::kWgmmaStepBytes; ++k) {
        const uint64_t offset = uint64_t(c * (C::kChunkBytes / 16));
        ptx::wgmma(typename C::Product(), scores, ptx::wgmma_advance(a + offset, k),
                   ptx::wgmma_advance(b + offset, k), c + k > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // out (+)= weights * V, started. `first`: of the tile, whose values end where the sequence does.
  __device__ __forceinline__ void start_product(Fragments& f, bool first, const Tile& tile) const {
    uint8_t* values = s.v[v_ring.place];
    ptx::mbarrier_wait(&s.v_full[v_ring.place], v_ring.parity);
    if constexpr (!C::kFp8) {
      const int valid = tile.kv_len - (tile.num_blocks - 1) * kBlockKeys;
      if (first && valid < kBlockKeys) clear_rows(values, valid);
    }
    const uint64_t b = ptx::wgmma_rows_descriptor(values, C::kChunkBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockKeys / 16; ++k)
      ptx::wgmma(typename C::Product(), f.out, &f.weights[4 * k], b + uint64_t(k) * ptx::kWgmmaRowsStep,
                 !first || k > 0);
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void finish_product(Fragments& f) {
    ptx::wgmma_wait();
    ptx::wgmma_settled(f.out);
    arrive(&s.v_empty[v_ring.place]);
    v_ring.advance();
  }

  // Mostly no maximum has changed: timed on an H200, 652 TFLOP/s with the test and 625 without, at 32K.
  __device__ __forceinline__ void rescale(Fragments& f) const {
    if (!__any_sync(kFullWarp, f.rescale[0] != 1.0f || f.rescale[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) f.out[i] *= f.rescale[i / 2 % 2];
  }

  // Scores of keys that come after their query, in the tile's last block: no weight.
  __device__ __forceinline__ void mask(float (&scores)[kScores], const Tile& tile) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = (first_row + g + 8 * half) >> row_shift;
      const int last = tile.position + query - (tile.num_blocks - 1) * kBlockKeys - 2 * q;
#pragma unroll
      for (int i = 0; i < kBlockKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * i + e > last) scores[4 * i + 2 * half + e] = -INFINITY;
      }
    }
  }

  // Their weights are 0, but what is there may be NaN: values beyond the sequence's tokens become 0. (Both
  // warpgroups write them, each before its own product.)
  __device__ __forceinline__ void clear_rows(uint8_t* values, int first) const {
    constexpr int kUnits = kSwizzleBytes / 16;
    for (int i = first * kUnits + int(threadIdx.x) % kWarpgroupThreads; i < kBlockKeys * kUnits;
         i += kWarpgroupThreads) {
#pragma unroll
      for (int c = 0; c < C::kChunks; ++c)
        *reinterpret_cast<uint4*>(values + c * C::kChunkBytes + i * 16) = {0, 0, 0, 0};
    }
    ptx::fence_proxy_async();
    ptx::barrier_sync(kWarpgroup + warpgroup, kWarpgroupThreads);  // cleared before the product reads them
  }

  // scores -> weights, in FP32
  __device__ __forceinline__ void softmax(Fragments& f) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest[2] = {f.scores[2 * half], f.scores[2 * half + 1]};
#pragma unroll
      for (int i = 1; i < kBlockKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) largest[e] = fmaxf(largest[e], f.scores[4 * i + 2 * half + e]);
      }
      float now = fmaxf(f.largest[half], fmaxf(largest[0], largest[1]));
      now = fmaxf(now, __shfl_xor_sync(kFullWarp, now, 1));
      now = fmaxf(now, __shfl_xor_sync(kFullWarp, now, 2));
      f.rescale[half] = exp2_approx((f.largest[half] - now) * score_scale);
      f.largest[half] = now;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float offset = -f.largest[half] * score_scale;
      float sum[2] = {f.sum[half] * f.rescale[half], 0.0f};
#pragma unroll
      for (int i = 0; i < kBlockKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = f.scores[4 * i + 2 * half + e];
          score = exp2_approx(__fmaf_rn(score, score_scale, offset));
          sum[e] += score;
        }
      }
      f.sum[half] = sum[0] + sum[1];
    }
  }

  // The tile's result, through this warp's rows of the place that its queries had.
  __device__ __forceinline__ void write(const Fragments& f, const float (&sums)[2], const Tile& tile) {
    uint8_t* staging = s.q[q_ring.place];
    int lane = this->lane;
    asm volatile("" : "+r"(lane));  // else the addresses below stay in registers between tiles: too many
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = sums[half] + __shfl_xor_sync(kFullWarp, sums[half], 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      scale[half] = (C::kFp8 ? p.v_scale : 1.0f) / sum;
    }
    ptx::barrier_sync(kWarpgroup + warpgroup, kWarpgroupThreads);  // the queries have been read
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      uint32_t r[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        r[j] = round_pair<typename C::Scalar>(f.out[8 * i + 2 * j] * scale[j % 2],
                                              f.out[8 * i + 2 * j + 1] * scale[j % 2]);
      const int row = first_row + lane % kWarpRows, unit = 2 * i + lane / kWarpRows;
      ptx::store_matrices(ptx::smem_address(staging) + unit / 8 * C::kChunkBytes + swizzled(row, unit % 8),
                          r);
    }
    __syncwarp();  // the warp's rows are complete

    const Divisor out_scale = p.out_scale ? *p.out_scale : 1.0f;
    constexpr int kUnits = C::kHeadDim / 8, kRowsAtOnce = kWarpSize / kUnits;  // 16 bytes a lane
#pragma unroll
    for (int i = 0; i < kWarpRows / kRowsAtOnce; ++i) {
      const int row = first_row + i * kRowsAtOnce + lane / kUnits, unit = lane % kUnits;
      const int query = row >> row_shift, head = row - (query << row_shift);
      if (query < tile.begin || query >= tile.end || head >= p.group) continue;
      const auto v = *reinterpret_cast<const Vec<typename C::Scalar>*>(staging + unit / 8 * C::kChunkBytes +
                                                                       swizzled(row, unit % 8));
      const int64_t at =
          (int64_t(tile.token) + query) * p.out_stride + (tile.kv_head * p.group + head) * C::kHeadDim;
      if (p.out_scale)
        store_fp8(static_cast<__nv_fp8_e4m3*>(p.out) + at, unit, v, out_scale);
      else
        store_vec(static_cast<typename C::Scalar*>(p.out) + at, unit, v);
    }
    ptx::fence_proxy_async();  // the copy of other queries comes after this
    arrive(&s.q_empty[q_ring.place]);
    q_ring.advance();
  }

  // Starts the scores of the next block, kSwitch: the first one of tile `next`, and the product of this
  // block's weights and values; weighs those scores while the product runs. The other warpgroup has its
  // softmax during our products: the two take turns.
  template <bool kSwitch>
  __device__ __forceinline__ void advance(Fragments& f, bool first, const Tile& tile, const Tile& next) {
    const int q_place = kSwitch ? q_ring.place ^ 1 : q_ring.place, k_place = k_ring.place;
    ptx::mbarrier_wait(&s.k_full[k_place], k_ring.parity);
    ptx::barrier_sync(kTurn + warpgroup, 2 * kWarpgroupThreads);
    ptx::wgmma_fence();
    start_scores(f.scores, s.q[q_place], s.k[k_place]);
    start_product(f, first, tile);
    ptx::barrier_arrive(kTurn + (warpgroup ^ 1), 2 * kWarpgroupThreads);

    ptx::wgmma_wait<1>();
    ptx::wgmma_settled(f.scores);
    arrive(&s.k_empty[k_place]);
    k_ring.advance();
    if constexpr (kSwitch) begin_tile(f, next);
    softmax(f);
  }

  // Blocks of keys one after another, over all tiles. (Where a product is waited for, another basic block
  // begins: in one with the softmax before it the compiler puts the wait first.)
  __device__ __forceinline__ void run() {
    Tile tile = wait_for_tile(0, 0), previous{};
    if (tile.num_blocks == 0) return;
    if (warpgroup == 1) ptx::barrier_arrive(kTurn, 2 * kWarpgroupThreads);  // the first turn is the other's

    Fragments f;
    ptx::mbarrier_wait(&s.k_full[0], 0);
    ptx::wgmma_fence();
    start_scores(f.scores, s.q[0], s.k[0]);
    ptx::wgmma_wait();
    ptx::wgmma_settled(f.scores);
    arrive(&s.k_empty[0]);
    k_ring.advance();
    begin_tile(f, tile);
    softmax(f);

    while (true) {
      if (previous.num_blocks > 0) {
        finish_product(f);
        write(f, f.last_sum, previous);
      }
      bool first = true;
      for (int block = tile.num_blocks - 1;; --block, first = false) {
        if (!first) {
          finish_product(f);
          rescale(f);
        }
        f.pack();
        if (block == 0) break;
        advance<false>(f, first, tile, tile);
      }
      const Tile next = wait_for_tile(q_ring.place ^ 1, q_ring.parity ^ uint32_t(q_ring.place));
      if (next.num_blocks == 0) {
        ptx::wgmma_fence();
        start_product(f, first, tile);
        break;
      }
      advance<true>(f, first, tile, next);
      previous = tile;
      tile = next;
    }
    finish_product(f);
    write(f, f.sum, tile);
    if (warpgroup == 0) ptx::barrier_sync(kTurn, 2 * kWarpgroupThreads);  // the other's last arrival
  }

 private:
  __device__ __forceinline__ Tile wait_for_tile(int place, uint32_t parity) const {
    ptx::mbarrier_wait(&s.q_full[place], parity);
    Tile tile = s.tile[place];
    tile.num_blocks = __shfl_sync(kFullWarp, tile.num_blocks, 0);  // uniform, which wgmma wants to be seen
    if constexpr (!std::is_same_v<typename C::Scalar, typename C::Product>) narrow_queries(place);
    return tile;
  }

  // This warpgroup's rows of the queries, bf16 -> half, saturated.
  __device__ __forceinline__ void narrow_queries(int place) const {
    constexpr float kMaxHalf = 65504.0f;
    constexpr int kVecs = kWarpgroupRows * kSwizzleBytes / 16;
    uint8_t* rows = s.q[place] + warpgroup * kWarpgroupRows * kSwizzleBytes;
#pragma unroll 1  // few registers
    for (int c = 0; c < C::kChunks; ++c) {
#pragma unroll 1
      for (int i = 0; i < kVecs / kWarpgroupThreads; ++i) {
        const int at = i * kWarpgroupThreads + int(threadIdx.x) % kWarpgroupThreads;
        auto* chunk = reinterpret_cast<typename C::Scalar*>(rows + c * C::kChunkBytes);
        const Vec<typename C::Scalar> from = load_vec(chunk, at);
        Vec<typename C::Product> to;
#pragma unroll
        for (int j = 0; j < to.kPairs; ++j) {
          const float2 v = from.pair(j);
          to.round_pair(j, {fminf(fmaxf(v.x, -kMaxHalf), kMaxHalf), fminf(fmaxf(v.y, -kMaxHalf), kMaxHalf)});
        }
        store_vec(reinterpret_cast<typename C::Product*>(chunk), at, to);
      }
    }
    ptx::fence_proxy_async();
    ptx::barrier_sync(kWarpgroup + warpgroup, kWarpgroupThreads);  // complete before a product reads them
  }

  // With the scores of its last block, where its queries end.
  __device__ __forceinline__ void begin_tile(Fragments& f, const Tile& tile) const {
    mask(f.scores, tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      f.last_sum[half] = f.sum[half];
      f.largest[half] = -INFINITY;
      f.sum[half] = 0.0f;
    }
  }
};

}  // namespace nf::prefill
