// SPDX-License-Identifier: Apache-2.0
// prefill_attention without torch or Python, against sums in double: the program that compute-sanitizer runs
// (with the argument "tiny").
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gpu_testing.h"
#include "kernels/attention/prefill.h"
#include "prefill_reference.h"

namespace {

using testing::check;
using testing::DeviceArray;

struct Lengths {
  int num_new, all;
};
struct Case {
  int num_kv_heads, group, head_dim;
  std::vector<Lengths> seqs;
};

std::string name(const Case& c) {
  std::string s = "K=" + std::to_string(c.num_kv_heads) + " G=" + std::to_string(c.group) +
                  " D=" + std::to_string(c.head_dim);
  for (const Lengths& n : c.seqs)
    s.append(" ").append(std::to_string(n.num_new) + "/" + std::to_string(n.all));
  return s;
}

// Everything that is no valid token stays NaN.
template <class T>
__global__ void fill_cache(T* cache, const int64_t* page_table, const int64_t* kv_len, int max_pages,
                           int64_t page_stride, int num_kv_heads, int head_dim, uint32_t seed) {
  const int seq = blockIdx.y, width = num_kv_heads * head_dim;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < kv_len[seq] * width;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int token = int(i / width), head = int(i % width) / head_dim, d = int(i % head_dim);
    cache[page_table[seq * max_pages + token / kPage] * page_stride +
          (head * kPage + token % kPage) * head_dim + d] =
        T(testing::hash_normal(i + (int64_t(seq) << 40), seed));
  }
}

template <class T, class Cached, bool kProducts>
class Problem {
 public:
  explicit Problem(const Case& c)
      : c_(c),
        max_pages_(max_pages()),
        num_pages_(int(c.seqs.size()) * max_pages_ + 3),
        page_stride_(int64_t(c.num_kv_heads) * kPage * c.head_dim * 2),  // K and V of a page side by side
        q_stride_((c.group + 2) * c.num_kv_heads * c.head_dim),
        out_stride_(c.group * c.num_kv_heads * c.head_dim + 16),
        num_tokens_(total_new()),
        q_(num_tokens_ * q_stride_),
        out_(num_tokens_ * out_stride_),
        cache_(num_pages_ * page_stride_),
        page_table_(shuffled_pages()),
        q_start_(starts()),
        kv_len_(lengths()) {
    testing::fill_normal<<<256, 256>>>(q_.get(), num_tokens_ * q_stride_, 1, 2.0f, 0.0f);
    cache_.fill(0xff);
    const dim3 grid(64, unsigned(c.seqs.size()));
    for (int i = 0; i < 2; ++i)
      fill_cache<<<grid, 256>>>(cache_.get() + i * page_stride_ / 2, page_table_.get(), kv_len_.get(),
                                max_pages_, page_stride_, c.num_kv_heads, c.head_dim, 2 + i);
    NF_CUDA(cudaDeviceSynchronize());
  }

  static constexpr bool kFp8 = sizeof(Cached) == 1;

  nf::PrefillAttentionParams<T> params() const {
    return {.out = out_.get(),
            .q = q_.get(),
            .k_cache = cache_.get(),
            .v_cache = cache_.get() + page_stride_ / 2,
            .page_table = page_table_.get(),
            .q_start = q_start_.get(),
            .kv_len = kv_len_.get(),
            .num_tokens = num_tokens_,
            .num_pages = num_pages_,
            .num_seqs = int(c_.seqs.size()),
            .num_kv_heads = c_.num_kv_heads,
            .group = c_.group,
            .head_dim = c_.head_dim,
            .q_stride = q_stride_,
            .out_stride = out_stride_,
            .k_page_stride = page_stride_,
            .v_page_stride = page_stride_,
            .page_table_stride = max_pages_,
            .softmax_scale = 1 / std::sqrt(float(c_.head_dim)),
            .k_scale = kFp8 ? 0.5f : 1.0f,
            .v_scale = kFp8 ? 0.25f : 1.0f,
            .fp8_cache = kFp8,
            .fp8_products = kProducts};
  }

  // On poisoned output.
  std::vector<T> run(const nf::PrefillAttentionParams<T>& p) const {
    out_.fill(0xff);
    nf::prefill_attention<T>(p, nullptr);
    NF_CUDA(cudaDeviceSynchronize());
    return out_.read();
  }

