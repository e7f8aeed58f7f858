// SPDX-License-Identifier: Apache-2.0
// pack_weight and packed_linear without torch or Python: the program that compute-sanitizer runs (with the
// argument "tiny").
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "gpu_testing.h"
#include "kernels/linear/linear.h"
#include "kernels/norm/rms_norm.h"
#include "kernels/norm/row_stats.h"

namespace {

using testing::check;
using testing::DeviceArray;
using testing::fill_normal;

struct Case {
  int num_rows, num_cols;
};
// N, K: edges, SmolLM2-135M, and the linears of Super-49B (down: a few widths)
const Case kSmall[] = {{16, 16},    {48, 80},   {576, 576}, {1536, 576}, {352, 704},
                       {144, 1536}, {96, 2176}, {96, 4096}, {96, 4224},  {96, 12288}};
const Case kLarge[] = {{576, 1536},   {704, 352},    {10240, 8192}, {8192, 8192}, {5632, 8192},
                       {57344, 8192}, {8192, 28672}, {8192, 2816},  {8192, 5632}, {8192, 17920}};
const Case kTiny[] = {{48, 80}, {144, 1536}, {352, 704}, {96, 2176}};
// A row's bits depend on the others only in whether they are more than kMaxFewTokens.
const int kTokens[] = {1,   2,   7,   8,   9,   16,  17,  33,  64,  65,   100,
                       128, 129, 170, 200, 256, 257, 300, 384, 385, 1100, 2100};
const int kTokensOfLarge[] = {1, 9, 64, 100, 256, 600}, kTokensOfTiny[] = {9, 17, 64, 100, 200, 300, 600};
enum Size { kEverything, kSmallCases, kTinyCases } size = kEverything;
constexpr int kMaxTokens = 2100;
constexpr int kPadding = 16;  // between rows of the output

// A warp per sample: sums in double. want[s] = the result, magnitude[s] = the root of the sum of the squared
// products
template <class T>
__global__ void reference(double* want, double* magnitude, const T* x, const T* weight, const float* x_scale,
                          const float* weight_scale, int num_rows, int num_cols, int num_samples,
                          int sample_stride) {
  const int s = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (s >= num_samples) return;
  const int64_t at = int64_t(s) * sample_stride;
  const int token = int(at / num_rows), row = int(at % num_rows);
  double sum = 0, squares = 0;
  for (int k = lane; k < num_cols; k += 32) {
    const double v =
        double(float(x[int64_t(token) * num_cols + k])) * double(float(weight[int64_t(row) * num_cols + k]));
    sum += v, squares += v * v;
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    sum += __shfl_xor_sync(~0u, sum, mask);
    squares += __shfl_xor_sync(~0u, squares, mask);
  }
  const double scale = double(x_scale[token]) * weight_scale[row];
  want[s] = sum * scale, magnitude[s] = sqrt(squares) * scale;
}

int num_sms() {
  int n;
  NF_CUDA(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0));
  return n;
}

template <class T>
struct Problem {
  Case c;
  nf::PackedShape shape;
  DeviceArray<T> weight, x;
  DeviceArray<uint8_t> packed, workspace;
  DeviceArray<float> x_scale, weight_scale;
  cudaStream_t stream;
  int sms = num_sms();  // that a launch may use

  explicit Problem(const Case& c)
      : c(c),
        shape(nf::packed_shape(c.num_rows, c.num_cols, sizeof(T))),
        weight(size_t(c.num_rows) * c.num_cols),
        x(size_t(kMaxTokens) * c.num_cols),
        packed(shape.packed_bytes()),
        workspace(nf::linear_workspace_bytes(num_sms())),
        x_scale(kMaxTokens),
        weight_scale(c.num_rows) {
    NF_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    fill_normal<<<1024, 256>>>(weight.get(), int64_t(c.num_rows) * c.num_cols, 1, 1.0f, 0.0f);
    fill_normal<<<1024, 256>>>(x.get(), int64_t(kMaxTokens) * c.num_cols, 2, 1.0f, 0.0f);
    fill_normal<<<1, 256>>>(x_scale.get(), kMaxTokens, 3, 0.1f, 1.0f);
    fill_normal<<<1, 256>>>(weight_scale.get(), c.num_rows, 4, 0.1f, 1.0f);
    packed.fill(0xff);
    workspace.fill(0xff);
    NF_CUDA(cudaDeviceSynchronize());
    pack(packed.get(), false);
  }
  ~Problem() { cudaStreamDestroy(stream); }

