// SPDX-License-Identifier: Apache-2.0
#include "kernels/embedding/embed.h"
#include "ops/register.h"
#include "ops/vector_checks.h"

namespace nf::ops {
namespace {

void embed(Tensor out, Tensor ids, Tensor weight) {
  if (weight.dim() != 2) reject("weight", "has " + std::to_string(weight.dim()) + " dims, want 2");
  const int64_t T = ids.size(0), V = weight.size(0), E = weight.size(1);
  const int64_t element = int64_t(weight.element_size());

  check_vector(ids, T, ScalarType::Long, weight, "ids");
  check_rows(weight, "weight");
  check_device(out, weight, "out");
  check_dtype(out, weight.scalar_type(), "out");
  check_shape(out, {T, E}, "out");
  check_rows(out, "out");

  const DeviceGuard guard(weight.get_device_index());
  nf::embed(
      {
          .out = out.mutable_data_ptr(),
          .ids = cptr<int64_t>(ids),
          .weight = weight.const_data_ptr(),
          .num_tokens = T,
          .vocab = V,
          .row_bytes = E * element,
          .out_stride_bytes = row_stride(out) * element,
          .weight_stride_bytes = row_stride(weight) * element,
      },
      current_stream(weight));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nemotron_fast, CUDA, m) { register_cuda(m, "embed", TORCH_BOX(&embed)); }

}  // namespace nf::ops
