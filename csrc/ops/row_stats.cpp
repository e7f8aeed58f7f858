// SPDX-License-Identifier: Apache-2.0
#include "ops/row_stats.h"

#include "ops/register.h"

namespace nf::ops {
namespace {

void row_stats(Tensor stats, Tensor x, OptionalTensor norm_weight) {
  if (x.dim() != 2) reject("x", "has " + std::to_string(x.dim()) + " dims, want 2");
  check_dtype(x, ScalarType::BFloat16, "x");
  check_device(x, x, "x");
  check_rows(x, "x");
  const int64_t T = x.size(0), X = x.size(1);
  check_stats(stats, T, x, "stats");
  check_shape(stats, {T, (X + kStatsBlock - 1) / kStatsBlock, 2}, "stats");
  const DeviceGuard guard(x.get_device_index());
  nf::row_stats({.stats = reinterpret_cast<float2*>(ptr<float>(stats)),
                 .x = cptr<__nv_bfloat16>(x),
                 .norm_weight = check_norm_weight(norm_weight, X, x, "norm_weight"),
                 .num_tokens = T,
                 .dim = int(X),
                 .x_stride = row_stride(x)},
                current_stream(x));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nemotron_fast, CUDA, m) {
  register_cuda(m, "row_stats", TORCH_BOX(&row_stats));
}

}  // namespace nf::ops
