// SPDX-License-Identifier: Apache-2.0
// Times what a decode step of Super-49B spends in its blocks, without torch: the linears (FP8) with their
// epilogues, the norms and attention (e4m3 KV), as the model launches them for more than one token, in one
// CUDA graph, median of replays. Kernels on their own are warm where a step's are cold (instructions), and
// overlap with themselves; here they are as in the model. All zero unless asked otherwise: that keeps the GPU
// off its power limit, and the times of two builds are comparable to about 0.02 ms of 16 to 29. Results are
// not checked: that is the tests' business.
//   bench_step [random] [T context]...
#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "device_data.h"
#include "graph_timer.h"
#include "host/norm_config.h"
#include "kernels/attention/attention.h"
#include "kernels/common/check.h"
#include "kernels/linear/linear.h"
#include "kernels/norm/rms_norm.h"

namespace {

using Bf16 = __nv_bfloat16;
using Fp8 = __nv_fp8_e4m3;

constexpr int kHidden = 8192, kHeads = 64, kKvHeads = 8, kHeadDim = 128, kPage = 64, kWidest = 28672;
constexpr int kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;

struct Blocks {
  int count;
  bool attention;
  int width;  // of the FFN
};
constexpr Blocks kBlocks[] = {
    // tests/unit/test_config.py compares them with the model's config.json
    {1, true, 14336},  {5, true, 28672},  {2, false, 14336}, {3, true, 28672}, {1, false, 17920},
    {30, true, 28672}, {1, false, 7168},  {2, false, 14336}, {1, false, 7168}, {1, false, 28672},
    {1, false, 7168},  {1, false, 14336}, {3, false, 7168},  {1, true, 28672}, {1, false, 7168},
    {2, false, 5632},  {1, false, 7168},  {3, false, 5632},  {2, false, 7168}, {2, false, 2816},
    {2, false, 5632},  {2, false, 2816},  {1, false, 5632},  {2, false, 2816}, {9, true, 28672}};
constexpr int num_attention_blocks() {
  int count = 0;
  for (const Blocks& blocks : kBlocks) count += blocks.attention ? blocks.count : 0;
  return count;
}
constexpr int64_t kWeightBytes = int64_t(12) << 30;  // taken in turn, far beyond L2

// About normal numbers.
template <class T>
__global__ void fill(T* to, int64_t size) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < size;
       i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t v = uint64_t(i + 1) * 0x9E3779B97F4A7C15ull;
    v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9ull;
    v ^= v >> 27;
    const int sum = int(v & 0xff) + int(v >> 8 & 0xff) + int(v >> 16 & 0xff) + int(v >> 24 & 0xff);
    to[i] = T(float(sum - 510) / 148.0f);
  }
}

struct Case {
  int T, context;
  int64_t pages() const { return (context + kPage - 1) / kPage; }
  int64_t cache_bytes() const { return T * pages() * kKvHeads * kPage * kHeadDim; }  // keys of a block
};

struct Parts {
  bool norms, attention;
};

struct Step {
  int num_sms;
  char *weights, *cache, *linear_workspace, *workspace;
  Fp8 *x, *h, *attended;
  Bf16 *rows, *qkv, *norm_weight;
  float *scale, *cos_sin;
  int64_t *table, *q_start, *kv_len;
  cudaStream_t stream;

  void set(const Case& c) const {
    std::vector<int64_t> ids(size_t(c.T * c.pages())), starts(size_t(c.T) + 1),
        lengths(size_t(c.T), c.context);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = int64_t(i * 7919 % ids.size());
    for (size_t s = 0; s < starts.size(); ++s) starts[s] = int64_t(s);
    const auto copy = [](int64_t* to, const std::vector<int64_t>& from) {
      NF_CUDA(cudaMemcpy(to, from.data(), from.size() * sizeof(int64_t), cudaMemcpyHostToDevice));
    };
    copy(table, ids), copy(q_start, starts), copy(kv_len, lengths);
  }

