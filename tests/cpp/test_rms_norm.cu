// SPDX-License-Identifier: Apache-2.0
// The norm kernels without torch or Python: the program that compute-sanitizer runs.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "gpu_testing.h"
#include "kernels/norm/rms_norm.h"

namespace {

using testing::DeviceArray;
constexpr float kEps = 1e-5f;

struct Case {
  int num_tokens, dim, padding;  // padding: elements between the end of a row and the next
};
const Case kCases[] = {{0, 64, 0},    {1, 8, 0},      {1, 8192, 0},  {2, 16384, 0},
                       {3, 576, 64},  {7, 4104, 8},   {65, 256, 0},  {5, 8192, 8192},
                       {2, 32768, 0}, {257, 8192, 8}, {300, 4104, 0}};

float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
float to_float(__half v) { return __half2float(v); }
template <class T>
T from_float(float v);
template <>
__nv_bfloat16 from_float(float v) {
  return __float2bfloat16(v);
}
template <>
__half from_float(float v) {
  return __float2half(v);
}

template <class T>
std::vector<T> random_values(size_t n, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 2.0f);
  std::vector<T> values(n);
  for (T& v : values) v = from_float<T>(normal(generator));
  return values;
}

template <class T>
struct Result {
  std::vector<T> out, residual;
};

// One call on poisoned output. The rows of `out` are contiguous, those of x and residual padded.
template <class T>
Result<T> run_norm(const Case& c, bool add, const std::vector<T>& x, const std::vector<T>& residual,
                   const std::vector<T>& weight) {
  const std::vector<T> poison(size_t(c.num_tokens) * c.dim,
                              from_float<T>(std::numeric_limits<float>::quiet_NaN()));
  const DeviceArray<T> d_out(poison), d_residual(residual), d_x(x), d_weight(weight);
  const int64_t stride = c.dim + c.padding;
  const nf::RmsNormParams<T> params{.out = d_out.get(),
                                    .residual = add ? d_residual.get() : nullptr,
                                    .x = d_x.get(),
                                    .weight = d_weight.get(),
                                    .num_tokens = c.num_tokens,
                                    .dim = c.dim,
                                    .out_stride = c.dim,
                                    .residual_stride = stride,
                                    .x_stride = stride,
                                    .eps = kEps};
  cudaStream_t stream;
  NF_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const nf::NormConfig config = nf::pick_norm_config(c.dim, c.num_tokens);
  add ? nf::add_rms_norm(params, config, stream) : nf::rms_norm(params, config, stream);
  NF_CUDA(cudaStreamSynchronize(stream));
  NF_CUDA(cudaStreamDestroy(stream));
  return {d_out.read(), d_residual.read()};
}

template <class T>
void check_case(const Case& c, bool add) {
  const int64_t stride = c.dim + c.padding;
  const auto x = random_values<T>(c.num_tokens * stride, 1), weight = random_values<T>(c.dim, 3);
  const auto residual = random_values<T>(c.num_tokens * stride, 2);
  const Result<T> result = run_norm(c, add, x, residual, weight);
  const Result<T> again = run_norm(c, add, x, residual, weight);
  EXPECT_EQ(std::memcmp(result.out.data(), again.out.data(), result.out.size() * sizeof(T)), 0);

  // Two roundings, each of half a unit in the last place (2^-10 and 2^-7), and half a unit for the FP32
  // arithmetic.
  const double tolerance = 1.5 * (std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7);
  for (int t = 0; t < c.num_tokens; ++t) {
    std::vector<T> row(c.dim);
    double squares = 0;
    for (int i = 0; i < c.dim; ++i) {
      const size_t at = t * stride + i;
      row[i] = add ? from_float<T>(to_float(residual[at]) + to_float(x[at])) : x[at];
      EXPECT_EQ(to_float(result.residual[at]), to_float(add ? row[i] : residual[at]));
      squares += double(to_float(row[i])) * to_float(row[i]);
    }
    for (int i = 0; i < c.dim; ++i) {
      const double want = to_float(row[i]) / std::sqrt(squares / c.dim + kEps) * to_float(weight[i]);
      const double found = to_float(result.out[size_t(t) * c.dim + i]);
      const bool close = std::abs(found - want) <= tolerance * std::abs(want) + 1e-6;  // false for NaN
      if (!close)
        testing::expect_eq(found, want, ("out[" + std::to_string(t) + "," + std::to_string(i) + "]").c_str());
    }
    for (int i = c.dim; i < stride; ++i)  // the padding is not ours
      EXPECT_EQ(to_float(result.residual[t * stride + i]), to_float(residual[t * stride + i]));
  }
}

void check_rejects() {
  nf::RmsNormParams<__half> p{};
  p.num_tokens = 1;
  p.dim = 64;
  const nf::NormConfig config = nf::pick_norm_config(64, 1);
  testing::expect_throws([&] { nf::add_rms_norm(p, config, nullptr); }, "no residual");
  p.x_stride = 63;
  testing::expect_throws([&] { nf::rms_norm(p, config, nullptr); }, "stride 63");
  p.x_stride = 64;
  testing::expect_throws([&] { nf::rms_norm(p, {32, 3}, nullptr); }, "vecs_per_thread=3 is not built");
}

}  // namespace

int main() {
  int num_gpus = 0;
  if (cudaGetDeviceCount(&num_gpus) != cudaSuccess || num_gpus == 0) {
    std::puts("skipped: no GPU");
    return testing::kSkipped;
  }
  return testing::run([] {
    for (const Case& c : kCases) {
      for (bool add : {false, true}) {
        check_case<__nv_bfloat16>(c, add);
        check_case<__half>(c, add);
      }
    }
    check_rejects();
  });
}
