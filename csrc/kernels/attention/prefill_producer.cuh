// SPDX-License-Identifier: Apache-2.0
// What precedes the products of prefill attention: the line of items, and the warps that take items from it
// and bring their queries, keys and values: by the copy engine, or pages of e4m3 through registers, as
// halves; values of products of e4m3 by the copy engine, then transposed.
#pragma once

#include "kernels/attention/prefill_config.cuh"
#include "kernels/common/fp8.cuh"
#include "kernels/ptx/bulk_copy.cuh"
#include "kernels/ptx/named_barrier.cuh"

namespace nf::prefill {

// By the whole CTA: the sequences with a prompt in this step, longest first. (One with fewer keys than
// queries would never end: it is left out.)
template <class C>
__device__ __forceinline__ void list_sequences(Smem<C>& s,
                                               const PrefillAttentionParams<typename C::Scalar>& p,
                                               int row_shift) {
  const auto num_new = [&](int seq) { return int(p.q_start[seq + 1] - p.q_start[seq]); };
  for (int i = threadIdx.x; i < p.num_seqs; i += C::kThreads) {
    const int length = int(p.kv_len[i]);
    s.length[i] = num_new(i) > kMostDecodeQueries && num_new(i) <= length ? length : 0;
  }
  if (threadIdx.x == 0) s.num_seqs = 0;
  __syncthreads();  // `length` is complete
  for (int i = threadIdx.x; i < p.num_seqs; i += C::kThreads) {
    const int length = s.length[i];
    if (length == 0) continue;
    int rank = 0;
    for (int other = 0; other < p.num_seqs; ++other) rank += precedes(s.length[other], other, length, i);
    s.sequence[rank] = {i, int(p.q_start[i]), num_new(i), length};
    atomicAdd(&s.num_seqs, 1);
  }
  __syncthreads();  // `sequence` is complete
  if (threadIdx.x < kWarpSize) {
    const int lane = threadIdx.x;
    int before = 0;
    for (int base = 0; base < s.num_seqs; base += kWarpSize) {
      int sum = 0;
      if (base + lane < s.num_seqs) {
        const Sequence seq = s.sequence[base + lane];
        sum = tiles_of(seq.kv_len - seq.num_new, seq.kv_len, row_shift).count * p.num_kv_heads;
      }
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int up = __shfl_up_sync(kFullWarp, sum, step);
        if (lane >= step) sum += up;
      }
      if (base + lane < s.num_seqs) s.first_item[base + lane + 1] = before + sum;
      before += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
    }
    if (lane == 0) s.first_item[0] = 0;
  }
  __syncthreads();  // `first_item` is complete
}

template <class C>
__device__ __forceinline__ Tile tile_at(const Smem<C>& s, int item, int num_kv_heads, int row_shift) {
  Tile tile{};
  if (item >= s.first_item[s.num_seqs]) return tile;
  int rank = 0;
  for (int count = s.num_seqs; count > 1;) {  // of [rank, rank + count), the last that begins by `item`
    const int half = count / 2;
    const bool right = s.first_item[rank + half] <= item;
    rank += right ? half : 0;
    count = right ? count - half : half;
  }
  const Sequence seq = s.sequence[rank];
  const int first_new = seq.kv_len - seq.num_new;
  const TileRange tiles = tiles_of(first_new, seq.kv_len, row_shift);
  const Place place = place_of(item - s.first_item[rank], tiles.count, num_kv_heads,
                               section_heads(seq.kv_len, C::kTokenBytes, num_kv_heads));
  const int num_queries = kTileRows >> row_shift;
  tile.position = (tiles.first + place.tile) * num_queries;
  tile.num_blocks = tile.position / kBlockKeys + 1;
  tile.token = seq.token + tile.position - first_new;
  tile.begin = max(first_new - tile.position, 0);
  tile.end = min(seq.kv_len - tile.position, num_queries);
  tile.kv_head = place.kv_head;
  tile.seq = seq.seq;
  tile.kv_len = seq.kv_len;
  return tile;
}

struct TensorMaps {
  CUtensorMap q;     // [T, H, D] in boxes of a tile's queries and heads
  CUtensorMap k, v;  // [P, K * 64, D] in boxes of a page of one head; unused with pages of e4m3
};