  void linear(int64_t& at, int T, int N, int K, const Fp8* from, void* to, nf::OutType type,
              nf::Epilogue epilogue) const {
    const int64_t bytes = int64_t(N) * K;
    if (at + bytes > kWeightBytes) at = 0;
    nf::packed_linear<Fp8>({.out = to,
                            .x = from,
                            .packed = weights + at,
                            .x_scale = scale,
                            .weight_scale = scale,
                            .out_scale = type == nf::OutType::kFp8 ? scale : nullptr,
                            .workspace = linear_workspace,
                            .num_tokens = T,
                            .num_rows = N,
                            .num_cols = K,
                            .out_stride = epilogue == nf::Epilogue::kSwiglu ? N / 2 : N,
                            .x_stride = K,
                            .x_scale_per_token = false,
                            .weight_scale_per_row = false,
                            .out_type = type,
                            .epilogue = epilogue,
                            .schedule = nf::make_linear_schedule(N, K, 1, num_sms),
                            .num_sms = num_sms},
                           stream);
    at += bytes;
  }

  void norm(int T) const {
    nf::rms_norm<Bf16, Fp8>({.out = x,
                             .residual = nullptr,
                             .x = rows,
                             .weight = norm_weight,
                             .scale = scale,
                             .num_tokens = T,
                             .dim = kHidden,
                             .out_stride = kHidden,
                             .residual_stride = kHidden,
                             .x_stride = kHidden,
                             .eps = 1e-5f,
                             .scale_per_token = false},
                            nf::pick_norm_config(kHidden, T), stream);
  }

  void attend(const Case& c, int block) const {
    nf::AttentionParams<Bf16> p{};
    p.out = attended, p.out_scale = scale, p.q = qkv, p.workspace = workspace;
    p.append = {qkv + kHeads * kHeadDim, qkv + (kHeads + kKvHeads) * kHeadDim, cos_sin, kHeadDim};
    p.k_cache = cache + 2 * block * c.cache_bytes(), p.v_cache = cache + (2 * block + 1) * c.cache_bytes();
    p.page_table = table, p.q_start = q_start, p.kv_len = kv_len, p.num_tokens = c.T, p.num_seqs = c.T;
    p.most_queries = INT_MAX, p.num_kv_heads = kKvHeads, p.group = kHeads / kKvHeads, p.head_dim = kHeadDim;
    p.q_stride = kQkv, p.out_stride = kHeads * kHeadDim, p.page_table_stride = c.pages();
    p.k_page_stride = p.v_page_stride = kKvHeads * kPage * kHeadDim;
    p.softmax_scale = 0.088f, p.k_scale = p.v_scale = 1.0f, p.fp8_cache = true;
    nf::attention(p, stream);
  }

  void enqueue(const Case& c, const Parts& parts) const {
    constexpr auto kBfloat16 = nf::OutType::kBfloat16;
    int64_t at = 0;
    int attention_block = 0;
    for (const Blocks& blocks : kBlocks) {
      for (int i = 0; i < blocks.count; ++i) {
        if (blocks.attention) {
          if (parts.norms) norm(c.T);
          linear(at, c.T, kQkv, kHidden, x, qkv, kBfloat16, nf::Epilogue::kStore);
          if (parts.attention) attend(c, attention_block++);
          linear(at, c.T, kHidden, kHeads * kHeadDim, attended, rows, kBfloat16, nf::Epilogue::kAdd);
        }
        if (parts.norms) norm(c.T);
        linear(at, c.T, 2 * blocks.width, kHidden, x, h, nf::OutType::kFp8, nf::Epilogue::kSwiglu);
        linear(at, c.T, kHidden, blocks.width, h, rows, kBfloat16, nf::Epilogue::kAdd);
      }
    }
  }

