// SPDX-License-Identifier: Apache-2.0
// Where to cut a row of logits so that the largest of them reach a given count (top-k) or a given share of
// the probability (top-p), without sorting: histograms of ever finer brackets. A pass costs one read of the
// row from L2.
//
// The first histogram has bins of 1/16 nat below the maximum. Within a bin, probabilities differ by at most
// e^(1/16), so they are summed as integers in units of the bin's largest: exact in any order, and the same
// for any cluster size. The bin where the running sum reaches the target is then split into 1024, again by
// value, until it holds a single value.
#pragma once

#include "kernels/sampling/row_cluster.cuh"

namespace nf::row {

constexpr int kBins = kThreads;  // one thread = one bin
constexpr float kBinsPerNat = 16.0f;

struct ThresholdSmem {
  uint32_t bin[kBins];
  double warp_sum[kWarps];
  double running_sum[kBins];  // inclusive
  int found;
};

struct Logits {
  const float* row;      // [V]
  int size;              // V
  float largest;         // of the row
  float bins_per_logit;  // kBinsPerNat / temperature
};

// Adds each thread's bin over the cluster and finds the first bin where the running sum reaches the target:
// `target`, or with `is_share` that share of the total. Returns it, or -1; `target` becomes what is left of
// it for that bin, `own` the units in it. `weight` is what one unit of this thread's bin counts.
template <int kCluster>
__device__ __forceinline__ int find_bin(ThresholdSmem& s, double weight, bool is_share, double& target,
                                        uint32_t& own) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, t = threadIdx.x;
  if (t == 0) s.found = INT_MAX;
  sync<kCluster>();  // the histograms of all CTAs are complete
  uint32_t units = 0;
#pragma unroll
  for (int r = 0; r < kCluster; ++r) units += peer<kCluster>(s.bin[t], r);
  double sum = double(units) * weight;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const double up = __shfl_up_sync(kFullWarp, sum, step);
    if (lane >= step) sum += up;
  }
  if (lane == kWarpSize - 1) s.warp_sum[warp] = sum;
  __syncthreads();  // warp_sum complete
  for (int w = 0; w < warp; ++w) sum += s.warp_sum[w];
  s.running_sum[t] = sum;
  __syncthreads();  // running_sum complete
  if (is_share) target *= s.running_sum[kBins - 1];
  if (units > 0 && sum >= target) atomicMin(&s.found, t);
  sync<kCluster>();  // `found` complete
  const int found = s.found;
  own = 0;
  if (found < kBins) {
    if (found > 0) target -= s.running_sum[found - 1];
#pragma unroll
    for (int r = 0; r < kCluster; ++r) own += peer<kCluster>(s.bin[found], r);
  }
  sync<kCluster>();  // the histograms read by all, before one is cleared
  return found < kBins ? found : -1;
}

// The lowest key that is kept, so that the kept are the fewest of the largest logits with a sum of at least
// the target: with kMass, `target` times the probability of all logits of key >= floor; else `target` logits.
// Equal logits are kept together; 0 (keep all) where the target is not reached.
template <bool kMass, int kCluster, int kWidth>
__device__ __forceinline__ uint32_t find_threshold(ThresholdSmem& s, const Logits& logits, uint32_t floor,
                                                   double target) {
  const int t = threadIdx.x;
  const float unit = kMass ? 0.99f * 4294967295.0f / float(logits.size) : 1.0f;  // V of them fit in 32 bits
  constexpr float kLog2PerBin = 1.44269504f / kBinsPerNat;
  const auto bins_down = [&](float v) { return (logits.largest - v) * logits.bins_per_logit; };
  const auto weigh = [&](float bins, float bin) {
    return kMass ? __float2uint_rn(exp2f((bin - bins) * kLog2PerBin) * unit) : 1u;
  };

  s.bin[t] = 0;
  __syncthreads();  // cleared before anyone adds
  for_each<kCluster, kWidth>(logits.row, logits.size, [&](float v, int) {
    const float bins = bins_down(v);
    if (!(bins >= 0.0f) || order_key(v) < floor) return;
    const int bin = min(int(bins), kBins - 1);
    if (kMass && bin == kBins - 1) return;  // 64 nats below the maximum: of no weight
    atomicAdd(&s.bin[bin], weigh(bins, float(bin)));
  });

  uint32_t own;
  const double weight = kMass ? exp(-double(t) / kBinsPerNat) : 1.0;
  int found = find_bin<kCluster>(s, weight, kMass, target, own);
  if (found < 0) return 0;

  const bool last = found == kBins - 1;
  const float near = float(found), far = float(found + 1);
  if (kMass) target /= exp(-double(found) / kBinsPerNat);
  // Keys of the bin: its ends, and some more, since they are rounded.
  const float near_distance = near / logits.bins_per_logit, far_distance = far / logits.bins_per_logit;
  const float slack = 1e-6f * (fabsf(logits.largest) + far_distance);
  uint32_t high = order_key(fminf(logits.largest - near_distance + slack, logits.largest));
  uint32_t low = last ? 0 : order_key(logits.largest - far_distance - slack);
  low = max(low, floor);

  while (low < high &&
         float(own) > 1.5f * unit) {  // 1.5: at least two of them, since each weighs >= 0.93 units
    const int bits = max(0, 32 - __clz(high - low) - 10);
    s.bin[t] = 0;
    __syncthreads();  // cleared before anyone adds
    for_each<kCluster, kWidth>(logits.row, logits.size, [&](float v, int) {
      const float bins = bins_down(v);
      if (!(bins >= near) || !(bins < far || last)) return;
      const uint32_t key = order_key(v);
      if (key < low || key > high) return;
      atomicAdd(&s.bin[(high - key) >> bits], weigh(bins, near));
    });
    found = find_bin<kCluster>(s, 1.0, false, target, own);
    if (found < 0) return low;  // the sum falls short of the target by its rounding: all are kept
    const uint32_t bin_high = high - (uint32_t(found) << bits);
    const uint32_t span = (1u << bits) - 1;
    low = bin_high - low > span ? bin_high - span : low;
    high = bin_high;
  }
  return low;
}

}  // namespace nf::row
