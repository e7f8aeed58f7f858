// SPDX-License-Identifier: Apache-2.0
// Times decode attention without torch, one new token a sequence, Super-49B's heads: launches chained over
// caches far beyond L2, and what attention adds to a chain of the linears around it (qkv, attention, o; FP8
// weights), which is what a decode step pays. CUDA graphs, median of replays, random bits.
//   bench_attention [S length K fp8]...
#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "device_data.h"
#include "graph_timer.h"
#include "kernels/attention/attention.h"
#include "kernels/common/check.h"
#include "kernels/linear/linear.h"
#include "kernels/rope/rope_append.h"

namespace {

using Bf16 = __nv_bfloat16;
using Fp8 = __nv_fp8_e4m3;
constexpr int kHeads = 64, kHeadDim = 128, kHidden = 8192, kPage = 64, kBlocks = 16;

struct Case {
  int S, length, K;
  bool fp8;
  int pages() const { return (length + kPage - 1) / kPage; }
  int64_t cache_elements() const { return int64_t(S) * pages() * K * kPage * kHeadDim; }
  int64_t cache_bytes() const { return cache_elements() * (fp8 ? 1 : 2); }
  double bytes() const { return 2.0 * S * length * K * kHeadDim * (fp8 ? 1 : 2); }
};

// Random bits, without the NaNs and infinities of either type.
__global__ void fill(uint32_t* words, size_t size) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < size;
       i += size_t(gridDim.x) * blockDim.x) {
    uint64_t v = (i + 1) * 0x9E3779B97F4A7C15ull;
    v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9ull;
    words[i] = uint32_t(v ^ v >> 31) & 0xbfbfbfbfu;
  }
}

struct Bench {
  int num_sms;
  char *caches, *weights, *linear_workspace, *workspace;
  int64_t cache_bytes, weight_bytes;
  Bf16 *qkv, *out, *hidden;
  Fp8* x;
  float* cos_sin;
  int64_t *table, *q_start, *kv_len, *positions, *slots;
  cudaStream_t stream;

  void set(const Case& c) const {
    std::vector<int64_t> ids(size_t(c.S) * c.pages()), starts(c.S + 1), lengths(c.S, c.length),
        at(c.S, c.length - 1), where(c.S);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = int64_t(i * 7919 % ids.size());
    if (ids.size() % 7919 == 0)
      for (size_t i = 0; i < ids.size(); ++i) ids[i] = int64_t(i);
    for (int s = 0; s < c.S; ++s)
      where[s] = ids[size_t(s) * c.pages() + (c.length - 1) / kPage] * kPage + (c.length - 1) % kPage;
    for (int s = 0; s <= c.S; ++s) starts[s] = s;
    const auto copy = [](int64_t* to, const std::vector<int64_t>& from) {
      NF_CUDA(cudaMemcpy(to, from.data(), from.size() * 8, cudaMemcpyHostToDevice));
    };
    copy(table, ids), copy(q_start, starts), copy(kv_len, lengths), copy(positions, at), copy(slots, where);
  }

  enum Kind { kAttention, kRopeThenAttention, kDecode };

  void attend(const Case& c, int set, Kind kind) const {
    char* k =
        caches + (2 * int64_t(set) * c.cache_bytes()) % (cache_bytes - 2 * c.cache_bytes() + 1) / 4096 * 4096;
    char* v = k + c.cache_bytes();
    const int64_t stride = int64_t(kHeads + 2 * c.K) * kHeadDim, page = int64_t(c.K) * kPage * kHeadDim;
    if (kind == kRopeThenAttention)
      nf::rope_append<Bf16>({.qkv = qkv,
                             .k_cache = k,
                             .v_cache = v,
                             .cos_sin = cos_sin,
                             .positions = positions,
                             .slots = slots,
                             .num_tokens = c.S,
                             .num_rotated = c.S,
                             .num_heads = kHeads,
                             .num_kv_heads = c.K,
                             .head_dim = kHeadDim,
                             .num_pages = int64_t(c.S) * c.pages(),
                             .page_size = kPage,
                             .qkv_stride = stride,
                             .k_page_stride = page,
                             .v_page_stride = page,
                             .cos_sin_stride = kHeadDim,
                             .k_scale = 1.0f,
                             .v_scale = 1.0f,
                             .fp8_cache = c.fp8},
                            stream);
    nf::AttentionParams<Bf16> p{};
    p.out = out, p.q = qkv, p.k_cache = k, p.v_cache = v, p.workspace = workspace;
    if (kind == kDecode)
      p.append = {qkv + kHeads * kHeadDim, qkv + (kHeads + c.K) * kHeadDim, cos_sin, kHeadDim};
    p.page_table = table, p.q_start = q_start, p.kv_len = kv_len, p.num_tokens = c.S, p.num_seqs = c.S,
    p.most_queries = INT_MAX;
    p.num_kv_heads = c.K, p.group = kHeads / c.K, p.head_dim = kHeadDim, p.q_stride = stride;
    p.out_stride = kHeads * kHeadDim, p.k_page_stride = p.v_page_stride = page,
    p.page_table_stride = c.pages();
    p.softmax_scale = 0.088f, p.k_scale = p.v_scale = 1.0f, p.fp8_cache = c.fp8;
    nf::attention(p, stream);
  }