  void run(const Case& c) const {
    set(c);
    const auto time_ms = [&](const Parts& parts) {
      return replay_us(stream, [&] { enqueue(c, parts); }, 9) / 1e3;
    };
    std::printf(
        "T=%-4d context=%-6d | linears %7.3f ms | and norms %7.3f | and attention %7.3f | all %7.3f\n", c.T,
        c.context, time_ms({false, false}), time_ms({true, false}), time_ms({false, true}),
        time_ms({true, true}));
    std::fflush(stdout);
  }
};

}  // namespace

int main(int argc, char** argv) {
  const bool random = argc > 1 && std::strcmp(argv[1], "random") == 0;
  std::vector<Case> cases;
  if ((argc - 1 - random) % 2 != 0) {
    std::fprintf(stderr, "bench_step [random] [T context]...: want pairs of T and context\n");
    return 2;
  }
  for (int i = 1 + random; i + 1 < argc; i += 2)
    cases.push_back({std::atoi(argv[i]), std::atoi(argv[i + 1])});
  if (cases.empty())
    cases = {{1, 128}, {8, 128}, {32, 128}, {64, 128}, {64, 1024}, {128, 1024}, {192, 640}, {256, 640}};
  try {
    int64_t max_tokens = 0, max_pages = 0, cache_bytes = 0;
    for (const Case& c : cases) {
      NF_CHECK(c.T > 0 && c.context > 0,
               "T=" + std::to_string(c.T) + " context=" + std::to_string(c.context));
      max_tokens = std::max<int64_t>(max_tokens, c.T);
      max_pages = std::max(max_pages, c.T * c.pages());
      cache_bytes = std::max(cache_bytes, 2 * num_attention_blocks() * c.cache_bytes());
    }
    Step step{};
    NF_CUDA(cudaDeviceGetAttribute(&step.num_sms, cudaDevAttrMultiProcessorCount, 0));
    step.weights = allocate<char>(kWeightBytes), step.cache = allocate<char>(cache_bytes);
    step.x = allocate<Fp8>(max_tokens * kHidden), step.h = allocate<Fp8>(max_tokens * kWidest);
    step.attended = allocate<Fp8>(max_tokens * kHidden), step.rows = allocate<Bf16>(max_tokens * kHidden);
    step.qkv = allocate<Bf16>(max_tokens * kQkv), step.norm_weight = allocate<Bf16>(kHidden);
    step.scale = allocate<float>(1), step.cos_sin = allocate<float>(int64_t(1 << 17) * kHeadDim);
    step.table = allocate<int64_t>(max_pages), step.q_start = allocate<int64_t>(max_tokens + 1);
    step.kv_len = allocate<int64_t>(max_tokens);
    const int64_t linear_bytes = nf::linear_workspace_bytes(step.num_sms),
                  bytes = nf::attention_workspace_bytes();
    step.linear_workspace = allocate<char>(linear_bytes), step.workspace = allocate<char>(bytes);
    NF_CUDA(cudaMemset(step.linear_workspace, 0xff, size_t(linear_bytes)));
    NF_CUDA(cudaMemset(step.workspace, 0xff, size_t(bytes)));
    const float scale = 0.02f;
    NF_CUDA(cudaMemcpy(step.scale, &scale, sizeof(scale), cudaMemcpyHostToDevice));
    NF_CUDA(cudaStreamCreateWithFlags(&step.stream, cudaStreamNonBlocking));
    if (random) {
      const auto randomise = [](auto* to, int64_t size) { fill<<<4096, 256>>>(to, size); };
      randomise(reinterpret_cast<Fp8*>(step.weights), kWeightBytes);
      randomise(reinterpret_cast<Fp8*>(step.cache), cache_bytes);
      randomise(step.x, max_tokens * kHidden), randomise(step.attended, max_tokens * kHidden);
      randomise(step.rows, max_tokens * kHidden), randomise(step.norm_weight, kHidden);
    }
    NF_CUDA(cudaDeviceSynchronize());
    for (const Case& c : cases) step.run(c);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
