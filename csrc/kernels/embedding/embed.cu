// SPDX-License-Identifier: Apache-2.0
// Rows of the embedding table. Grid (T, slices of a row); one thread copies 16 bytes. Moves 2*T*row_bytes.
#include <algorithm>
#include <climits>
#include <string>

#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/launch.h"
#include "kernels/embedding/embed.h"

namespace nf {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) embed_kernel(const EmbedParams p) {
  let_successor_start();
  wait_for_predecessor();
  const int64_t row = blockIdx.x;
  const int64_t vec = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  if (vec >= p.row_bytes / int64_t(sizeof(uint4))) return;
  const int64_t id = p.ids[row];
  uint4 v{};
  if (id >= 0 && id < p.vocab) {
    const char* from = static_cast<const char*>(p.weight) + id * p.weight_stride_bytes;
    v = reinterpret_cast<const uint4*>(from)[vec];
  }
  reinterpret_cast<uint4*>(static_cast<char*>(p.out) + row * p.out_stride_bytes)[vec] = v;
}

}  // namespace

void embed(const EmbedParams& p, cudaStream_t stream) {
  NF_CHECK(p.row_bytes > 0 && p.row_bytes % 16 == 0, std::to_string(p.row_bytes) + " bytes a row");
  NF_CHECK(p.num_tokens >= 0 && p.num_tokens <= INT_MAX, "T=" + std::to_string(p.num_tokens));
  if (p.num_tokens == 0) return;
  const int64_t slices = (p.row_bytes / 16 + kThreads - 1) / kThreads;
  launch<embed_kernel>({.ctas = dim3(unsigned(p.num_tokens), unsigned(slices)), .threads = kThreads}, stream,
                       p);
}

}  // namespace nf