  void pack(uint8_t* to, bool interleave) {
    nf::pack_weight({.packed = to, .weight = weight.get(), .shape = shape, .interleave = interleave}, stream);
    NF_CUDA(cudaStreamSynchronize(stream));
  }

  nf::PackedLinearParams params(void* out, int num_tokens, nf::OutType type) const {
    return {.out = out,
            .x = x.get(),
            .packed = packed.get(),
            .x_scale = x_scale.get(),
            .weight_scale = weight_scale.get(),
            .out_scale = nullptr,
            .workspace = workspace.get(),
            .num_tokens = num_tokens,
            .num_rows = c.num_rows,
            .num_cols = c.num_cols,
            .out_stride = c.num_rows + kPadding,
            .x_stride = c.num_cols,
            .x_scale_per_token = true,
            .weight_scale_per_row = true,
            .out_type = type,
            .epilogue = nf::Epilogue::kStore,
            .schedule = nf::make_linear_schedule(c.num_rows, c.num_cols, sizeof(T), sms),
            .num_sms = sms};
  }

  // One call on poisoned output; rows of N + kPadding.
  template <class Out>
  std::vector<Out> run(int num_tokens) {
    const DeviceArray<Out> out(size_t(num_tokens) * (c.num_rows + kPadding));
    out.fill(0xff);  // NaN
    const auto type = sizeof(Out) == 4 ? nf::OutType::kFloat : nf::OutType::kBfloat16;
    nf::packed_linear<T>(params(out.get(), num_tokens, type), stream);
    NF_CUDA(cudaStreamSynchronize(stream));
    return out.read();
  }
};

std::string name(const Case& c, int num_tokens, size_t element_bytes) {
  return "N=" + std::to_string(c.num_rows) + " K=" + std::to_string(c.num_cols) +
         " T=" + std::to_string(num_tokens) + (element_bytes == 1 ? " e4m3" : " bf16");
}

template <class T>
void check_packing(Problem<T>& p) {
  const auto weight = p.weight.read();
  for (bool interleave : {false, true}) {
    if (interleave && p.c.num_rows % 32 != 0) continue;
    const DeviceArray<uint8_t> d_packed(p.shape.packed_bytes());
    d_packed.fill(0xff);
    p.pack(d_packed.get(), interleave);
    const auto found = d_packed.read();
    std::vector<uint8_t> want(found.size(), 0);
    for (int64_t n = 0; n < p.c.num_rows; ++n) {
      const int64_t from = interleave ? nf::gate_up_row(n, p.c.num_rows) : n;
      for (int64_t k = 0; k < p.c.num_cols; ++k)
        std::memcpy(&want[p.shape.offset(n, k * sizeof(T))], &weight[from * p.c.num_cols + k], sizeof(T));
    }
    check(found == want, "packed weight differs, " + name(p.c, 0, sizeof(T)));
  }
}

struct Error {
  double worst, rms;
};

// Against sums in double at up to 64K places: all of them for a small case. As parts of the root of the sum
// of the squared products.
template <class T>
Error relative_error(const Problem<T>& p, const std::vector<float>& out, int num_tokens) {
  const int64_t size = int64_t(num_tokens) * p.c.num_rows;
  const int stride = size <= 65536 ? 1 : int(size / 65536) | 1,
            num_samples = int((size + stride - 1) / stride);
  const DeviceArray<double> d_want(num_samples), d_magnitude(num_samples);
  reference<<<(num_samples + 7) / 8, 256>>>(d_want.get(), d_magnitude.get(), p.x.get(), p.weight.get(),
                                            p.x_scale.get(), p.weight_scale.get(), p.c.num_rows, p.c.num_cols,
                                            num_samples, stride);
  NF_CUDA(cudaDeviceSynchronize());
  const auto want = d_want.read(), magnitude = d_magnitude.read();
  double worst = 0, squares = 0;
  for (int s = 0; s < num_samples; ++s) {
    const int64_t at = int64_t(s) * stride;
    const double found = out[at / p.c.num_rows * (p.c.num_rows + kPadding) + at % p.c.num_rows];
    const double error = std::abs(found - want[s]) / magnitude[s];
    if (std::isnan(error)) return {error, error};
    worst = std::max(worst, error), squares += error * error;
  }
  return {worst, std::sqrt(squares / num_samples)};
}

