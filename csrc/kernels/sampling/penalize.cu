// SPDX-License-Identifier: Apache-2.0
// Penalties on logits. Grid (slices of V, S); one thread = one logit, or four neighbours where rows allow
// 16-byte loads. Moves 13 bytes a logit, of rows that have penalties.
#include <climits>
#include <string>
#include <type_traits>

#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/launch.h"
#include "kernels/sampling/penalize.h"

namespace nf {
namespace {

constexpr int kThreads = 256;

struct RowPenalties {
  float repetition, frequency, presence;

  __device__ __forceinline__ void apply(float& logit, int32_t count, bool in_prompt) const {
    float v = logit;
    if (count > 0 || in_prompt) v = v > 0.0f ? __fdiv_rn(v, repetition) : __fmul_rn(v, repetition);
    v = __fsub_rn(v, __fmul_rn(frequency, float(count)));
    if (count > 0) v = __fsub_rn(v, presence);
    logit = v;
  }
};

template <int kLogits>  // of a thread: 1 or 4
__global__ void __launch_bounds__(kThreads) penalize_kernel(const PenalizeParams p) {
  using Floats = std::conditional_t<kLogits == 4, float4, float>;
  using Counts = std::conditional_t<kLogits == 4, int4, int32_t>;
  using Flags = std::conditional_t<kLogits == 4, uchar4, bool>;
  let_successor_start();
  wait_for_predecessor();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = blockIdx.y;
  if (i * kLogits >= p.vocab) return;
  auto& logits = reinterpret_cast<Floats*>(p.logits + row * p.logits_stride)[i];
  Floats v = logits;
  const Counts count = reinterpret_cast<const Counts*>(p.output_counts + row * p.vocab)[i];
  const Flags in_prompt = reinterpret_cast<const Flags*>(p.in_prompt + row * p.vocab)[i];
  const RowPenalties penalties{p.repetition[row], p.frequency[row], p.presence[row]};
  if constexpr (kLogits == 4) {
    penalties.apply(v.x, count.x, in_prompt.x);
    penalties.apply(v.y, count.y, in_prompt.y);
    penalties.apply(v.z, count.z, in_prompt.z);
    penalties.apply(v.w, count.w, in_prompt.w);
  } else {
    penalties.apply(v, count, in_prompt);
  }
  logits = v;
}

template <int kLogits>
void launch_with(const PenalizeParams& p, cudaStream_t stream) {
  constexpr int kSlice = kThreads * kLogits;
  const int64_t slices = (p.vocab + kSlice - 1) / kSlice;
  NF_CHECK(slices <= INT_MAX, "V=" + std::to_string(p.vocab));
  launch<penalize_kernel<kLogits>>(
      {.ctas = dim3(unsigned(slices), unsigned(p.num_rows)), .threads = kThreads}, stream, p);
}

bool rows_are_vectors(const PenalizeParams& p) {
  const auto aligned = [](const void* pointer, int bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  };
  return p.vocab % 4 == 0 && p.logits_stride % 4 == 0 && aligned(p.logits, 16) &&
         aligned(p.output_counts, 16) && aligned(p.in_prompt, 4);
}

}  // namespace

void penalize(const PenalizeParams& p, cudaStream_t stream) {
  NF_CHECK(p.num_rows >= 0 && p.num_rows <= 65535, "S=" + std::to_string(p.num_rows));
  if (p.num_rows == 0 || p.vocab == 0) return;
  rows_are_vectors(p) ? launch_with<4>(p, stream) : launch_with<1>(p, stream);
}

}  // namespace nf
