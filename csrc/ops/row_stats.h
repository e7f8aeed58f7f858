// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/norm/row_stats.h"
#include "ops/vector_checks.h"

namespace nf::ops {

using OptionalTensor = std::optional<Tensor>;

// The weight [X] of a norm, or null.
inline const __nv_bfloat16* check_norm_weight(const OptionalTensor& weight, int64_t X, const Tensor& like,
                                              const char* name) {
  if (!weight) return nullptr;
  check_vector(*weight, X, ScalarType::BFloat16, like, name);
  check_rows(*weight, name);
  return cptr<__nv_bfloat16>(*weight);
}

// Statistics [T, blocks, 2]; returns the number of blocks.
inline int check_stats(const Tensor& stats, int64_t T, const Tensor& like, const char* name) {
  if (stats.dim() != 3) reject(name, "has " + std::to_string(stats.dim()) + " dims, want 3");
  check_device(stats, like, name);
  check_dtype(stats, ScalarType::Float, name);
  check_shape(stats, {T, stats.size(1), 2}, name);
  check_contiguous(stats, name);
  return int(stats.size(1));
}

inline RowStatsParams check_row_stats(const Tensor& stats, const OptionalTensor& norm_weight, double eps,
                                      const Tensor& x) {
  const int num_blocks = check_stats(stats, x.size(0), x, "stats");
  return {.stats = reinterpret_cast<const float2*>(cptr<float>(stats)),
          .norm_weight = check_norm_weight(norm_weight, x.size(1), x, "norm_weight"),
          .fp8_scale = nullptr,
          .num_blocks = num_blocks,
          .eps = float(eps)};
}

}  // namespace nf::ops