// The producer warps, in the line of items. The first one takes items and has queries copied.
template <class C>
struct Producer {
  Smem<C>& s;
  const PrefillAttentionParams<typename C::Scalar>& p;
  const TensorMaps& maps;
  const int row_shift, warp, lane;
  RingPosition<2> q_ring;
  RingPosition<C::kStages> kv_ring;
  RingPosition<2> values_ring;  // of Fp8Smem

  // Makes the tile of an item the next one, for all producer warps; `item` is the first one's.
  __device__ __forceinline__ void set_next(int item) {
    sync_warps();  // all have read the last one
    if (warp == 0) {
      const Tile tile = tile_at(s, item, p.num_kv_heads, row_shift);
      if (lane == 0) s.next = tile;
    }
    sync_warps();  // `next` is complete
  }
  __device__ __forceinline__ int take_item(int* next_item) {
    int item = 0;
    if (warp == 0 && lane == 0) item = int(gridDim.x) + atomicAdd(next_item, 1);
    return __shfl_sync(kFullWarp, item, 0);
  }

  // A thread's part of a block of e4m3.
  using Held = uint4[kBlockKeys * C::kHeadDim / (16 * kWarpgroupThreads)];

  // Blocks' pages, the last block's first.
  using Pages = int[kBlockPages];
  static constexpr int kBlocksAtOnce = kWarpSize / kBlockPages;
  // Of block `block`, block - 1, ... of the sequence, one a lane.
  __device__ __forceinline__ int pages_from(int seq, int kv_len, int block) const {
    const int last = (kv_len - 1) / kPageTokens;  // stands in for what the sequence does not have
    const int page = min(max((block + 1) * kBlockPages - 1 - lane, 0), last);
    return int(p.page_table[seq * p.page_table_stride + page]);
  }
  __device__ __forceinline__ void pages_of(Pages& pages, int pages_of_lanes, int blocks_before) const {
    const int at = blocks_before % kBlocksAtOnce;
#pragma unroll
    for (int i = 0; i < kBlockPages; ++i)
      pages[i] = __shfl_sync(kFullWarp, pages_of_lanes, (at + 1) * kBlockPages - 1 - i);
  }

  // Of the next tile, which the consumers get to know by it.
  __device__ __forceinline__ void send_queries() {
    if (warp != 0) return;
    const int place = q_ring.place;
    ptx::mbarrier_wait(&s.q_empty[place], q_ring.parity ^ 1);
    q_ring.advance();
    if (lane != 0) return;
    const Tile tile = s.next;
    s.tile[place] = tile;
    if (tile.num_blocks == 0) {
      ptx::mbarrier_arrive(&s.q_full[place]);
      return;
    }
    ptx::mbarrier_arrive_expect(&s.q_full[place], C::kTileBytes);
    for (int c = 0; c < C::kChunks; ++c)
      ptx::tensor_load(s.q[place] + c * C::kChunkBytes, &maps.q, c * 64, tile.kv_head * p.group, tile.token,
                       &s.q_full[place]);
  }

