// SPDX-License-Identifier: Apache-2.0
// The products and the softmax of prefill attention: a warpgroup with 64 rows of each tile.
#pragma once

#include "kernels/attention/prefill_config.cuh"
#include "kernels/common/vec.cuh"
#include "kernels/ptx/bulk_copy.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/named_barrier.cuh"
#include "kernels/quant/fp8.cuh"
#include "kernels/rope/rotate.cuh"

namespace nf::prefill {

// Four e4m3, saturating.
__device__ __forceinline__ uint32_t round_fp8(float2 low, float2 high) {
  const auto pair = [](float2 v) { return uint32_t(__nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, __NV_E4M3)); };
  return pair(low) | pair(high) << 16;
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
  const float score_scale;         // softmax_scale * k_scale * log2(e); of e4m3 times the row's scale
  const int warpgroup, first_row;  // of the tile, this warp's
  const int lane = int(threadIdx.x) % kWarpSize, g = lane / 4, q = lane % 4;

  static constexpr int kScores = kBlockKeys / 2, kOutputs = C::kHeadDim / 2;  // of a thread
  RingPosition<2> q_ring;
  RingPosition<C::kStages> k_ring, v_ring;

  struct Fragments {
    float scores[kScores], out[kOutputs];
    uint32_t weights[kScores * int(sizeof(typename C::Product)) / 4];  // neighbours share a word
    // Of rows g and g + 8: largest score so far, this thread's part of the sum of the weights, that of the
    // tile before, and what remains of earlier results.
    float largest[2], sum[2] = {0.0f, 0.0f}, last_sum[2], rescale[2] = {0.0f, 0.0f};
    float score_scale[2];
    // With products of e4m3: that of a block, and what remained of earlier results when its weights were
    // made.
    float product[C::kFp8Products ? kOutputs : 1], last_rescale[2];