// The other epilogues against the plain one, rounded on the host.
template <class T>
void check_epilogues(Problem<T>& p, int num_tokens) {
  const int64_t stride = p.c.num_rows + kPadding;
  const std::string what = name(p.c, num_tokens, sizeof(T));
  p.pack(p.packed.get(), false);
  const std::vector<float> y = p.template run<float>(num_tokens);
  const auto at = [&](int t, int64_t n) { return float(__nv_bfloat16(y[t * stride + n])); };
  const DeviceArray<__nv_bfloat16> out(num_tokens * stride);
  fill_normal<<<64, 256>>>(out.get(), num_tokens * stride, 9, 30.0f, 0.0f);
  NF_CUDA(cudaDeviceSynchronize());
  const auto residual = out.read();
  auto params = p.params(out.get(), num_tokens, nf::OutType::kBfloat16);
  params.epilogue = nf::Epilogue::kAdd;
  nf::packed_linear<T>(params, p.stream);
  NF_CUDA(cudaStreamSynchronize(p.stream));
  const auto sum = out.read();
  for (int t = 0; t < num_tokens; ++t)
    for (int64_t n = 0; n < stride; ++n) {
      const float want = float(residual[t * stride + n]) + (n < p.c.num_rows ? at(t, n) : 0.0f);
      check(float(sum[t * stride + n]) == float(__nv_bfloat16(want)), "residual, " + what);
    }

  if (p.c.num_rows % 32 != 0) return;
  const int width = p.c.num_rows / 2;
  p.pack(p.packed.get(), true);
  params.epilogue = nf::Epilogue::kSwiglu;
  nf::packed_linear<T>(params, p.stream);
  const DeviceArray<__nv_fp8_e4m3> quantised(num_tokens * stride);
  quantised.fill(0);
  const DeviceArray<float> scale(1);
  fill_normal<<<1, 1>>>(scale.get(), 1, 5, 0.0f, 3.0f);
  NF_CUDA(cudaDeviceSynchronize());
  params.out = quantised.get(), params.out_type = nf::OutType::kFp8, params.out_scale = scale.get();
  nf::packed_linear<T>(params, p.stream);
  NF_CUDA(cudaStreamSynchronize(p.stream));
  const auto product = out.read();
  const auto q = quantised.read();
  for (int t = 0; t < num_tokens; ++t)
    for (int64_t n = width; n < stride; ++n)
      check(float(product[t * stride + n]) == float(sum[t * stride + n]) && float(q[t * stride + n]) == 0,
            "SwiGLU beyond its columns, " + what);
  double largest = 0, worst = 0, worst_q = 0;
  for (int t = 0; t < num_tokens; ++t)
    for (int n = 0; n < width; ++n) {
      const double want = at(t, n) / (1 + std::exp(-double(at(t, n)))) * at(t, width + n);
      const double found = float(product[t * stride + n]), found_q = 3.0 * float(q[t * stride + n]);
      check(!std::isnan(found) && !std::isnan(found_q), "SwiGLU is NaN, " + what);
      largest = std::max(largest, std::abs(want));
      worst = std::max(worst, std::abs(found - want));
      worst_q = std::max(worst_q,
                         std::abs(found_q - std::clamp(want, -3 * 448.0, 3 * 448.0)) - 0.07 * std::abs(want));
    }
  check(worst < 0.02 * largest,
        "SwiGLU, " + what + ": " + std::to_string(worst) + " of " + std::to_string(largest));
  check(worst_q < 0.02 * largest, "quantised SwiGLU, " + what + ": " + std::to_string(worst_q));
}