  __device__ __forceinline__ void run(int* next_item) {
    set_next(int(blockIdx.x));
    int num_blocks = s.next.num_blocks;
    if (num_blocks == 0) return send_queries();
    int pages_of_lanes = pages_from(s.next.seq, s.next.kv_len, num_blocks - 1), pages_of_next = 0;
    Pages pages;
    pages_of(pages, pages_of_lanes, 0);
    [[maybe_unused]] Held held;
    if constexpr (C::kWidens) fetch_all(held, p.k_cache, p.k_page_stride, s.next.kv_head, pages);
    if constexpr (C::kFp8Products) request_values(s.next.kv_head, pages);
    while (num_blocks > 0) {
      send_queries();
      const int seq = s.next.seq, kv_len = s.next.kv_len, kv_head = s.next.kv_head;
      for (int block = num_blocks - 1; block >= 0; --block) {
        const int place = kv_ring.place;
        const uint32_t parity = kv_ring.parity ^ 1;
        kv_ring.advance();
        ptx::mbarrier_wait(&s.k_empty[place], parity);
        if constexpr (C::kWidens)
          send_held(s.k[place], &s.k_full[place], held, kBlockKeys, p.v_cache, p.v_page_stride, kv_head,
                    pages);
        else
          send_block(maps.k, s.k[place], &s.k_full[place], kv_head, pages);
        if (block == num_blocks - 1) {  // time to see what comes next
          set_next(take_item(next_item));
          if (s.next.num_blocks > 0)
            pages_of_next = pages_from(s.next.seq, s.next.kv_len, s.next.num_blocks - 1);
        }
        if constexpr (!C::kFp8Products) ptx::mbarrier_wait(&s.v_empty[place], parity);
        if constexpr (!C::kFp8) send_block(maps.v, s.v[place], &s.v_full[place], kv_head, pages);

        const int blocks_before = block == 0 ? 0 : num_blocks - block;
        if (block == 0)
          pages_of_lanes = pages_of_next;
        else if (blocks_before % kBlocksAtOnce == 0)
          pages_of_lanes = pages_from(seq, kv_len, block - 1);
        pages_of(pages, pages_of_lanes, blocks_before);
        const int valid = kv_len - block * kBlockKeys, kv_head_after = block == 0 ? s.next.kv_head : kv_head;
        if constexpr (C::kWidens)
          send_held(s.v[place], &s.v_full[place], held, valid, p.k_cache, p.k_page_stride, kv_head_after,
                    pages);
        if constexpr (C::kFp8Products) {
          const RingPosition<2> arriving = values_ring;
          values_ring.advance();
          if (block > 0 || s.next.num_blocks > 0) request_values(kv_head_after, pages);
          ptx::mbarrier_wait(&s.v_empty[place], parity);
          send_transposed(s.v[place], &s.v_full[place], arriving, valid);
        }
      }
      num_blocks = s.next.num_blocks;
    }
    send_queries();
  }

 private:
  __device__ __forceinline__ void sync_warps() const {
    if constexpr (C::kProducerWarps == 1)
      __syncwarp();
    else
      ptx::barrier_sync(kProducers, C::kProducerWarps * kWarpSize);
  }

  __device__ __forceinline__ void send_block(const CUtensorMap& map, uint8_t* to, uint64_t* full, int kv_head,
                                             const Pages& pages) {
    if (warp != 0 || lane != 0) return;
    ptx::mbarrier_arrive_expect(full, C::kBlockBytes);
#pragma unroll
    for (int i = 0; i < kBlockPages; ++i) {
#pragma unroll
      for (int c = 0; c < C::kBlockChunks; ++c)
        ptx::tensor_load(to + c * C::kChunkBytes + i * kPageTokens * kSwizzleBytes, &map,
                         c * (C::kHeadDim / C::kBlockChunks), kv_head * kPageTokens, pages[i], full);
    }
  }

  // Products of e4m3 want values with the tokens contiguous: a block of them is copied as it is, then its
  // bytes are transposed.
  __device__ __forceinline__ void request_values(int kv_head, const Pages& pages) {
    const int place = values_ring.place;
    send_block(maps.v, s.fp8.values[place], &s.fp8.values_full[place], kv_head, pages);
  }