    __device__ __forceinline__ void pack() {
      if constexpr (C::kFp8Products) {  // as send_transposed() orders the tokens
#pragma unroll
        for (int i = 0; i < kScores / 4; ++i) {
          const float* from = &scores[i / 2 * 8 + i % 2 * 2];
          weights[i] = round_fp8({from[0], from[1]}, {from[4], from[5]});
        }
      } else {
#pragma unroll
        for (int i = 0; i < kScores / 2; ++i)
          weights[i] = round_pair<typename C::Product>(scores[2 * i], scores[2 * i + 1]);
      }
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
    for (int c = 0; c < C::kBlockChunks; ++c) {
#pragma unroll
      for (int k = 0; k < kSwizzleBytes / ptx::kWgmmaStepBytes; ++k) {
        const uint64_t offset = uint64_t(c * (C::kChunkBytes / 16));
        ptx::wgmma(typename C::Product(), scores, ptx::wgmma_advance(a + offset, k),
                   ptx::wgmma_advance(b + offset, k), c + k > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // out (+)= weights * V, started; of e4m3 product = weights * V. `first`: of the tile, whose values end
  // where the sequence does.
  __device__ __forceinline__ void start_product(Fragments& f, bool first, const Tile& tile) const {
    uint8_t* values = s.v[v_ring.place];
    ptx::mbarrier_wait(&s.v_full[v_ring.place], v_ring.parity);
    if constexpr (!C::kFp8) {
      const int valid = tile.kv_len - (tile.num_blocks - 1) * kBlockKeys;
      if (first && valid < kBlockKeys) clear_rows(values, valid);
    }
    ptx::wgmma_fence();
    if constexpr (C::kFp8Products) {
      const uint64_t b = ptx::wgmma_descriptor(values);
#pragma unroll
      for (int k = 0; k < kBlockKeys / ptx::kWgmmaStepBytes; ++k)
        ptx::wgmma(typename C::Product(), f.product, &f.weights[4 * k], ptx::wgmma_advance(b, k), k > 0);
    } else {
      const uint64_t b = ptx::wgmma_rows_descriptor(values, C::kChunkBytes);
#pragma unroll
      for (int k = 0; k < kBlockKeys / 16; ++k)
        ptx::wgmma(typename C::Product(), f.out, &f.weights[4 * k], b + uint64_t(k) * ptx::kWgmmaRowsStep,
                   !first || k > 0);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void finish_product(Fragments& f) {
    ptx::wgmma_wait();
    if constexpr (C::kFp8Products)
      ptx::wgmma_settled(f.product);
    else
      ptx::wgmma_settled(f.out);
    arrive(&s.v_empty[v_ring.place]);
    v_ring.advance();
  }
  // wgmma cuts off the products of e4m3 some 14 bits below their sum. Equal values, the worst case, lose 0.1
  // % in a block of keys (measured), 1.8 % in sums of 16 blocks.
  __device__ __forceinline__ void add_product(Fragments& f) const {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i)
      f.out[i] = __fmaf_rn(f.out[i], f.last_rescale[i / 2 % 2], f.product[i]);
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

  __device__ __forceinline__ void find_largest(Fragments& f) const {
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
      f.last_rescale[half] = f.rescale[half];
      f.rescale[half] = ptx::exp2_flush((f.largest[half] - now) * f.score_scale[half]);
      f.largest[half] = now;
    }
  }
  // scores -> weights, in FP32: up to 1, or for e4m3 to 256.
  __device__ __forceinline__ void weigh(Fragments& f) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float offset = -f.largest[half] * f.score_scale[half] + (C::kFp8Products ? 8.0f : 0.0f);
      float sum[2] = {f.sum[half] * f.rescale[half], 0.0f};
#pragma unroll
      for (int i = 0; i < kBlockKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = f.scores[4 * i + 2 * half + e];
          score = ptx::exp2_flush(__fmaf_rn(score, f.score_scale[half], offset));
          sum[e] += score;
        }
      }
      f.sum[half] = sum[0] + sum[1];
    }
  }

  // The tile's result, through this warp's rows of the place that its queries had.
  __device__ __forceinline__ void write(const Fragments& f, const float (&sums)[2]) {
    const Tile tile = s.tile[q_ring.place];
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
      float2 sum[4];  // j % 2: of row g or g + 8
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* from = &f.out[8 * i + 2 * j];
        sum[j] = {from[0] * scale[j % 2], from[1] * scale[j % 2]};
      }
      if constexpr (C::kFp8Products) {  // columns 4q and 4q + 2; then the next ones, by send_transposed()
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + lane / 4 + 8 * half, unit = 2 * i + lane % 4 / 2;
          const float2 even = sum[half], odd = sum[half + 2];
          *reinterpret_cast<uint2*>(staging + unit / 8 * C::kChunkBytes + swizzled(row, unit % 8) +
                                    lane % 2 * 8) = {round_pair<typename C::Scalar>(even.x, odd.x),
                                                     round_pair<typename C::Scalar>(even.y, odd.y)};
        }
      } else {
        uint32_t r[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) r[j] = round_pair<typename C::Scalar>(sum[j].x, sum[j].y);
        const int row = first_row + lane % kWarpRows, unit = 2 * i + lane / kWarpRows;
        ptx::store_matrices(ptx::smem_address(staging) + unit / 8 * C::kChunkBytes + swizzled(row, unit % 8),
                            r);
      }
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
    if constexpr (kSwitch) begin_tile(f, next, q_place);
    find_largest(f);
    if constexpr (C::kFp8Products) {  // they take half the time: done by now
      do {  // once: in one basic block with find_largest() the compiler puts the wait first
        finish_product(f);
      } while (p.num_seqs == 0);
      add_product(f);
    }
    weigh(f);
    if constexpr (C::kFp8Products) f.pack();
  }