template <class T>
void check_tokens(Problem<T>& p, int num_tokens, const std::vector<float>& all, Error& largest) {
  const Case& c = p.c;
  const int64_t stride = c.num_rows + kPadding;
  const std::vector<float> out = p.template run<float>(num_tokens), again = p.template run<float>(num_tokens);
  const std::string what = name(c, num_tokens, sizeof(T));
  const Error error = relative_error(p, out, num_tokens);
  largest = {std::max(largest.worst, error.worst), std::max(largest.rms, error.rms)};
  // Tensor cores truncate the sum at every instruction: in BF16 that is all of the error and grows with K. Of
  // e4m3 they keep some 14 bits, and the kernels of few and of many tokens move them to FP32 after every k
  // tile and after 32.
  const Error bound = sizeof(T) == 2                    ? Error{std::max(1e-4, 1e-8 * p.c.num_cols), 1}
                      : num_tokens <= nf::kMaxFewTokens ? Error{2e-3, 2e-4}
                                                        : Error{2.5e-2, 1.6e-3};
  check(error.worst < bound.worst && error.rms < bound.rms,
        "error " + std::to_string(error.worst) + ", rms " + std::to_string(error.rms) + ", " + what);
  check(std::memcmp(out.data(), again.data(), out.size() * 4) == 0, "two runs differ, " + what);
  check(std::memcmp(out.data(), all.data(), out.size() * 4) == 0,
        "differs from the same rows of more, " + what);
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int64_t n = 0; n < stride; ++n)
      check(std::isnan(out[t * stride + n]) == (n >= c.num_rows), "poison, " + what);
  const auto rounded = p.template run<__nv_bfloat16>(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int64_t n = 0; n < stride; ++n) {
      const float found = float(rounded[t * stride + n]);
      check(n < c.num_rows ? found == float(__nv_bfloat16(out[t * stride + n])) : std::isnan(found),
            "bf16, " + what);
    }
}

// Rows with statistics: the linear that reads them gives the bits of the norm and the linear one after the
// other, and the statistics that it leaves are those of row_stats().
template <class T>
void check_rows(Problem<T>& p, int num_tokens) {
  using Bf16 = __nv_bfloat16;
  const int N = p.c.num_rows, K = p.c.num_cols;
  const std::string what = name(p.c, num_tokens, sizeof(T));
  const auto blocks = [](int dim) { return (dim + nf::kStatsBlock - 1) / nf::kStatsBlock; };
  const DeviceArray<Bf16> rows(num_tokens * K), zeros(num_tokens * K), norm(std::max(N, K));
  const DeviceArray<T> x(num_tokens * K);
  const DeviceArray<float> scale(num_tokens);
  const DeviceArray<float2> stats(num_tokens * blocks(K)), left(num_tokens * blocks(N)),
      made(num_tokens * blocks(N));
  fill_normal<<<64, 256>>>(rows.get(), int64_t(num_tokens) * K, 6, 3.0f, 0.0f);
  fill_normal<<<64, 256>>>(norm.get(), std::max(N, K), 7, 0.3f, 1.0f);
  zeros.fill(0);
  NF_CUDA(cudaDeviceSynchronize());
  const auto make_stats = [&](const Bf16* of, int dim, int64_t stride, float2* to) {
    nf::row_stats({.stats = to,
                   .x = of,
                   .norm_weight = norm.get(),
                   .num_tokens = num_tokens,
                   .dim = dim,
                   .x_stride = stride},
                  p.stream);
  };
  make_stats(rows.get(), K, K, stats.get());
  const int64_t stride = N + kPadding;
  const DeviceArray<Bf16> found(num_tokens * stride), want(num_tokens * stride);
  fill_normal<<<64, 256>>>(found.get(), num_tokens * stride, 8, 1.0f, 0.0f);
  fill_normal<<<64, 256>>>(want.get(), num_tokens * stride, 8, 1.0f, 0.0f);
  NF_CUDA(cudaDeviceSynchronize());

  auto params = p.params(found.get(), num_tokens, nf::OutType::kBfloat16);
  params.epilogue = nf::Epilogue::kAdd;
  params.x = rows.get(), params.x_scale = nullptr;
  params.x_rows = {.stats = stats.get(),
                   .norm_weight = norm.get(),
                   .fp8_scale = nullptr,
                   .num_blocks = blocks(K),
                   .eps = 1e-5f};
  params.out_stats = left.get(), params.out_norm_weight = norm.get();
  nf::packed_linear<T>(params, p.stream);
  make_stats(found.get(), N, stride, made.get());

  nf::add_rms_norm(nf::RmsNormParams<Bf16, T>{.out = x.get(),
                                              .residual = rows.get(),
                                              .x = zeros.get(),
                                              .weight = norm.get(),
                                              .scale = sizeof(T) == 1 ? scale.get() : nullptr,
                                              .num_tokens = num_tokens,
                                              .dim = K,
                                              .out_stride = K,
                                              .residual_stride = K,
                                              .x_stride = K,
                                              .eps = 1e-5f,
                                              .scale_per_token = sizeof(T) == 1},
                   nf::pick_norm_config(K, num_tokens), p.stream);
  params.x_rows = {}, params.out_stats = nullptr, params.out = want.get();
  params.x = x.get(), params.x_scale = sizeof(T) == 1 ? scale.get() : nullptr;
  nf::packed_linear<T>(params, p.stream);
  NF_CUDA(cudaStreamSynchronize(p.stream));
  const auto same = [&](const auto& a, const auto& b, const char* of) {
    const auto left_side = a.read(), right_side = b.read();
    check(std::memcmp(left_side.data(), right_side.data(), left_side.size() * sizeof(left_side[0])) == 0,
          std::string(of) + " of rows, " + what);
  };
  same(found, want, "the result");
  same(left, made, "the statistics");
}

