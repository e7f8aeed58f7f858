// SPDX-License-Identifier: Apache-2.0
#include "kernels/quant/quantize.h"
#include "ops/register.h"
#include "ops/vector_checks.h"

namespace nf::ops {
namespace {

void quantize(const Tensor& out, const Tensor& scale, const Tensor& x, bool per_token) {
  if (x.dim() != 2) reject("x", "has " + std::to_string(x.dim()) + " dims, want 2");
  const int64_t T = x.size(0), X = x.size(1);

  check_rows(x, "x");
  check_device(out, x, "out");
  check_dtype(out, ScalarType::Float8_e4m3fn, "out");
  check_shape(out, {T, X}, "out");
  check_rows(out, "out");
  check_vector(scale, per_token ? T : 1, ScalarType::Float, x, "scale");

  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  dispatch_half_types(x, "x", [&](auto scalar) {
    using Scalar = decltype(scalar);
    const QuantizeParams<Scalar> params{
        .out = ptr<__nv_fp8_e4m3>(out),
        .scale = ptr<float>(scale),
        .x = cptr<Scalar>(x),
        .num_tokens = T,
        .dim = X,
        .out_stride = row_stride(out),
        .x_stride = row_stride(x),
    };
    per_token ? nf::quantize_fp8_per_token(params, stream) : nf::quantize_fp8(params, stream);
  });
}

void quantize_fp8(Tensor out, Tensor x, Tensor scale) { quantize(out, scale, x, false); }

void quantize_fp8_per_token(Tensor out, Tensor scale, Tensor x) { quantize(out, scale, x, true); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nemotron_fast, CUDA, m) {
  register_cuda(m, "quantize_fp8", TORCH_BOX(&quantize_fp8));
  register_cuda(m, "quantize_fp8_per_token", TORCH_BOX(&quantize_fp8_per_token));
}

}  // namespace nf::ops
