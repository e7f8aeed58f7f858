// SPDX-License-Identifier: Apache-2.0
// Penalties on logits. Grid (slices of V, S); one thread = one logit. Moves 13 bytes a logit, of rows that
// have penalties.
#include <climits>
#include <string>

#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/launch.h"
#include "kernels/sampling/penalize.h"

namespace nf {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) penalize_kernel(const PenalizeParams p) {
  let_successor_start();
  wait_for_predecessor();
  const int64_t id = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = blockIdx.y;
  if (id >= p.vocab) return;
  const int32_t count = p.output_counts[row * p.vocab + id];
  const bool seen = count > 0 || p.in_prompt[row * p.vocab + id];
  float& logit = p.logits[row * p.logits_stride + id];
  float v = logit;
  if (seen) {
    const float factor = p.repetition[row];
    v = v > 0.0f ? __fdiv_rn(v, factor) : __fmul_rn(v, factor);
  }
  v = __fsub_rn(v, __fmul_rn(p.frequency[row], float(count)));
  if (count > 0) v = __fsub_rn(v, p.presence[row]);
  logit = v;
}

}  // namespace

void penalize(const PenalizeParams& p, cudaStream_t stream) {
  NF_CHECK(p.num_rows >= 0 && p.num_rows <= 65535, "S=" + std::to_string(p.num_rows));
  if (p.num_rows == 0 || p.vocab == 0) return;
  const int64_t slices = (p.vocab + kThreads - 1) / kThreads;
  NF_CHECK(slices <= INT_MAX, "V=" + std::to_string(p.vocab));
  launch<penalize_kernel>({.ctas = dim3(unsigned(slices), unsigned(p.num_rows)), .threads = kThreads}, stream,
                          p);
}

}  // namespace nf