// With few CTAs each has several tiles, or blocks: the result of one is stored while the next is computed.
// The GEMM gives the bits of all SMs.
template <class T>
void check_few_sms(Problem<T>& p) {
  for (int sms : {2, 4, 6}) {
    for (int t : {17, 64, 65, 200, 300, 600}) {
      p.pack(p.packed.get(), false);
      const auto want = p.template run<float>(t);
      p.sms = sms;
      const auto found = p.template run<float>(t);
      if (t > nf::kMaxFewTokens)
        check(std::memcmp(found.data(), want.data(), want.size() * 4) == 0,
              std::to_string(sms) + " SMs give other bits, " + name(p.c, t, sizeof(T)));
      check_epilogues(p, t);
      p.sms = num_sms();
    }
  }
}

template <class T>
void check_case(const Case& c, bool small) {
  Problem<T> p(c);
  if (small) check_packing(p);
  const auto tokens = [&] {
    if (size == kTinyCases) return std::vector<int>(std::begin(kTokensOfTiny), std::end(kTokensOfTiny));
    if (small) return std::vector<int>(std::begin(kTokens), std::end(kTokens));
    return std::vector<int>(std::begin(kTokensOfLarge), std::end(kTokensOfLarge));
  }();
  const std::vector<float> few = p.template run<float>(nf::kMaxFewTokens),
                           many = p.template run<float>(tokens.back());
  Error largest{};
  for (int t : tokens) check_tokens(p, t, t <= nf::kMaxFewTokens ? few : many, largest);
  if (small) {
    for (int t : {17, 32, 33, 200, 300}) check_epilogues(p, t);
    check_few_sms(p);
    p.pack(p.packed.get(), false);
    for (int t : {1, 5, 8, 9, 16}) check_rows(p, t);
  }
  const auto workspace = p.workspace.read();
  check(workspace == std::vector<uint8_t>(workspace.size(), 0xff),
        "the workspace is not as it was, " + name(c, 0, sizeof(T)));
  std::printf("%-32s worst error %.2e, rms %.2e\n", name(c, tokens.back(), sizeof(T)).c_str(), largest.worst,
              largest.rms);
}

void check_rejects() {
  nf::PackedLinearParams p{};
  p.num_tokens = -1, p.num_rows = 64, p.num_cols = 64;
  testing::expect_throws([&] { nf::packed_linear<__nv_bfloat16>(p, nullptr); }, "T=-1");
  p.num_tokens = 1;
  p.num_cols = 40;
  testing::expect_throws([&] { nf::packed_linear<__nv_bfloat16>(p, nullptr); }, "K=40");
}

}  // namespace

int main(int argc, char** argv) {
  if (!testing::is_hopper()) {
    std::puts("skipped: no GPU of sm_90");
    return testing::kSkipped;
  }
  if (argc > 1) size = std::strcmp(argv[1], "tiny") == 0 ? kTinyCases : kSmallCases;
  return testing::run([] {
    const auto& cases = size == kTinyCases ? std::vector<Case>(std::begin(kTiny), std::end(kTiny))
                                           : std::vector<Case>(std::begin(kSmall), std::end(kSmall));
    for (const Case& c : cases) check_case<__nv_fp8_e4m3>(c, true), check_case<__nv_bfloat16>(c, true);
    if (size == kEverything)
      for (const Case& c : kLarge) check_case<__nv_fp8_e4m3>(c, false), check_case<__nv_bfloat16>(c, false);
    check_rejects();
  });
}
