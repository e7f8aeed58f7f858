// SPDX-License-Identifier: Apache-2.0
#include "kernels/norm/rms_norm.h"
#include "ops/register.h"
#include "ops/vector_checks.h"

namespace nf::ops {
namespace {

// What the norms share: x [T, E], weight [E], out and `residual` (null for rms_norm) as x.
void check_norm(const Tensor& out, const Tensor* residual, const Tensor& x, const Tensor& weight) {
  if (x.dim() != 2) reject("x", "has " + std::to_string(x.dim()) + " dims, want 2");
  const int64_t T = x.size(0), E = x.size(1);
  const auto check_matrix = [&](const Tensor& t, const char* name) {
    check_device(t, x, name);
    check_shape(t, {T, E}, name);
    check_rows(t, name);
  };
  check_matrix(x, "x");
  check_matrix(out, "out");
  if (residual) {
    check_matrix(*residual, "residual");
    check_dtype(*residual, x.scalar_type(), "residual");
  }
  check_device(weight, x, "weight");
  check_dtype(weight, x.scalar_type(), "weight");
  check_shape(weight, {E}, "weight");
  check_rows(weight, "weight");
}

template <class Scalar, class Out>
RmsNormParams<Scalar, Out> make_params(const Tensor& out, const Tensor* residual, const Tensor& x,
                                       const Tensor& weight, double eps) {
  return {
      .out = ptr<Out>(out),
      .residual = residual ? ptr<Scalar>(*residual) : nullptr,
      .x = cptr<Scalar>(x),
      .weight = cptr<Scalar>(weight),
      .num_tokens = x.size(0),
      .dim = int(x.size(1)),
      .out_stride = row_stride(out),
      .residual_stride = residual ? row_stride(*residual) : 0,
      .x_stride = row_stride(x),
      .eps = float(eps),
  };
}

void rms_norm(Tensor out, Tensor x, Tensor weight, double eps) {
  check_norm(out, nullptr, x, weight);
  check_dtype(out, x.scalar_type(), "out");
  const DeviceGuard guard(x.get_device_index());
  dispatch_half_types(x, "x", [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto params = make_params<Scalar, Scalar>(out, nullptr, x, weight, eps);
    nf::rms_norm(params, pick_norm_config(params.dim, params.num_tokens), current_stream(x));
  });
}

void add_rms_norm(Tensor out, Tensor residual, Tensor x, Tensor weight, double eps) {
  check_norm(out, &residual, x, weight);
  check_dtype(out, x.scalar_type(), "out");
  const DeviceGuard guard(x.get_device_index());
  dispatch_half_types(x, "x", [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto params = make_params<Scalar, Scalar>(out, &residual, x, weight, eps);
    nf::add_rms_norm(params, pick_norm_config(params.dim, params.num_tokens), current_stream(x));
  });
}

// residual: null for rms_norm.
void norm_to_fp8(const Tensor& out, const Tensor* residual, const Tensor& scale, const Tensor& x,
                 const Tensor& weight, double eps, bool per_token) {
  check_norm(out, residual, x, weight);
  check_dtype(out, ScalarType::Float8_e4m3fn, "out");
  check_vector(scale, per_token ? x.size(0) : 1, ScalarType::Float, x, "scale");
  const DeviceGuard guard(x.get_device_index());
  dispatch_half_types(x, "x", [&](auto scalar) {
    auto params = make_params<decltype(scalar), __nv_fp8_e4m3>(out, residual, x, weight, eps);
    params.scale = ptr<float>(scale);
    params.scale_per_token = per_token;
    const auto norm = residual ? nf::add_rms_norm<decltype(scalar), __nv_fp8_e4m3>
                               : nf::rms_norm<decltype(scalar), __nv_fp8_e4m3>;
    norm(params, pick_norm_config(params.dim, params.num_tokens), current_stream(x));
  });
}

void rms_norm_fp8(Tensor out, Tensor x, Tensor weight, Tensor scale, double eps) {
  norm_to_fp8(out, nullptr, scale, x, weight, eps, false);
}

void rms_norm_fp8_per_token(Tensor out, Tensor scale, Tensor x, Tensor weight, double eps) {
  norm_to_fp8(out, nullptr, scale, x, weight, eps, true);
}

void add_rms_norm_fp8(Tensor out, Tensor residual, Tensor x, Tensor weight, Tensor scale, double eps) {
  norm_to_fp8(out, &residual, scale, x, weight, eps, false);
}

void add_rms_norm_fp8_per_token(Tensor out, Tensor scale, Tensor residual, Tensor x, Tensor weight,
                                double eps) {
  norm_to_fp8(out, &residual, scale, x, weight, eps, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nemotron_fast, CUDA, m) {
  register_cuda(m, "rms_norm", TORCH_BOX(&rms_norm));
  register_cuda(m, "rms_norm_fp8", TORCH_BOX(&rms_norm_fp8));
  register_cuda(m, "rms_norm_fp8_per_token", TORCH_BOX(&rms_norm_fp8_per_token));
  register_cuda(m, "add_rms_norm", TORCH_BOX(&add_rms_norm));
  register_cuda(m, "add_rms_norm_fp8", TORCH_BOX(&add_rms_norm_fp8));
  register_cuda(m, "add_rms_norm_fp8_per_token", TORCH_BOX(&add_rms_norm_fp8_per_token));
}

}  // namespace nf::ops
