// SPDX-License-Identifier: Apache-2.0
// Logits to tokens. Grid (S * cluster); a cluster of CTAs = one row, read once from memory (the maximum) and
// then from L2: about three times to find a threshold (threshold.cuh), once for the choice among the kept.
// S*V*4 bytes.
#include <string>

#include "kernels/sampling/sample.h"
#include "kernels/sampling/threshold.cuh"

namespace nf {
namespace {

using namespace row;

template <int kCluster_, int kWidth_>
struct Config {
  static constexpr int kCluster = kCluster_;  // CTAs a row
  static constexpr int kWidth = kWidth_;      // logits a load
};

constexpr uint64_t kNan = ~uint64_t(0);  // a row with one; larger than any pack()

struct SampleSmem {
  uint64_t partial[kWarps];
  ThresholdSmem threshold;
};

// SplitMix64: add the golden-ratio increment, then xor-shift-multiply twice.
__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// In (0, 1): 24 random bits. The largest value that they give would round to 1, whose noise is 0 and wins
// every race, so it is lowered to the next float.
__device__ __forceinline__ float uniform(uint64_t key, int id) {
  constexpr float kBelowOne = 0x1.fffffep-1f;
  const uint32_t bits = uint32_t(mix(key + uint64_t(id)) >> 40);
  return fminf((float(bits) + 0.5f) * 0x1p-24f, kBelowOne);
}

// Relative to the largest, so that a tiny temperature cannot overflow.
__device__ __forceinline__ float scaled(float logit, float largest, float temperature) {
  return __fdiv_rn(__fsub_rn(logit, largest), temperature);
}

// The exponential race, by logarithms as the reference has it: noise is -log(uniform).
__device__ __forceinline__ float race(float scaled, float uniform) {
  return __fsub_rn(scaled, logf(-logf(uniform)));
}

// The key of the smallest logit that, scaled, is at least log(min_p).
__device__ __forceinline__ uint32_t min_p_threshold(float largest, float temperature, float min_p) {
  if (!(min_p > 0.0f) || !isfinite(largest)) return 0;
  const float bound = logf(min_p);
  uint32_t key = order_key(fmaf(bound, temperature, largest));  // within a few floats of the answer
  const auto reaches = [&](uint32_t k) { return scaled(from_order_key(k), largest, temperature) >= bound; };
  for (int i = 0; i < 8 && !reaches(key); ++i) ++key;
  for (int i = 0; i < 8 && reaches(key - 1); ++i) --key;
  return min(key, order_key(largest));
}

template <class C>
__global__ void __launch_bounds__(kThreads) sample_kernel(const SampleParams p) {
  __shared__ SampleSmem s;
  let_successor_start();
  wait_for_predecessor();
  const int64_t row = blockIdx.x / C::kCluster;
  const float* logits = p.logits + row * p.logits_stride;
  const int size = int(p.vocab);
  const bool writes = threadIdx.x == 0 && rank<C::kCluster>() == 0;

  uint64_t best = pack(-INFINITY, 0);
  for_each<C::kCluster, C::kWidth>(logits, size, [&](float v, int id) {
    const uint64_t candidate = v == v ? pack(v, id) : kNan;
    if (candidate > best) best = candidate;
  });
  const uint64_t top = max_over_row<C::kCluster>(best, s.partial);

  const float temperature = p.temperature[row];
  if (!(temperature > 0.0f) || top == kNan) {  // the same for all threads of the row
    if (writes) p.tokens[row] = top == kNan ? -1 : packed_id(top);
    return;
  }

  const float largest = packed_value(top);
  const Logits for_threshold{logits, size, largest, fminf(kBinsPerNat / temperature, 1e30f)};
  const int top_k = p.top_k[row];
  const float top_p = p.top_p[row];
  uint32_t floor = 0;
  if (top_k > 0 && top_k < size)
    floor = find_threshold<false, C::kCluster, C::kWidth>(s.threshold, for_threshold, floor, double(top_k));
  if (top_p <= 0.0f)
    floor = order_key(largest);
  else if (top_p < 1.0f)
    floor = max(floor, find_threshold<true, C::kCluster, C::kWidth>(s.threshold, for_threshold, floor,
                                                                    double(top_p)));
  floor = max(floor, min_p_threshold(largest, temperature, p.min_p[row]));

  // The race. `ahead` is the best of the warp so far: a token of probability p (in its units) can only win if
  // its noise is under p, and noise >= 1 - uniform. So nearly all logarithms are spared.
  const uint64_t key = mix(mix(uint64_t(p.seed[row])) + uint64_t(p.step[row]));
  const float log2e_per_logit = fminf(1.44269504f / temperature, 3e38f);
  uint64_t winner =
      pack(race(scaled(largest, largest, temperature), uniform(key, packed_id(top))), packed_id(top));
  float ahead = packed_value(winner) * 1.44269504f;
  for_each<C::kCluster, C::kWidth>(
      logits, size,
      [&](float v, int id) {
        if (order_key(v) < floor) return;
        const float u = uniform(key, id);
        const float can_win = exp2f(fmaf(v - largest, log2e_per_logit, -ahead)) * 1.001f;
        if (!(1.0f - u <= can_win)) return;
        const uint64_t candidate = pack(race(scaled(v, largest, temperature), u), id);
        if (candidate > winner) winner = candidate;
      },
      [&] {
        const uint32_t best_key = __reduce_max_sync(kFullWarp, uint32_t(winner >> 32));
        ahead = from_order_key(best_key) * 1.44269504f;
      });
  winner = max_over_row<C::kCluster>(winner, s.partial);
  if (writes) p.tokens[row] = packed_id(winner);
}

template <int kCluster>
void launch_sample(const SampleParams& p, bool vectors, cudaStream_t stream) {
  if (vectors)
    launch_rows<sample_kernel<Config<kCluster, 4>>>(kCluster, p.num_rows, stream, p);
  else
    launch_rows<sample_kernel<Config<kCluster, 1>>>(kCluster, p.num_rows, stream, p);
}

}  // namespace

void sample(const SampleParams& p, cudaStream_t stream) {
  NF_CHECK(p.num_rows >= 0 && p.num_rows <= INT_MAX / 8, "S=" + std::to_string(p.num_rows));
  NF_CHECK(p.vocab > 0 && p.vocab <= 1 << 24, "V=" + std::to_string(p.vocab));
  if (p.num_rows == 0) return;
  const bool vectors = reinterpret_cast<uintptr_t>(p.logits) % sizeof(float4) == 0 && p.vocab % 4 == 0 &&
                       p.logits_stride % 4 == 0;
  // Few rows share the chip by larger clusters; the result is the same for any. One CTA takes an SM.
  if (!can_overlap<sample_kernel<Config<1, 4>>>() || p.vocab < 8 * kThreads || p.num_rows > 128)
    launch_sample<1>(p, vectors, stream);
  else if (p.num_rows > 16)
    launch_sample<2>(p, vectors, stream);
  else
    launch_sample<8>(p, vectors, stream);
}

}  // namespace nf
