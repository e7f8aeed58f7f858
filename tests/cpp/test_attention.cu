// SPDX-License-Identifier: Apache-2.0
// attention and its append without torch or Python: the program that compute-sanitizer runs (with the
// argument "tiny"). Results against sums in double; decode_attention against rope_append and attention, bit
// for bit, caches included; a sequence alone against the same in its batch.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "gpu_testing.h"
#include "kernels/attention/attention.h"
#include "kernels/rope/rope_append.h"

namespace {

using testing::DeviceArray;
using Bf16 = __nv_bfloat16;
constexpr int kPage = 64;

struct Sequence {
  int new_tokens, length;
};
struct Case {
  int num_kv_heads, group, head_dim;
  bool fp8;
  std::vector<Sequence> sequences;
};

__host__ __device__ float hash_uniform(uint64_t i, uint32_t seed) {  // in [-1, 1)
  uint64_t v = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
  v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9ull;
  v = (v ^ v >> 27) * 0x94D049BB133111EBull;
  return float((v ^ v >> 31) >> 40) * 0x1p-23f - 1.0f;
}

template <class T>
__global__ void fill(T* values, int64_t size, uint32_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < size;
       i += int64_t(gridDim.x) * blockDim.x)
    values[i] = T(hash_uniform(i, seed) * scale);
}

// One warp per (token, head): softmax and sum in double, from the rotated q and the caches.
template <class Stored>
__global__ void reference(double* out, const Bf16* q, int64_t q_stride, const Stored* k_cache,
                          const Stored* v_cache, const int64_t* table, int64_t table_stride,
                          const int* seq_of, const int* seen, int H, int K, int D, double score_scale,
                          double v_scale) {
  extern __shared__ double s_sum[];
  const int token = blockIdx.x, head = blockIdx.y, kv_head = head / (H / K), lane = threadIdx.x;
  const Bf16* query = q + token * q_stride + head * D;
  const int64_t* pages = table + seq_of[token] * table_stride;
  const auto row = [&](const Stored* cache, int t) {
    return cache + ((pages[t / kPage] * K + kv_head) * kPage + t % kPage) * D;
  };
  double largest = -INFINITY;
  const auto score = [&](int t) {
    double sum = 0;
    for (int d = 0; d < D; ++d) sum += double(float(query[d])) * double(float(row(k_cache, t)[d]));
    return sum * score_scale;
  };
  for (int t = lane; t < seen[token]; t += 32) largest = fmax(largest, score(t));
  for (int mask = 16; mask > 0; mask /= 2) largest = fmax(largest, __shfl_xor_sync(~0u, largest, mask));
  double total = 0;
  for (int d = lane; d < D; d += 32) s_sum[d] = 0;
  __syncwarp();
  for (int t = lane; t < seen[token]; t += 32) {
    const double w = exp(score(t) - largest);
    total += w;
    for (int d = 0; d < D; ++d) atomicAdd(&s_sum[d], w * double(float(row(v_cache, t)[d])) * v_scale);
  }
  for (int mask = 16; mask > 0; mask /= 2) total += __shfl_xor_sync(~0u, total, mask);
  __syncwarp();
  for (int d = lane; d < D; d += 32) out[(int64_t(token) * H + head) * D + d] = s_sum[d] / total;
}

struct Problem {
  Case c;
  int S, T, H, K, D, num_pages = 0, table_width = 0, longest = 0;
  std::vector<int64_t> q_start{0}, kv_len, table, slots, positions;
  std::vector<int> seq_of, seen;
  float k_scale = 0.02f, v_scale = 0.01f;
  std::unique_ptr<DeviceArray<int64_t>> d_q_start, d_kv_len, d_table, d_slots, d_positions;
  std::unique_ptr<DeviceArray<Bf16>> qkv;
  std::unique_ptr<DeviceArray<float>> cos_sin;
  std::unique_ptr<DeviceArray<uint8_t>> k_cache, v_cache;
  cudaStream_t stream;

