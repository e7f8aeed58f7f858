// SPDX-License-Identifier: Apache-2.0
#include "kernels/norm/rms_norm.h"
#include "ops/register.h"
#include "ops/tensor_checks.h"

namespace nf::ops {
namespace {

// `residual` is null for rms_norm.
void norm(const Tensor& out, const Tensor* residual, const Tensor& x, const Tensor& weight, double eps) {
  if (x.dim() != 2) reject("x", "has " + std::to_string(x.dim()) + " dims, want 2");
  const int64_t T = x.size(0), E = x.size(1);

  const auto check_matrix = [&](const Tensor& t, const char* name) {
    check_device(t, x, name);
    check_dtype(t, x.scalar_type(), name);
    check_shape(t, {T, E}, name);
    check_rows(t, name);
  };
  check_matrix(x, "x");
  check_matrix(out, "out");
  if (residual) check_matrix(*residual, "residual");
  check_device(weight, x, "weight");
  check_dtype(weight, x.scalar_type(), "weight");
  check_shape(weight, {E}, "weight");
  check_rows(weight, "weight");

  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);

  dispatch_half_types(x, "x", [&](auto scalar) {
    using Scalar = decltype(scalar);
    const RmsNormParams<Scalar> params{
        .out = ptr<Scalar>(out),
        .residual = residual ? ptr<Scalar>(*residual) : nullptr,
        .x = cptr<Scalar>(x),
        .weight = cptr<Scalar>(weight),
        .num_tokens = T,
        .dim = int(E),
        .out_stride = row_stride(out),
        .residual_stride = residual ? row_stride(*residual) : 0,
        .x_stride = row_stride(x),
        .eps = float(eps),
    };
    const NormConfig config = pick_norm_config(params.dim);
    residual ? nf::add_rms_norm(params, config, stream) : nf::rms_norm(params, config, stream);
  });
}

void rms_norm(Tensor out, Tensor x, Tensor weight, double eps) { norm(out, nullptr, x, weight, eps); }

void add_rms_norm(Tensor out, Tensor residual, Tensor x, Tensor weight, double eps) {
  norm(out, &residual, x, weight, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nemotron_fast, CUDA, m) {
  register_cuda(m, "rms_norm", TORCH_BOX(&rms_norm));
  register_cuda(m, "add_rms_norm", TORCH_BOX(&add_rms_norm));
}

}  // namespace nf::ops