  void linear(int set, int num_rows, int num_tokens, Bf16* to) const {
    const int64_t bytes = int64_t(num_rows) * kHidden;
    nf::packed_linear<Fp8>({.out = to,
                            .x = x,
                            .packed = weights + (set * bytes) % (weight_bytes - bytes + 1) / 32768 * 32768,
                            .x_scale = nullptr,
                            .weight_scale = nullptr,
                            .out_scale = nullptr,
                            .workspace = linear_workspace,
                            .num_tokens = num_tokens,
                            .num_rows = num_rows,
                            .num_cols = kHidden,
                            .out_stride = num_rows,
                            .x_stride = kHidden,
                            .x_scale_per_token = false,
                            .weight_scale_per_row = false,
                            .out_type = nf::OutType::kBfloat16,
                            .epilogue = nf::Epilogue::kStore,
                            .schedule = nf::make_linear_schedule(num_rows, kHidden, 1, num_sms),
                            .num_sms = num_sms},
                           stream);
  }

  template <class F>
  double time_us(F&& enqueue_all) const {
    return replay_us(stream, enqueue_all, 9);
  }

  void run(const Case& c) const {
    set(c);
    const int launches = int(std::clamp<int64_t>(int64_t(4e9 / c.bytes()), 4, 200));
    double us[3], added[3], linears = 0;
    for (Kind kind : {kAttention, kRopeThenAttention, kDecode}) {
      us[kind] = time_us([&] {
                   for (int i = 0; i < launches; ++i) attend(c, i, kind);
                 }) /
                 launches;
    }
    if (c.S <= 256) {
      const auto blocks = [&](int kind) {
        return time_us([&] {
                 for (int i = 0; i < kBlocks; ++i) {
                   linear(2 * i, (kHeads + 2 * c.K) * kHeadDim, c.S, qkv);
                   if (kind >= 0) attend(c, i, Kind(kind));
                   linear(2 * i + 1, kHidden, c.S, hidden);
                 }
               }) /
               kBlocks;
      };
      linears = blocks(-1);
      for (int kind = 0; kind < 3; ++kind) added[kind] = blocks(kind) - linears;
    }
    std::printf(
        "S=%-3d length=%-6d K=%d %s | attention %7.2f us %5.0f GB/s | rope+attention %7.2f | decode %7.2f |"
        " between linears (%.1f us): +%.2f, +%.2f, +%.2f\n",
        c.S, c.length, c.K, c.fp8 ? "fp8 " : "bf16", us[0], c.bytes() / us[0] / 1e3, us[1], us[2], linears,
        added[0], added[1], added[2]);
    std::fflush(stdout);
  }
};

}  // namespace

int main(int argc, char** argv) {
  std::vector<Case> cases;
  for (int i = 1; i + 3 < argc; i += 4)
    cases.push_back(
        {std::atoi(argv[i]), std::atoi(argv[i + 1]), std::atoi(argv[i + 2]), std::atoi(argv[i + 3]) != 0});
  if (cases.empty()) {
    for (bool fp8 : {false, true}) {
      for (int length : {128, 1024, 2048, 8192, 131072}) cases.push_back({1, length, 8, fp8});
      for (int S : {8, 16, 64})
        for (int length : {1024, 2048, 8192}) cases.push_back({S, length, 8, fp8});
    }
    cases.push_back({1, 8192, 4, false});
  }
  try {
    Bench b{};
    NF_CUDA(cudaDeviceGetAttribute(&b.num_sms, cudaDevAttrMultiProcessorCount, 0));
    b.cache_bytes = int64_t(12) << 30, b.weight_bytes = int64_t(2) << 30;
    b.caches = allocate<char>(b.cache_bytes), b.weights = allocate<char>(b.weight_bytes);
    b.qkv = allocate<Bf16>(256 * 16384), b.out = allocate<Bf16>(256 * kHidden),
    b.hidden = allocate<Bf16>(256 * kHidden);
    b.x = allocate<Fp8>(256 * kHidden), b.cos_sin = allocate<float>(int64_t(1 << 17) * kHeadDim);
    b.table = allocate<int64_t>(1 << 20), b.q_start = allocate<int64_t>(1024),
    b.kv_len = allocate<int64_t>(1024);
    b.positions = allocate<int64_t>(1024), b.slots = allocate<int64_t>(1024);
    const int64_t linear_bytes = nf::linear_workspace_bytes(b.num_sms),
                  bytes = nf::attention_workspace_bytes();
    b.linear_workspace = allocate<char>(linear_bytes), b.workspace = allocate<char>(bytes);
    NF_CUDA(cudaMemset(b.linear_workspace, 0xff, linear_bytes));
    NF_CUDA(cudaMemset(b.workspace, 0xff, bytes));
    NF_CUDA(cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking));
    const auto randomise = [&](void* p, int64_t size) {
      fill<<<4096, 256, 0, b.stream>>>(static_cast<uint32_t*>(p), size / 4);
    };
    randomise(b.caches, b.cache_bytes), randomise(b.weights, b.weight_bytes),
        randomise(b.qkv, 256 * 16384 * 2);
    randomise(b.x, 256 * kHidden);
    NF_CUDA(cudaMemset(b.cos_sin, 0, int64_t(1 << 17) * kHeadDim * 4));
    NF_CUDA(cudaDeviceSynchronize());
    for (const Case& c : cases) b.run(c);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
