// SPDX-License-Identifier: Apache-2.0
// Times packed_linear without torch: every linear of Super-49B alone (launches chained over memory far beyond
// L2), and all of them in the order of one decode step, each weight in its own memory. CUDA graphs, median of
// replays, random data. The TFLOP/s count 2 T N K operations.
//   bench_packed_linear [T...]        default: 1 8 64 128 256 2048 8192
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "graph_timer.h"
#include "kernels/common/check.h"
#include "kernels/linear/linear.h"

namespace {

using Fp8 = __nv_fp8_e4m3;
using Bf16 = __nv_bfloat16;

struct Linear {
  const char* name;
  int num_rows, num_cols, element_bytes;
  int64_t bytes() const { return int64_t(num_rows) * num_cols * element_bytes; }
};

// FFN widths of Super-49B and how many layers have each; 49 layers have attention.
struct Width {
  int width, count;
};
const Width kWidths[] = {{2816, 6}, {5632, 8}, {7168, 10}, {14336, 6}, {17920, 1}, {28672, 49}};
constexpr int kHidden = 8192, kAttentionLayers = 49;
constexpr int kMaxTokens = 8192, kMaxLogitRows = 256;
const Linear kQkv{"qkv", 10240, kHidden, 1}, kO{"o", kHidden, kHidden, 1},
    kHead{"lm_head bf16", 128256, kHidden, 2};

Linear gate_up(int width) { return {"gate_up", 2 * width, kHidden, 1}; }
Linear down(int width) { return {"down", kHidden, width, 1}; }

std::vector<Linear> decode_step() {
  std::vector<Linear> step;
  int attention = kAttentionLayers;
  for (int i = std::size(kWidths) - 1; i >= 0; --i) {
    for (int j = 0; j < kWidths[i].count; ++j) {
      if (attention-- > 0) step.insert(step.end(), {kQkv, kO});
      step.insert(step.end(), {gate_up(kWidths[i].width), down(kWidths[i].width)});
    }
  }
  step.push_back(kHead);
  return step;
}

// Normal values, as e4m3: the sum of four uniforms, variance 1. Other data changes the GPU's power and so its
// clock. Read as bf16 they are normal numbers too.
__global__ void fill(__nv_fp8_e4m3* values, size_t size) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < size;
       i += size_t(gridDim.x) * blockDim.x) {
    uint64_t v = (i + 1) * 0x9E3779B97F4A7C15ull;
    v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9ull;
    v ^= v >> 31;
    float sum = -2.0f;
    for (int j = 0; j < 4; ++j) sum += float(v >> (16 * j) & 0xffff) * 0x1p-16f;
    values[i] = __nv_fp8_e4m3(sum * 1.7320508f);
  }
}