  // Blocks of keys one after another, over all tiles. (Where a product is waited for, another basic block
  // begins: in one with the softmax before it the compiler puts the wait first.)
  __device__ __forceinline__ void run() {
    Tile tile = wait_for_tile(0, 0);
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
    begin_tile(f, tile, 0);
    find_largest(f);
    weigh(f);
    if constexpr (C::kFp8Products) f.pack();

    for (bool is_first_tile = true;; is_first_tile = false) {
      if (!is_first_tile) {
        if constexpr (!C::kFp8Products) finish_product(f);
        write(f, f.last_sum);
      }
      if constexpr (C::kFp8Products)
        for (float& out : f.out) out = 0.0f;
      bool first = true;
      for (int block = tile.num_blocks - 1;; --block, first = false) {
        if constexpr (!C::kFp8Products) {
          if (!first) {
            finish_product(f);
            rescale(f);
          }
          f.pack();
        }
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
      tile = next;
    }
    finish_product(f);
    if constexpr (C::kFp8Products) {
      f.last_rescale[0] = f.rescale[0], f.last_rescale[1] = f.rescale[1];
      add_product(f);
    }
    write(f, f.sum);
    if (warpgroup == 0) ptx::barrier_sync(kTurn, 2 * kWarpgroupThreads);  // the other's last arrival
  }

 private:
  __device__ __forceinline__ Tile wait_for_tile(int place, uint32_t parity) const {
    ptx::mbarrier_wait(&s.q_full[place], parity);
    Tile tile = s.tile[place];
    tile.num_blocks = __shfl_sync(kFullWarp, tile.num_blocks, 0);  // uniform, which wgmma wants to be seen
    prepare_queries(place, tile);
    return tile;
  }

  static constexpr bool kNarrows = C::kWidens && !std::is_same_v<typename C::Scalar, __half>;

  // Makes of this warp's rows of the queries, as they come, the operand of the products.
  __device__ __forceinline__ void prepare_queries(int place, const Tile& tile) const {
    const bool rotates = p.cos_sin != nullptr && tile.num_blocks > 0;
    if (rotates) rotate_queries(place, tile);
    if constexpr (C::kFp8Products || kNarrows) {
      __syncwarp();  // the warp's rows are rotated
      if constexpr (C::kFp8Products)
        quantise_queries(place);
      else
        narrow_queries(place);
    } else if (!rotates) {
      return;
    }
    ptx::fence_proxy_async();
    ptx::barrier_sync(kWarpgroup + warpgroup, kWarpgroupThreads);  // complete before a product reads them
  }

  // RoPE. A token's position is its index in its sequence.
  __device__ __forceinline__ void rotate_queries(int place, const Tile& tile) const {
    constexpr int kUnits = C::kHeadDim / 16,
                  kRowsAtOnce = kWarpSize / kUnits;  // 16 bytes of each half a lane
    int lane = this->lane;
    asm volatile("" : "+r"(lane));  // as in write()
    const int unit = lane % kUnits;
#pragma unroll 2  // two loads of angles under way, of different queries up to a group of 8
    for (int i = 0; i < kWarpRows / kRowsAtOnce; ++i) {
      const int row = first_row + i % 2 * (kWarpRows / 2) + i / 2 * kRowsAtOnce + lane / kUnits;
      const auto vec = [&](int u) {
        return reinterpret_cast<Vec<typename C::Scalar>*>(s.q[place] + u / 8 * C::kChunkBytes +
                                                          swizzled(row, u % 8));
      };
      const int query = min(row >> row_shift, tile.end - 1);  // behind the last there may be no position
      const float* angles = p.cos_sin + (tile.position + query) * p.cos_sin_stride + unit * 8;
      Vec<typename C::Scalar> low = *vec(unit), high = *vec(unit + kUnits);
      rotate_vecs(low, high, load_angles(angles, C::kHeadDim / 2));
      *vec(unit) = low, *vec(unit + kUnits) = high;
    }
  }

  // bf16 -> half, saturated.
  __device__ __forceinline__ void narrow_queries(int place) const {
    constexpr float kMaxHalf = 65504.0f;
    constexpr int kVecs = kWarpRows * kSwizzleBytes / 16;
    uint8_t* rows = s.q[place] + first_row * kSwizzleBytes;
#pragma unroll 1  // few registers
    for (int c = 0; c < C::kChunks; ++c) {
#pragma unroll 1
      for (int i = 0; i < kVecs / kWarpSize; ++i) {
        const int at = i * kWarpSize + lane;
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
  }

  // To e4m3 in the first chunk, and the rows' scales.
  __device__ __forceinline__ void quantise_queries(int place) const {
    constexpr int kUnits = C::kHeadDim / 8, kRowsAtOnce = kWarpSize / kUnits;
    uint8_t* queries = s.q[place];
    int lane = this->lane;
    asm volatile("" : "+r"(lane));  // as in write()
    const int unit = lane % kUnits;
#pragma unroll 2
    for (int i = 0; i < kWarpRows / kRowsAtOnce; ++i) {
      const int row = first_row + i * kRowsAtOnce + lane / kUnits;
      const auto v = *reinterpret_cast<const Vec<typename C::Scalar>*>(queries + unit / 8 * C::kChunkBytes +
                                                                       swizzled(row, unit % 8));
      uint32_t largest = largest_bits(v);
#pragma unroll
      for (int step = 1; step < kUnits; step *= 2)
        largest = max(largest, __shfl_xor_sync(kFullWarp, largest, step));
      const Divisor scale = scale_of_largest(largest);
      __syncwarp();  // the row has been read
      *reinterpret_cast<uint2*>(queries + swizzled(row, unit / 2) + unit % 2 * 8) = to_fp8(v, scale);
      if (unit == 0) s.fp8.q_scale[place][row] = scale.value;
    }
  }

  // With the scores of its last block, where its queries end. They are in q[place].
  __device__ __forceinline__ void begin_tile(Fragments& f, const Tile& tile, int place) const {
    mask(f.scores, tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      f.score_scale[half] = score_scale;
      if constexpr (C::kFp8Products) f.score_scale[half] *= s.fp8.q_scale[place][first_row + g + 8 * half];
      f.last_sum[half] = f.sum[half];
      f.largest[half] = -INFINITY;
      f.sum[half] = 0.0f;
    }
  }
};

}  // namespace nf::prefill