  // A warp transposes 32 tokens. A 16-bit element of load_matrices_trans is two columns of D: lane 4g + q
  // gets, of columns 16u + 2g and the next, tokens 2q, 2q + 1 of every 8. Into row 16u + g go of the first
  // column, into row 16u + g + 8 of the second, the tokens 2q, 2q + 1, 2q + 8 and 2q + 9 of every 16: as a
  // thread's scores lie, and so that the rows of a matrix fall into different banks. What comes after `valid`
  // tokens becomes 0: its weights are, but it may be NaN.
  __device__ __forceinline__ void send_transposed(uint8_t* to, uint64_t* full, const RingPosition<2>& from,
                                                  int valid) const {
    const int first_token = warp * kWarpSize;
    uint32_t keep[4];  // of the tokens 8 i + 2 q and 8 i + 2 q + 1
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first_token + 8 * i + 2 * (lane % 4);
      keep[i] = (token < valid ? 0x0000ffffu : 0) | (token + 1 < valid ? 0xffff0000u : 0);
    }
    ptx::mbarrier_wait(&s.fp8.values_full[from.place], from.parity);
    const uint32_t source = ptx::smem_address(s.fp8.values[from.place]);
    const int row = lane % 8 + lane / 8 % 2 * 8, unit = first_token / 16 + lane / 16;
    const uint32_t target = ptx::smem_address(to) + swizzled(row, unit);
#pragma unroll 4
    for (int u = 0; u < C::kHeadDim / 16; ++u) {
      uint32_t r[4];
      ptx::load_matrices_trans(r, source + swizzled(first_token + lane, u));
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] &= keep[i];
      const uint32_t columns[4] = {__byte_perm(r[0], r[1], 0x6420), __byte_perm(r[0], r[1], 0x7531),
                                   __byte_perm(r[2], r[3], 0x6420), __byte_perm(r[2], r[3], 0x7531)};
      ptx::store_matrices(target + u * 16 * kSwizzleBytes, columns);
    }
    ptx::fence_proxy_async();
    sync_warps();  // the place of `from` may be filled anew
    if (lane == 0) ptx::mbarrier_arrive(full);
  }

  // Pages of e4m3 go through registers. While one block is widened, the next one takes its place there. In a
  // step, a thread has 16 elements of a token: eight lanes one after another have the first 64 of two tokens,
  // or the last, so that what they store falls into different banks.
  static constexpr int kUnits = C::kHeadDim / 16;  // in a token
  static constexpr int kStepTokens = kWarpgroupThreads / kUnits;
  static constexpr int kStepBytes = 16 * kWarpgroupThreads;
  static constexpr int kStepsOfPage = kPageTokens / kStepTokens;

  __device__ __forceinline__ int unit() const { return lane % 4 + (kUnits == 8 ? lane / 16 * 4 : 0); }
  __device__ __forceinline__ int token_of_step() const {
    return kUnits == 8 ? warp * 4 + lane / 4 % 4 : warp * 8 + lane / 4;
  }
  // The bytes of one step in the same tokens of `cache`.
  __device__ __forceinline__ uint4 fetch(const void* cache, int64_t page_stride, int kv_head,
                                         const Pages& pages, int step) const {
    const auto* page = static_cast<const uint8_t*>(cache) + pages[step / kStepsOfPage] * page_stride;
    const int offset = kv_head * kPageTokens * C::kHeadDim + token_of_step() * C::kHeadDim + unit() * 16;
    return __ldg(reinterpret_cast<const uint4*>(page + offset + step % kStepsOfPage * kStepBytes));
  }
  __device__ __forceinline__ void fetch_all(Held& held, const void* cache, int64_t page_stride, int kv_head,
                                            const Pages& pages) const {
#pragma unroll
    for (int i = 0; i < kBlockPages * kStepsOfPage; ++i)
      held[i] = fetch(cache, page_stride, kv_head, pages, i);
  }
  // What comes after `valid` tokens becomes 0: its weights are, but it may be NaN. Then holds the bytes of
  // `cache`.
  __device__ __forceinline__ void send_held(uint8_t* to, uint64_t* full, Held& held, int valid,
                                            const void* cache, int64_t page_stride, int kv_head,
                                            const Pages& pages) const {
    const int at = unit() % 4 * 2, token = token_of_step();
    uint8_t* chunk = to + unit() / 4 * C::kChunkBytes;
    const auto widen = [](uint32_t low, uint32_t high) {
      return uint4{widen_e4m3(low & 0xffff), widen_e4m3(low >> 16), widen_e4m3(high & 0xffff),
                   widen_e4m3(high >> 16)};
    };
#pragma unroll
    for (int i = 0; i < kBlockPages * kStepsOfPage; ++i) {
      const uint4 bytes = held[i];
      held[i] = fetch(cache, page_stride, kv_head, pages, i);
      uint8_t* rows = chunk + i * kStepTokens * kSwizzleBytes;
      *reinterpret_cast<uint4*>(rows + swizzled(token, at)) = widen(bytes.x, bytes.y);
      *reinterpret_cast<uint4*>(rows + swizzled(token, at + 1)) = widen(bytes.z, bytes.w);
    }
    if (valid < kBlockKeys) {
#pragma unroll 1
      for (int i = 0; i < kBlockPages * kStepsOfPage; ++i) {
        if (i * kStepTokens + token < valid) continue;
        uint8_t* rows = chunk + i * kStepTokens * kSwizzleBytes;
        *reinterpret_cast<uint4*>(rows + swizzled(token, at)) = {0, 0, 0, 0};
        *reinterpret_cast<uint4*>(rows + swizzled(token, at + 1)) = {0, 0, 0, 0};
      }
    }
    ptx::fence_proxy_async();
    __syncwarp();  // the warp's part is complete
    if (lane == 0) ptx::mbarrier_arrive(full);
  }
};

}  // namespace nf::prefill