  explicit Problem(const Case& c) : c(c), S(int(c.sequences.size())), K(c.num_kv_heads), D(c.head_dim) {
    H = K * c.group;
    for (const Sequence& s : c.sequences) {
      table_width = std::max(table_width, (s.length + kPage - 1) / kPage);
      longest = std::max(longest, s.length);
    }
    table.assign(size_t(S) * table_width, 0);
    for (int s = 0; s < S; ++s) {
      const auto [n, length] = c.sequences[s];
      // Pages in an order that is none.
      for (int i = 0; i < (length + kPage - 1) / kPage; ++i) table[size_t(s) * table_width + i] = num_pages++;
      std::reverse(table.begin() + size_t(s) * table_width,
                   table.begin() + size_t(s) * table_width + (length + kPage - 1) / kPage);
      for (int i = 0; i < n; ++i) {
        const int position = length - n + i;
        positions.push_back(position);
        slots.push_back(table[size_t(s) * table_width + position / kPage] * kPage + position % kPage);
        seq_of.push_back(s);
        seen.push_back(position + 1);
      }
      q_start.push_back(q_start.back() + n);
      kv_len.push_back(length);
    }
    T = int(q_start.back());
    NF_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    const auto upload = [](const std::vector<int64_t>& v) {
      return std::make_unique<DeviceArray<int64_t>>(v);
    };
    d_q_start = upload(q_start), d_kv_len = upload(kv_len), d_table = upload(table), d_slots = upload(slots),
    d_positions = upload(positions);
    qkv = std::make_unique<DeviceArray<Bf16>>(size_t(T) * (H + 2 * K) * D);
    fill<<<64, 256>>>(qkv->get(), int64_t(T) * (H + 2 * K) * D, 1, 3.0f);
    std::vector<float> angles(size_t(longest) * D);
    for (int p = 0; p < longest; ++p) {
      for (int i = 0; i < D / 2; ++i) {
        const double angle = p * std::pow(10000.0, -2.0 * i / D);
        angles[size_t(p) * D + i] = float(std::cos(angle));
        angles[size_t(p) * D + D / 2 + i] = float(std::sin(angle));
      }
    }
    cos_sin = std::make_unique<DeviceArray<float>>(angles);
    // What is not cached yet is NaN.
    const size_t elements = size_t(num_pages) * K * kPage * D;
    k_cache = make_cache(elements, 2), v_cache = make_cache(elements, 3);
    NF_CUDA(cudaDeviceSynchronize());
  }
  ~Problem() { cudaStreamDestroy(stream); }

  size_t element_bytes() const { return c.fp8 ? 1 : 2; }

  std::unique_ptr<DeviceArray<uint8_t>> make_cache(size_t elements, uint32_t seed) const {
    auto cache = std::make_unique<DeviceArray<uint8_t>>(elements * element_bytes());
    cache->fill(0xff);
    std::vector<uint8_t> host = cache->read();
    for (int s = 0; s < S; ++s) {
      const auto [n, length] = c.sequences[s];
      for (int t = 0; t < length - n; ++t) {
        for (int h = 0; h < K; ++h) {
          const size_t row = ((table[size_t(s) * table_width + t / kPage] * K + h) * kPage + t % kPage) * D;
          for (int d = 0; d < D; ++d) {
            const float v = hash_uniform(row + d, seed) * (c.fp8 ? 100.0f : 3.0f);
            if (c.fp8) {
              const __nv_fp8_e4m3 stored(v);
              std::memcpy(&host[row + d], &stored, 1);
            } else {
              const Bf16 stored = __float2bfloat16(v);
              std::memcpy(&host[(row + d) * 2], &stored, 2);
            }
          }
        }
      }
    }
    NF_CUDA(cudaMemcpy(cache->get(), host.data(), host.size(), cudaMemcpyHostToDevice));
    return cache;
  }

  // Sequences [first, first + count) as if they were the batch.
  nf::AttentionParams<Bf16> params(void* out, const Bf16* rows, void* k, void* v, void* workspace,
                                   bool append, int first = 0, int count = -1) const {
    if (count < 0) count = S;
    const int64_t stride = int64_t(H + 2 * K) * D;
    nf::AttentionParams<Bf16> p{};
    p.out = out, p.q = rows, p.k_cache = k, p.v_cache = v, p.workspace = workspace;
    if (append) p.append = {rows + H * D, rows + (H + K) * D, cos_sin->get(), D};
    p.page_table = d_table->get() + int64_t(first) * table_width;
    p.q_start = d_q_start->get() + first, p.kv_len = d_kv_len->get() + first;
    p.num_tokens = q_start[first + count] - q_start[first], p.num_seqs = count, p.most_queries = INT_MAX;
    p.num_kv_heads = K, p.group = c.group, p.head_dim = D;
    p.q_stride = stride, p.out_stride = int64_t(H) * D;
    p.k_page_stride = p.v_page_stride = int64_t(K) * kPage * D, p.page_table_stride = table_width;
    p.softmax_scale = float(1 / std::sqrt(double(D)));
    p.k_scale = c.fp8 ? k_scale : 1.0f, p.v_scale = c.fp8 ? v_scale : 1.0f, p.fp8_cache = c.fp8;
    return p;
  }