__global__ void read(const uint4* values, size_t size, uint32_t* out) {
  uint32_t sum = 0;
  size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x, stride = size_t(gridDim.x) * blockDim.x;
  for (; i + 3 * stride < size; i += 4 * stride) {
    const uint4 a = __ldcs(values + i), b = __ldcs(values + i + stride), c = __ldcs(values + i + 2 * stride),
                d = __ldcs(values + i + 3 * stride);
    sum ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  if (sum == 0x12345678) *out = sum;
}

struct Bench {
  int num_sms;
  char* weights;
  int64_t weight_bytes;
  char *x, *out, *workspace;
  cudaStream_t stream;

  void enqueue(const Linear& l, const char* packed, int num_tokens) const {
    const nf::PackedLinearParams p{
        .out = out,
        .x = x,
        .packed = packed,
        .x_scale = nullptr,
        .weight_scale = nullptr,
        .out_scale = nullptr,
        .workspace = workspace,
        .num_tokens = num_tokens,
        .num_rows = l.num_rows,
        .num_cols = l.num_cols,
        .out_stride = l.num_rows,
        .x_stride = l.num_cols,
        .x_scale_per_token = false,
        .weight_scale_per_row = false,
        .out_type = nf::OutType::kBfloat16,
        .epilogue = nf::Epilogue::kStore,
        .schedule = nf::make_linear_schedule(l.num_rows, l.num_cols, l.element_bytes, num_sms),
        .num_sms = num_sms};
    l.element_bytes == 1 ? nf::packed_linear<Fp8>(p, stream) : nf::packed_linear<Bf16>(p, stream);
  }

  template <class F>
  double time_us(F&& enqueue_all, int repeats) const {
    return replay_us(stream, enqueue_all, repeats);
  }

  void shape(const Linear& l, int num_tokens) const {
    const double tflop = 2e-12 * num_tokens * l.num_rows * l.num_cols;
    const int launches = int(std::clamp<double>(std::min(2.5e9 / double(l.bytes()), 12.0 / tflop), 3, 40));
    const int64_t stride = (l.bytes() + 65535) / 32768 * 32768;
    const int sets = int(std::min<int64_t>(launches, weight_bytes / stride));
    const double us = time_us(
                          [&] {
                            for (int i = 0; i < launches; ++i)
                              enqueue(l, weights + i % sets * stride, num_tokens);
                          },
                          5) /
                      launches;
    std::printf("  T=%-4d %-12s %6d x %-5d %8.2f us %6.3f TB/s %6.0f TFLOP/s\n", num_tokens, l.name,
                l.num_rows, l.num_cols, us, double(l.bytes()) / us / 1e6, tflop / us * 1e6);
  }

  void step(int num_tokens) const {
    int64_t bytes = 0;
    std::vector<Linear> step = decode_step();
    if (num_tokens > kMaxLogitRows) step.pop_back();  // only the last token of a prompt has logits
    double tflop = 0;
    for (const Linear& l : step) tflop += 2e-12 * num_tokens * l.num_rows * l.num_cols;
    const double us = time_us(
        [&] {
          bytes = 0;
          for (size_t i = 0; i < step.size(); ++i) {
            const char* packed = weights + bytes;
            bytes += (step[i].bytes() + 32767) / 32768 * 32768;
            enqueue(step[i], packed, num_tokens);
          }
        },
        num_tokens > kMaxLogitRows ? 3 : 7);
    std::printf("T=%-4d all %zu linears of a step, %.2f GB: %.3f ms, %.3f TB/s, %.0f TFLOP/s\n", num_tokens,
                step.size(), double(bytes) / 1e9, us / 1e3, double(bytes) / us / 1e6, tflop / us * 1e6);
  }
};

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> tokens;
  for (int i = 1; i < argc; ++i) tokens.push_back(std::atoi(argv[i]));
  if (tokens.empty()) tokens = {1, 8, 64, 128, 256, 2048, 8192};
  try {
    cudaDeviceProp gpu;
    NF_CUDA(cudaGetDeviceProperties(&gpu, 0));
    Bench b{};
    b.num_sms = gpu.multiProcessorCount;
    b.weight_bytes = int64_t(50) << 30;
    NF_CUDA(cudaMalloc(&b.weights, b.weight_bytes));
    NF_CUDA(cudaMalloc(&b.x, kMaxTokens * 28672));
    NF_CUDA(cudaMalloc(&b.out, int64_t(kMaxTokens) * 57344 * 2));
    const int64_t workspace_bytes = nf::linear_workspace_bytes(b.num_sms);
    NF_CUDA(cudaMalloc(&b.workspace, workspace_bytes));
    NF_CUDA(cudaMemset(b.workspace, 0xff, workspace_bytes));
    NF_CUDA(cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking));
    fill<<<4096, 256, 0, b.stream>>>(reinterpret_cast<Fp8*>(b.weights), b.weight_bytes);
    fill<<<4096, 256, 0, b.stream>>>(reinterpret_cast<Fp8*>(b.x), kMaxTokens * 28672);
    NF_CUDA(cudaStreamSynchronize(b.stream));
    const double us = b.time_us(
        [&] {
          read<<<b.num_sms * 16, 256, 0, b.stream>>>(reinterpret_cast<uint4*>(b.weights), b.weight_bytes / 16,
                                                     reinterpret_cast<uint32_t*>(b.out));
        },
        3);
    std::printf("%s; reads of 16 bytes: %.3f TB/s\n", gpu.name, b.weight_bytes / us / 1e6);
    for (int t : tokens) {
      b.step(t);
      std::vector<Linear> linears = {kQkv, kO};
      for (const Width& w : kWidths) linears.insert(linears.end(), {gate_up(w.width), down(w.width)});
      if (t <= kMaxLogitRows) linears.push_back(kHead);
      linears.push_back({"qkv bf16", kQkv.num_rows, kQkv.num_cols, 2});
      for (const Linear& l : linears) b.shape(l, t);
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