  void check_all() {
    const std::vector<T> out = run(params());
    check(same(out, run(params()), 0, num_tokens_), "two runs differ, " + name(c_));
    check_values(out);
    check_parts(out);
    check_quantised(out);
    check_rotated();
    check_equal_values();
    const char* kind = kProducts ? "e4m3 products" : (kFp8 ? "e4m3" : "");
    std::printf("%-40.40s %-13s worst error %.2f of what roundings allow\n", name(c_).c_str(), kind, worst_);
  }

 private:
  int max_pages() const {
    int most = 1;
    for (const Lengths& n : c_.seqs) most = std::max(most, (n.all + kPage - 1) / kPage);
    return most + 1;  // more columns than any sequence uses
  }
  int64_t total_new() const {
    int64_t sum = 0;
    for (const Lengths& n : c_.seqs) sum += n.num_new;
    return sum;
  }
  std::vector<int64_t> shuffled_pages() const {
    std::vector<int64_t> order(num_pages_);
    for (int i = 0; i < num_pages_; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), std::mt19937(0));
    order.resize(c_.seqs.size() * max_pages_);
    for (size_t s = 0; s < c_.seqs.size(); ++s)  // what is not used is no page
      for (int i = (c_.seqs[s].all + kPage - 1) / kPage; i < max_pages_; ++i)
        order[s * max_pages_ + i] = -77777;
    return order;
  }
  std::vector<int64_t> starts() const {
    std::vector<int64_t> at{0};
    for (const Lengths& n : c_.seqs) at.push_back(at.back() + n.num_new);
    return at;
  }
  std::vector<int64_t> lengths() const {
    std::vector<int64_t> all;
    for (const Lengths& n : c_.seqs) all.push_back(n.all);
    return all;
  }

  int width() const { return c_.group * c_.num_kv_heads * c_.head_dim; }

  bool same(const std::vector<T>& a, const std::vector<T>& b, int64_t from, int64_t to) const {
    for (int64_t t = from; t < to; ++t)
      if (std::memcmp(&a[t * out_stride_], &b[t * out_stride_], width() * sizeof(T)) != 0) return false;
    return true;
  }

  // A weight and the result are rounded once each. (The FP32 sums add next to nothing; those of e4m3 products
  // are allowed 2^-7 of a weight.) With e4m3, weights are halves.
  void check_values(const std::vector<T>& out) {
    const DeviceArray<double> want_device(num_tokens_ * width()), magnitude_device(num_tokens_ * width()),
        squares_device(num_tokens_ * width());
    const int smem = max_pages_ * kPage * int(sizeof(double));
    NF_CUDA(cudaFuncSetAttribute(reference<Cached, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    reference<Cached><<<unsigned(num_tokens_ * c_.group * c_.num_kv_heads), 128, smem>>>(
        want_device.get(), magnitude_device.get(), squares_device.get(), params());
    NF_CUDA(cudaDeviceSynchronize());
    const std::vector<double> want = want_device.read(), magnitude = magnitude_device.read(),
                              squares = squares_device.read();
    constexpr double kRounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
    constexpr double kWeight = kProducts ? 0x1.2p-4 : (kFp8 ? 0x1p-11 : kRounding);
    double found_squares = 0, allowed_squares = 0;
    int64_t token = 0;
    for (const Lengths& n : c_.seqs) {
      for (const int64_t end = token + n.num_new; token < end; ++token)
        for (int64_t i = 0; i < out_stride_; ++i) {
          const double found = float(out[token * out_stride_ + i]);
          const bool ours = n.num_new > nf::kMostDecodeQueries && i < width();
          const double target = ours ? want[token * width() + i] : NAN;
          const double allowed =
              ours ? (kRounding * std::abs(target) + kWeight * magnitude[token * width() + i]) * 1.01 + 1e-6
                   : 0;
          if (ours) {
            found_squares += (found - target) * (found - target);
            allowed_squares +=
                std::pow(kRounding * target, 2) + std::pow(kWeight * squares[token * width() + i], 2);
          }
          if (ours ? std::abs(found - target) <= allowed : std::isnan(found)) {
            if (ours) worst_ = std::max(worst_, std::abs(found - target) / allowed);
            continue;
          }
          check(false, "found " + std::to_string(found) + ", want " + std::to_string(target) +
                           " (NaN: untouched), token " + std::to_string(token) + " column " +
                           std::to_string(i) + ", " + name(c_));
        }
    }
    // Rounding errors are spread evenly up to the largest, 1/sqrt(3) of it on average; signs are random.
    check(found_squares <= allowed_squares / 3,
          "on average " + std::to_string(std::sqrt(found_squares / allowed_squares)) +
              " of the largest rounding errors, " + name(c_));
  }

  // Many values of one sign, the worst case for sums of e4m3 products, which are cut off, not rounded: the
  // mean of the results is 1.
  void check_equal_values() {
    if (!kProducts || c_.seqs.size() > 1 || c_.seqs[0].all < 2000) return;
    std::vector<Cached> ones = cache_.read();
    for (int64_t page = 0; page < num_pages_; ++page)
      std::fill_n(&ones[page * page_stride_ + page_stride_ / 2], page_stride_ / 2, Cached(1.0f));
    cache_.copy_from(DeviceArray<Cached>(ones));
    auto p = params();
    p.v_scale = 1;
    const std::vector<T> out = run(p);
    double sum = 0;
    for (int64_t t = 0; t < num_tokens_; ++t)
      for (int64_t i = 0; i < width(); ++i) sum += float(out[t * out_stride_ + i]);
    const double mean = sum / double(num_tokens_ * width());
    check(std::abs(mean - 1) <= 0x1p-8, "the mean of ones is " + std::to_string(mean) + ", " + name(c_));
    std::printf("the mean of ones is 1 %+.5f\n", mean - 1);
  }

  // Each sequence alone, and the second half of its queries alone: the same bits.
  void check_parts(const std::vector<T>& out) {
    int64_t token = 0;
    for (size_t s = 0; s < c_.seqs.size(); ++s) {
      const Lengths n = c_.seqs[s];
      for (const int skipped : {0, n.num_new / 2, n.num_new - 9}) {
        if (skipped < 0 || n.num_new - skipped <= nf::kMostDecodeQueries) continue;
        const int64_t count = n.num_new - skipped, first = token + skipped;
        const DeviceArray<int64_t> q_start({0, count});
        auto p = params();
        p.q += first * q_stride_;
        p.out = static_cast<T*>(p.out) + first * out_stride_;
        p.num_tokens = count, p.num_seqs = 1;
        p.page_table += s * max_pages_, p.kv_len += s, p.q_start = q_start.get();
        check(same(out, run(p), first, first + count), "other bits without the first " +
                                                           std::to_string(skipped) + " queries of sequence " +
                                                           std::to_string(s) + ", " + name(c_));
      }
      token += n.num_new;
    }
  }

  // With a scale: the same rounded once more.
  void check_quantised(const std::vector<T>& out) {
    using Fp8 = __nv_fp8_e4m3;
    constexpr float kScale = 1.0f / 64;
    const DeviceArray<Fp8> quantised(num_tokens_ * out_stride_);
    const DeviceArray<float> scale(std::vector<float>{kScale});
    quantised.fill(0xff);
    auto p = params();
    p.out = quantised.get(), p.out_scale = scale.get();
    nf::prefill_attention<T>(p, nullptr);
    NF_CUDA(cudaDeviceSynchronize());
    const std::vector<Fp8> found = quantised.read();
    for (size_t i = 0; i < found.size(); ++i) {
      const float v = float(out[i]), q = float(found[i]);
      const bool right = std::isnan(v) ? std::isnan(q) : q == float(Fp8(v / kScale));
      if (!right) check(false, "e4m3 of " + std::to_string(v) + " is " + std::to_string(q) + ", " + name(c_));
    }
  }

  // Queries to be rotated by their positions: the bits of those that are rotated here.
  void check_rotated() {
    const int D = c_.head_dim, half = D / 2;
    std::vector<float> cos_sin(size_t(max_pages_ - 1) * kPage * D);  // NaN where there is no token
    std::fill(cos_sin.begin(), cos_sin.end(), NAN);
    std::vector<T> rotated = q_.read();
    T* q = rotated.data();
    for (const Lengths& n : c_.seqs) {
      for (int position = 0; position < n.all; ++position) {
        float* cos = &cos_sin[size_t(position) * D];
        for (int d = 0; d < half; ++d)
          cos[d] = std::cos(position / (d + 1.0f)), cos[d + half] = std::sin(position / (d + 1.0f));
      }
      for (int position = n.all - n.num_new; position < n.all; ++position, q += q_stride_) {
        const float *cos = &cos_sin[size_t(position) * D], *sin = cos + half;
        for (int i = 0; i < width(); i += i % D == half - 1 ? half + 1 : 1) {
          const float low = q[i], high = q[i + half];
          const int d = i % D;
          q[i] = T(low * cos[d] - high * sin[d]), q[i + half] = T(high * cos[d] + low * sin[d]);
        }
      }
    }
    const DeviceArray<float> d_cos_sin(cos_sin);
    const DeviceArray<T> d_rotated(rotated);
    auto to_rotate = params(), as_it_is = params();
    to_rotate.cos_sin = d_cos_sin.get(), to_rotate.cos_sin_stride = D, as_it_is.q = d_rotated.get();
    check(same(run(to_rotate), run(as_it_is), 0, num_tokens_), "rotated queries differ, " + name(c_));
  }

  const Case c_;
  const int max_pages_, num_pages_;
  const int64_t page_stride_, q_stride_, out_stride_, num_tokens_;
  DeviceArray<T> q_, out_;
  DeviceArray<Cached> cache_;
  DeviceArray<int64_t> page_table_, q_start_, kv_len_;
  double worst_ = 0;
};

const std::vector<Lengths> kRagged = {{9, 9},     {1, 70},   {64, 64},   {63, 200},   {65, 65},
                                      {127, 128}, {8, 8},    {129, 129}, {1, 1},      {257, 1025},
                                      {16, 2048}, {10, 130}, {640, 640}, {128, 1152}, {33, 4000}};
bool tiny = false;
const Case kTiny[] = {{1, 8, 128, {{70, 70}, {2, 66}, {20, 150}}}, {2, 3, 64, {{40, 140}}}};
const Case kCases[] = {
    {2, 8, 128, kRagged},        {1, 1, 128, kRagged},        {3, 3, 64, kRagged},
    {2, 16, 128, kRagged},       {2, 4, 64, kRagged},         {1, 5, 128, kRagged},
    {4, 2, 128, kRagged},        {1, 16, 64, kRagged},        {1, 1, 64, kRagged},
    {8, 8, 128, {{2048, 2048}}}, {2, 8, 128, {{300, 20000}}}, {1, 8, 128, {{8, 9}, {3, 3}}},
};

template <class T, class Cached, bool kProducts = false>
void check_cases() {
  const auto cases = tiny ? std::vector<Case>(std::begin(kTiny), std::end(kTiny))
                          : std::vector<Case>(std::begin(kCases), std::end(kCases));
  for (const Case& c : cases)
    if (!kProducts || c.head_dim == 128) Problem<T, Cached, kProducts>(c).check_all();
  if (tiny) return;
  Case many{2, 8, 128, {}};  // more sequences than a warp has lanes, of equal and of different lengths
  for (int i = 0; i < 100; ++i) many.seqs.push_back({1 + i % 40, 1 + i % 40 + i * 7 % 300});
  Problem<T, Cached, kProducts>(many).check_all();
}

void check_rejects() {
  nf::PrefillAttentionParams<__nv_bfloat16> p{};
  p.group = 17;
  testing::expect_throws([&] { nf::prefill_attention(p, nullptr); }, "G=17");
  p.group = 8, p.softmax_scale = 1, p.num_tokens = 100, p.num_seqs = 1025;
  testing::expect_throws([&] { nf::prefill_attention(p, nullptr); }, "S=1025");
  p.num_seqs = 1, p.head_dim = 128, p.fp8_products = true;
  testing::expect_throws([&] { nf::prefill_attention(p, nullptr); }, "FP8 products of 16-bit pages");
  p.fp8_cache = true, p.head_dim = 64;
  testing::expect_throws([&] { nf::prefill_attention(p, nullptr); }, "FP8 products of e4m3 pages, D=64");
}

}  // namespace

int main(int argc, char** argv) {
  if (!testing::is_hopper()) {
    std::puts("skipped: no GPU of sm_90");
    return testing::kSkipped;
  }
  tiny = argc > 1 && std::strcmp(argv[1], "tiny") == 0;
  return testing::run([] {
    check_cases<__nv_bfloat16, __nv_bfloat16>();
    check_cases<__nv_bfloat16, __nv_fp8_e4m3>();
    check_cases<__nv_bfloat16, __nv_fp8_e4m3, true>();
    check_cases<__half, __half>();
    check_cases<__half, __nv_fp8_e4m3>();
    check_cases<__half, __nv_fp8_e4m3, true>();
    check_rejects();
  });
}