  void rope(Bf16* rows, void* k, void* v) const {
    nf::rope_append<Bf16>({.qkv = rows,
                           .k_cache = k,
                           .v_cache = v,
                           .cos_sin = cos_sin->get(),
                           .positions = d_positions->get(),
                           .slots = d_slots->get(),
                           .num_tokens = T,
                           .num_rotated = T,
                           .num_heads = H,
                           .num_kv_heads = K,
                           .head_dim = D,
                           .num_pages = num_pages,
                           .page_size = kPage,
                           .qkv_stride = int64_t(H + 2 * K) * D,
                           .k_page_stride = int64_t(K) * kPage * D,
                           .v_page_stride = int64_t(K) * kPage * D,
                           .cos_sin_stride = D,
                           .k_scale = c.fp8 ? k_scale : 1.0f,
                           .v_scale = c.fp8 ? v_scale : 1.0f,
                           .fp8_cache = c.fp8},
                          stream);
  }
};

void expect_same(const std::vector<uint8_t>& found, const std::vector<uint8_t>& want, const char* what) {
  EXPECT_EQ(found.size(), want.size());
  for (size_t i = 0; i < found.size(); ++i) {
    if (found[i] == want[i]) continue;
    throw std::runtime_error(std::string(what) + ": byte " + std::to_string(i) + " is " +
                             std::to_string(found[i]) + ", want " + std::to_string(want[i]));
  }
}

void run(const Case& c) {
  std::printf("K=%d G=%d D=%d %s S=%zu, first %d of %d: ", c.num_kv_heads, c.group, c.head_dim,
              c.fp8 ? "fp8" : "bf16", c.sequences.size(), c.sequences[0].new_tokens, c.sequences[0].length);
  std::fflush(stdout);
  const Problem problem(c);
  const size_t out_bytes = size_t(problem.T) * problem.H * problem.D * 2,
               rows = size_t(problem.T) * (problem.H + 2 * problem.K) * problem.D;
  DeviceArray<uint8_t> workspace(nf::attention_workspace_bytes()), out(out_bytes), fused_out(out_bytes);
  workspace.fill(0xff), out.fill(0xff), fused_out.fill(0xff);
  const size_t cache_bytes = problem.k_cache->read().size();
  DeviceArray<uint8_t> k(cache_bytes), v(cache_bytes), fused_k(cache_bytes), fused_v(cache_bytes);
  DeviceArray<Bf16> rotated(rows);
  rotated.copy_from(*problem.qkv);
  for (auto* to : {&k, &fused_k}) to->copy_from(*problem.k_cache);
  for (auto* to : {&v, &fused_v}) to->copy_from(*problem.v_cache);
  NF_CUDA(cudaDeviceSynchronize());

  problem.rope(rotated.get(), k.get(), v.get());
  nf::attention(problem.params(out.get(), rotated.get(), k.get(), v.get(), workspace.get(), false),
                problem.stream);
  nf::attention(problem.params(fused_out.get(), problem.qkv->get(), fused_k.get(), fused_v.get(),
                               workspace.get(), true),
                problem.stream);
  NF_CUDA(cudaStreamSynchronize(problem.stream));
  const std::vector<uint8_t> result = out.read();

  DeviceArray<double> want(out_bytes / 2);
  DeviceArray<int> seq_of(problem.seq_of), seen(problem.seen);
  const dim3 grid(problem.T, problem.H);
  const double scale = double(float(1 / std::sqrt(double(problem.D))));
  if (c.fp8)
    reference<<<grid, 32, problem.D * 8>>>(
        want.get(), rotated.get(), int64_t(problem.H + 2 * problem.K) * problem.D,
        reinterpret_cast<__nv_fp8_e4m3*>(k.get()), reinterpret_cast<__nv_fp8_e4m3*>(v.get()),
        problem.d_table->get(), problem.table_width, seq_of.get(), seen.get(), problem.H, problem.K,
        problem.D, scale * problem.k_scale, double(problem.v_scale));
  else
    reference<<<grid, 32, problem.D * 8>>>(
        want.get(), rotated.get(), int64_t(problem.H + 2 * problem.K) * problem.D,
        reinterpret_cast<Bf16*>(k.get()), reinterpret_cast<Bf16*>(v.get()), problem.d_table->get(),
        problem.table_width, seq_of.get(), seen.get(), problem.H, problem.K, problem.D, scale, 1.0);
  NF_CUDA(cudaDeviceSynchronize());
  const std::vector<double> expected = want.read();
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    uint32_t bits = uint32_t(result[2 * i]) << 16 | uint32_t(result[2 * i + 1]) << 24;
    float found;
    std::memcpy(&found, &bits, 4);
    const double error = std::abs(found - expected[i]);
    worst = std::max(worst, error);
    // One rounding of the weights (which average out) and one of the result.
    if (!(error <= 0x1p-8 * std::abs(expected[i]) + 0x1p-8))
      throw std::runtime_error("element " + std::to_string(i) + " is " + std::to_string(found) + ", want " +
                               std::to_string(expected[i]));
  }
  expect_same(fused_out.read(), result, "the result with append");
  expect_same(fused_k.read(), k.read(), "the keys' cache");
  expect_same(fused_v.read(), v.read(), "the values' cache");

  for (int s = 0; s < problem.S; s += std::max(1, problem.S / 3)) {  // alone: the same bits
    out.fill(0xff);
    const size_t begin = size_t(problem.q_start[s]) * problem.H * problem.D * 2,
                 end = size_t(problem.q_start[s + 1]) * problem.H * problem.D * 2;
    auto p = problem.params(out.get(),
                            rotated.get() + problem.q_start[s] * (problem.H + 2 * problem.K) * problem.D,
                            k.get(), v.get(), workspace.get(), false, s, 1);
    // q_start of the slice does not begin with 0.
    DeviceArray<int64_t> starts(std::vector<int64_t>{0, problem.q_start[s + 1] - problem.q_start[s]});
    p.q_start = starts.get();
    nf::attention(p, problem.stream);
    NF_CUDA(cudaStreamSynchronize(problem.stream));
    std::vector<uint8_t> alone = out.read();
    alone.resize(end - begin);
    expect_same(alone, {result.begin() + begin, result.begin() + end}, "a sequence alone");
  }
  for (uint8_t byte : workspace.read()) EXPECT_EQ(int(byte), 0xff);
  std::printf("worst error %.2g\n", worst);
}

}  // namespace

