// SPDX-License-Identifier: Apache-2.0
#include "kernels/mlp/silu_mul.h"
#include "ops/register.h"
#include "ops/tensor_checks.h"

namespace nf::ops {
namespace {

void silu_mul(Tensor out, Tensor gate_up) {
  if (out.dim() != 2) reject("out", "has " + std::to_string(out.dim()) + " dims, want 2");
  const int64_t T = out.size(0), F = out.size(1);

  check_shape(gate_up, {T, 2 * F}, "gate_up");
  check_rows(gate_up, "gate_up");
  check_device(out, gate_up, "out");
  check_dtype(out, gate_up.scalar_type(), "out");
  check_rows(out, "out");

  const DeviceGuard guard(gate_up.get_device_index());
  const cudaStream_t stream = current_stream(gate_up);
  dispatch_half_types(gate_up, "gate_up", [&](auto scalar) {
    using Scalar = decltype(scalar);
    nf::silu_mul<Scalar>(
        {
            .out = ptr<Scalar>(out),
            .gate_up = cptr<Scalar>(gate_up),
            .num_tokens = T,
            .width = F,
            .out_stride = row_stride(out),
            .gate_up_stride = row_stride(gate_up),
        },
        stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nemotron_fast, CUDA, m) { register_cuda(m, "silu_mul", TORCH_BOX(&silu_mul)); }

}  // namespace nf::ops
