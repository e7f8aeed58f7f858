// SPDX-License-Identifier: Apache-2.0
// Log-probabilities of chosen and largest tokens. Grid (S * cluster); a cluster of CTAs = one row, read once
// from memory and about four times from L2. The cluster does not depend on S, and so neither do the bits of
// the sum.
#include <string>

#include "kernels/sampling/sample.h"
#include "kernels/sampling/threshold.cuh"

namespace nf {
namespace {

using namespace row;

constexpr int kMaxTop = 256;
constexpr int kListed = 2 * kThreads;  // of one CTA: what reaches the threshold

struct TopSmem {
  uint64_t partial[kWarps];
  float warp_sum[kWarps];
  int warp_count[kWarps];
  ThresholdSmem threshold;
  uint64_t listed[kListed];
  int num_listed;
};

// Appends what reaches the threshold to the CTA's list. With many equal logits at the threshold the list is
// too short: then, `in_turn`, one row of threads after another, until the lowest `wanted` ids of each CTA's
// share are in it.
template <int kCluster, int kWidth>
__device__ __forceinline__ void list_largest(TopSmem& s, const float* row, int size, uint32_t floor,
                                             int wanted) {
  const auto append = [&](float v, int id) {
    if (!(v == v) || order_key(v) < floor) return;
    const int at = atomicAdd(&s.num_listed, 1);
    if (at < kListed) s.listed[at] = pack(v, id);
  };
  if (threadIdx.x == 0) s.num_listed = 0;
  __syncthreads();  // the list is empty
  for_each<kCluster, kWidth>(row, size, append);
  __syncthreads();  // the list is complete
  const bool fits = s.num_listed <= kListed;
  __syncthreads();  // read by all
  if (fits) return;

  // Fewer than `wanted` are above the threshold; the rest equal it. First the former, then the latter by id.
  if (threadIdx.x == 0) s.num_listed = 0;
  __syncthreads();  // the list is empty again
  for_each<kCluster, kWidth>(row, size, [&](float v, int id) {
    if (v == v && order_key(v) > floor) append(v, id);
  });
  constexpr int kStep = kCluster * kThreads;
  for (int base = 0; base < size; base += kStep) {
    __syncthreads();  // the ids of the step before are in
    const bool enough = s.num_listed >= 2 * wanted;
    __syncthreads();  // read by all
    if (enough) break;
    const int id = base + rank<kCluster>() * kThreads + int(threadIdx.x);
    if (id < size && row[id] == row[id] && order_key(row[id]) == floor) append(row[id], id);
  }
  __syncthreads();  // the list is complete
}

template <int kCluster, int kWidth>
__global__ void __launch_bounds__(kThreads) top_logprobs_kernel(const TopLogprobsParams p) {
  __shared__ TopSmem s;
  let_successor_start();
  wait_for_predecessor();
  const int64_t row = blockIdx.x / kCluster;
  const float* logits = p.logits + row * p.logits_stride;
  const int size = int(p.vocab), lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  uint64_t best = pack(-INFINITY, 0);
  for_each<kCluster, kWidth>(logits, size, [&](float v, int id) {
    const uint64_t candidate = pack(v, id);
    if (v == v && candidate > best) best = candidate;
  });
  const float largest = packed_value(max_over_row<kCluster>(best, s.partial));

  const int64_t token = p.tokens[row];
  const bool known = token >= 0 && token < p.vocab;
  const float chosen = known ? logits[token] : -INFINITY;
  float sum = 0.0f;
  int larger = 0;
  for_each<kCluster, kWidth>(logits, size, [&](float v, int) {
    sum += expf(v - largest);
    larger += v > chosen;
  });
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, mask);
    larger += __shfl_xor_sync(kFullWarp, larger, mask);
  }
  if (lane == 0) s.warp_sum[warp] = sum, s.warp_count[warp] = larger;
  sync<kCluster>();  // the warps' sums of all CTAs are complete
  double total = 0.0;
  int64_t rank_of_chosen = 1;
  for (int r = 0; r < kCluster; ++r) {
    for (int w = 0; w < kWarps; ++w) {
      total += peer<kCluster>(s.warp_sum[w], r);
      rank_of_chosen += peer<kCluster>(s.warp_count[w], r);
    }
  }
  const float log_total = float(log(total));
  if (threadIdx.x == 0 && rank<kCluster>() == 0) {
    p.chosen[row] = chosen - largest - log_total;
    p.rank[row] = rank_of_chosen;
  }

  if (p.num_top > 0) {  // the same for all threads
    const Logits for_threshold{logits, size, largest, kBinsPerNat};
    const uint32_t floor = p.num_top < size ? find_threshold<false, kCluster, kWidth>(
                                                  s.threshold, for_threshold, 0, double(p.num_top))
                                            : 0;
    list_largest<kCluster, kWidth>(s, logits, size, floor, p.num_top);
    sync<kCluster>();  // the lists of all CTAs are complete
    // An element's place is the number of larger ones; ids make all different.
    const int mine = min(s.num_listed, kListed);
    for (int i = int(threadIdx.x); i < mine; i += kThreads) {
      const uint64_t element = s.listed[i];
      int place = 0;
      for (int r = 0; r < kCluster; ++r) {
        const int theirs = min(peer<kCluster>(s.num_listed, r), kListed);
        for (int j = 0; j < theirs; ++j) place += peer<kCluster>(s.listed[j], r) > element;
      }
      if (place >= p.num_top) continue;
      p.top_values[row * p.num_top + place] = packed_value(element) - largest - log_total;
      p.top_ids[row * p.num_top + place] = packed_id(element);
    }
  }
  sync<kCluster>();  // no CTA leaves while others read its shared memory
}

template <int kCluster>
void launch_top(const TopLogprobsParams& p, cudaStream_t stream) {
  const bool vectors = reinterpret_cast<uintptr_t>(p.logits) % sizeof(float4) == 0 && p.vocab % 4 == 0 &&
                       p.logits_stride % 4 == 0;
  if (vectors)
    launch_rows<top_logprobs_kernel<kCluster, 4>>(kCluster, p.num_rows, stream, p);
  else
    launch_rows<top_logprobs_kernel<kCluster, 1>>(kCluster, p.num_rows, stream, p);
}

}  // namespace

void top_logprobs(const TopLogprobsParams& p, cudaStream_t stream) {
  NF_CHECK(p.num_rows >= 0 && p.num_rows <= INT_MAX / 8, "S=" + std::to_string(p.num_rows));
  NF_CHECK(p.vocab > 0 && p.vocab <= 1 << 24, "V=" + std::to_string(p.vocab));
  NF_CHECK(p.num_top >= 0 && p.num_top <= kMaxTop && p.num_top <= p.vocab, "N=" + std::to_string(p.num_top));
  if (p.num_rows == 0) return;
  constexpr int kCluster = 4;
  if (can_overlap<top_logprobs_kernel<1, 4>>())
    launch_top<kCluster>(p, stream);
  else
    launch_top<1>(p, stream);
}

}  // namespace nf