int main(int argc, char** argv) {
  static bool tiny = argc > 1 && std::string(argv[1]) == "tiny";
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess || major < 8)
    return testing::kSkipped;
  return testing::run([] {
    const std::vector<Sequence> few{{1, 1}, {1, 64}, {1, 65}, {1, 300}, {1, 700}};
    for (bool fp8 : {false, true}) {
      if (tiny) {
        run({2, 8, 128, fp8, few});
        run({1, 16, 128, fp8, {{1, 130}, {1, 450}}});
        run({1, 4, 64, fp8, {{2, 66}, {5, 330}}});
        run({8, 1, 64, fp8, std::vector<Sequence>(fp8 ? 13 : 33, {1, 300})});  // many pairs
        continue;
      }
      const std::vector<Sequence> mixed{{1, 1},   {1, 33},   {1, 64},   {1, 129}, {1, 256},
                                        {1, 257}, {1, 1000}, {1, 2048}, {1, 5000}};
      for (int dim : {64, 128}) {
        for (int group : {1, 3, 5, 8, 12, 16}) run({2, group, dim, fp8, mixed});
        run({8, 8, dim, fp8, {{1, 4097}}});
        run({2, 8, dim, fp8, {{8, 64}, {2, 65}, {1, 300}, {3, 3}, {5, 1030}, {7, 130}}});
        run({1, 16, dim, fp8, {{4, 66}, {1, 20}}});
      }
      run({8, 8, 128, fp8, {{1, 8192}, {1, 17}, {1, 1024}}});
      run({2, 8, 128, fp8, {{1, 40000}, {1, 17}, {1, 1024}}});
      run({8, 8, 128, fp8, std::vector<Sequence>(70, {1, 200})});
      std::vector<Sequence> cut;  // most parts end within a pair of a few leaves
      for (int s = 0; s < 90; ++s) cut.push_back({1, 300 + s * 371 % 1100});
      for (int dim : {64, 128}) run({8, 8, dim, fp8, cut});
      std::vector<Sequence> uneven(15, {1, 500});  // many CTAs share a pair of a batch of many pairs
      uneven.push_back({1, 40000});
      run({8, 8, 128, fp8, uneven});
      std::vector<Sequence> many;  // more than the kernel's threads, twice
      for (int s = 0; s < 300; ++s) many.push_back({1 + s % 7 / 6, 1 + s * 37 % 200 + s % 7 / 6});
      run({1, 8, 64, fp8, many});
      for (int dim : {64, 128}) run({1, 8, dim, fp8, std::vector<Sequence>(140, {1, 100})});
    }
  });
}
