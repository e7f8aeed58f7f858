// SPDX-License-Identifier: Apache-2.0
// Causal attention of prompts over paged KV. Grid: one CTA an SM, which takes tiles of 128 rows (16 queries
// of the 8 heads that share keys and values, say) from a line until none is left (host/prefill_schedule.h). A
// producer warp copies queries, and keys and values page by page, into rings in shared memory (four warps
// where they have to be widened or transposed); two warpgroups with 64 rows each multiply. Bound by the
// tensor cores: 4 D operations a row and visible key.
#pragma once

#include <algorithm>
#include <string>

#include "kernels/attention/prefill_consumer.cuh"
#include "kernels/attention/prefill_producer.cuh"
#include "kernels/common/check.h"
#include "kernels/common/dispatch.h"
#include "kernels/common/launch.h"
#include "kernels/ptx/tensor_map.h"

namespace nf {
namespace prefill {

// Zero between launches: items taken beyond the first of each CTA, CTAs that have finished.
static __device__ int next_item, ctas_done;

struct LaunchConfig {
  int row_shift;      // log2 of the rows of a query
  float score_scale;  // softmax_scale * k_scale * log2(e)
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    prefill_kernel(const __grid_constant__ TensorMaps maps,
                   const __grid_constant__ PrefillAttentionParams<typename C::Scalar> p,
                   const LaunchConfig config) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t s_bytes[];
  auto& s = *reinterpret_cast<Smem<C>*>(s_bytes);
  const int warp =
      __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);  // uniform, which wgmma wants to be seen
  const int lane = threadIdx.x % kWarpSize;
  if (threadIdx.x == 0) {
    const auto init = [](uint64_t& full, uint64_t& empty, int producers) {
      ptx::mbarrier_init(&full, producers);
      ptx::mbarrier_init(&empty, kConsumerWarps);
    };
    for (int i = 0; i < 2; ++i) init(s.q_full[i], s.q_empty[i], 1);
    for (int i = 0; i < C::kStages; ++i) {
      init(s.k_full[i], s.k_empty[i], C::kWidens ? C::kProducerWarps : 1);
      init(s.v_full[i], s.v_empty[i], C::kProducerWarps);
    }
    if constexpr (C::kFp8Products)
      for (uint64_t& full : s.fp8.values_full) ptx::mbarrier_init(&full, 1);
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensor_map(&maps.q);
    if constexpr (!C::kWidens) {
      ptx::prefetch_tensor_map(&maps.k);
      ptx::prefetch_tensor_map(&maps.v);
    }
  }
  let_successor_start();
  wait_for_predecessor();
  list_sequences<C>(s, p, config.row_shift);  // its barriers make the mbarriers known, too

  if (warp < kConsumerWarps) {
    ptx::take_registers<C::kConsumerRegisters>();
    Consumer<C>{s, p, config.row_shift, config.score_scale, warp / 4, warp * kWarpRows}.run();
  } else {
    ptx::leave_registers<C::kProducerRegisters>();
    const int producer = warp - kConsumerWarps;
    if (producer >= C::kProducerWarps) return;
    Producer<C>{s, p, maps, config.row_shift, producer, lane}.run(&next_item);
    if (producer != 0 || lane != 0) return;
    __threadfence();  // our last item is taken before we are done
    if (atomicAdd(&ctas_done, 1) == int(gridDim.x) - 1) next_item = ctas_done = 0;  // for the next launch
  }
#else
  __trap();
#endif
}

template <class C>
void launch_prefill(const PrefillAttentionParams<typename C::Scalar>& p, cudaStream_t stream) {
  constexpr auto kKernel = prefill_kernel<C>;
  constexpr int kSmemBytes = int(sizeof(Smem<C>));
  static_assert(kSmemBytes <= 227 * 1024);
  NF_CHECK(can_overlap<kKernel>(), "a GPU or a build without sm_90a");
  const LaunchConfig config{row_shift(p.group), p.softmax_scale * (C::kFp8 ? p.k_scale : 1.0f) * 1.44269504f};
  const auto size = [](int64_t n) { return cuuint64_t(n); };
  const auto pages_map = [&](const void* cache, int64_t page_stride) {
    if (C::kWidens) return CUtensorMap{};
    constexpr int kBytes = int(sizeof(typename C::CacheElement));
    const int64_t rows = int64_t(p.num_kv_heads) * kPageTokens;
    const int64_t stride = p.num_pages > 1 ? page_stride : rows * C::kHeadDim;
    return ptx::swizzled_map<3>(cache, kBytes, {size(C::kHeadDim), size(rows), size(p.num_pages)},
                                {size(C::kHeadDim * kBytes), size(stride * kBytes)},
                                {kSwizzleBytes / kBytes, kPageTokens, 1});
  };
  const TensorMaps maps{
      .q = ptx::swizzled_map<3>(
          p.q, 2, {size(C::kHeadDim), size(p.num_kv_heads * p.group), size(p.num_tokens)},
          {size(C::kHeadDim * 2), size(p.q_stride * 2)},
          {64, cuuint32_t(1) << config.row_shift, cuuint32_t(kTileRows >> config.row_shift)}),
      .k = pages_map(p.k_cache, p.k_page_stride),
      .v = pages_map(p.v_cache, p.v_page_stride),
  };
  launch<kKernel>({.ctas = dim3(unsigned(num_sms())), .threads = C::kThreads, .smem_bytes = kSmemBytes},
                  stream, maps, p, config);
}

}  // namespace prefill

template <class Scalar>
void prefill_attention(const PrefillAttentionParams<Scalar>& p, cudaStream_t stream) {
  using namespace prefill;
  NF_CHECK(p.group >= 1 && p.group <= 16, "G=" + std::to_string(p.group));
  NF_CHECK(p.softmax_scale > 0.0f, "softmax_scale=" + std::to_string(p.softmax_scale));
  NF_CHECK(p.num_tokens >= 0 && p.num_tokens < 1 << 27, "T=" + std::to_string(p.num_tokens));
  NF_CHECK(p.num_seqs >= 0 && p.num_seqs <= kMaxPrefillSeqs, "S=" + std::to_string(p.num_seqs));
  if (p.num_tokens <= kMostDecodeQueries || p.num_seqs == 0) return;
  NF_CHECK(!p.fp8_products || (p.fp8_cache && p.head_dim == 128),
           "FP8 products of " + std::string(p.fp8_cache ? "e4m3" : "16-bit") +
               " pages, D=" + std::to_string(p.head_dim));
  using Fp8 = __nv_fp8_e4m3;
  if (p.fp8_products) return launch_prefill<Config<Scalar, Fp8, Fp8, 128>>(p, stream);
  dispatch<64, 128>("D", p.head_dim, [&](auto head_dim) {
    if (p.fp8_cache)
      launch_prefill<Config<Scalar, Fp8, __half, head_dim>>(p, stream);
    else
      launch_prefill<Config<Scalar, Scalar, Scalar, head_dim>>(p, stream);
  });
}

}  // namespace nf
