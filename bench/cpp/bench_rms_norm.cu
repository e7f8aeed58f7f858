// SPDX-License-Identifier: Apache-2.0
// Times the norm kernels under every config that holds the row: the table behind csrc/host/norm_config.cpp.
// Cold L2 (inputs rotate over 3x its size), launches chained in a CUDA graph, median of 9 replays.
//   bench_rms_norm [E...]        default: 4096 8192 16384
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "graph_timer.h"
#include "kernels/common/check.h"
#include "kernels/norm/rms_norm.h"

namespace {

using Scalar = __nv_bfloat16;

// Median time of one launch in us; `enqueue(i, stream)` launches with input set i.
template <class F>
double time_us(int num_launches, F&& enqueue) {
  cudaStream_t stream;
  NF_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto enqueue_all = [&] {
    for (int i = 0; i < num_launches; ++i) enqueue(i, stream);
  };
  const double us = replay_us(stream, enqueue_all, 9) / num_launches;
  NF_CUDA(cudaStreamDestroy(stream));
  return us;
}

void bench(int dim, int64_t num_tokens, bool add, int l2_bytes) {
  const int64_t elements = num_tokens * dim;
  const int64_t set_bytes =
      (add ? 3 : 2) * elements * int64_t(sizeof(Scalar));  // memory that one call touches
  const int num_sets = int(std::clamp<int64_t>(3LL * l2_bytes / set_bytes + 1, 2, 256));
  Scalar *data, *weight;
  NF_CUDA(cudaMalloc(&data, num_sets * set_bytes));
  NF_CUDA(cudaMalloc(&weight, dim * sizeof(Scalar)));
  NF_CUDA(cudaMemset(data, 0x3c, num_sets * set_bytes));  // 0x3c3c is 0.0115 in bf16
  NF_CUDA(cudaMemset(weight, 0x3c, dim * sizeof(Scalar)));

  const int num_launches = num_sets * (num_tokens > 1024 ? 1 : 4);
  const double moved_bytes = (add ? 4.0 : 2.0) * elements * sizeof(Scalar) + dim * sizeof(Scalar);
  const auto report = [&](const char* what, double us, double bytes) {
    std::printf("%-12s T=%-5lld E=%-5d | %-24s | %8.2f us | %6.0f GB/s\n", add ? "add_rms_norm" : "rms_norm",
                static_cast<long long>(num_tokens), dim, what, us, bytes / us / 1e3);
  };

  for (int threads : {128, 256, 512, 1024}) {
    for (int vecs : {1, 2, 4}) {
      const bool holds_row = threads * vecs * 8 >= dim && (threads - 32) * vecs * 8 < dim;
      if (!holds_row || threads > (vecs < 4 ? 512 : 1024)) continue;
      const nf::NormConfig config{threads, vecs};
      const double us = time_us(num_launches, [&](int i, cudaStream_t stream) {
        Scalar* set = data + (i % num_sets) * (set_bytes / int64_t(sizeof(Scalar)));
        const nf::RmsNormParams<Scalar> p{.out = set,
                                          .residual = add ? set + 2 * elements : nullptr,
                                          .x = set + elements,
                                          .weight = weight,
                                          .num_tokens = num_tokens,
                                          .dim = dim,
                                          .out_stride = dim,
                                          .residual_stride = dim,
                                          .x_stride = dim,
                                          .eps = 1e-5f};
        add ? nf::add_rms_norm(p, config, stream) : nf::rms_norm(p, config, stream);
      });
      const bool picked = config == nf::pick_norm_config(dim, num_tokens);
      report((nf::to_string(config) + (picked ? " *" : "")).c_str(), us, moved_bytes);
    }
  }
  const double copy_us = time_us(num_launches, [&](int i, cudaStream_t stream) {
    Scalar* set = data + (i % num_sets) * (set_bytes / int64_t(sizeof(Scalar)));
    NF_CUDA(
        cudaMemcpyAsync(set, set + elements, elements * sizeof(Scalar), cudaMemcpyDeviceToDevice, stream));
  });
  report("cudaMemcpy of x", copy_us, 2.0 * elements * sizeof(Scalar));
  NF_CUDA(cudaFree(data));
  NF_CUDA(cudaFree(weight));
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> dims;
  for (int i = 1; i < argc; ++i) dims.push_back(std::atoi(argv[i]));
  if (dims.empty()) dims = {4096, 8192, 16384};
  try {
    cudaDeviceProp gpu;
    NF_CUDA(cudaGetDeviceProperties(&gpu, 0));
    std::printf("%s; * is the config that the engine picks\n", gpu.name);
    for (int dim : dims)
      for (bool add : {false, true})
        for (int64_t num_tokens : {1, 64, 1024, 8192}) bench(dim, num_tokens, add, gpu.l2CacheSize);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
