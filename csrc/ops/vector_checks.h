// SPDX-License-Identifier: Apache-2.0
// Checks of tensors that have no rows to align: per-token and per-sequence values, and whole contiguous
// tensors.
#pragma once

#include "ops/tensor_checks.h"

namespace nf::ops {

inline void check_contiguous(const Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  int64_t want = 1;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    if (t.size(i) > 1 && t.stride(i) != want)
      reject(name, "stride of dim " + std::to_string(i) + " is " + std::to_string(t.stride(i)) + ", want " +
                       std::to_string(want));
    want *= t.size(i);
  }
}

// One value per token or sequence.
inline void check_vector(const Tensor& t, int64_t size, ScalarType dtype, const Tensor& like,
                         const char* name) {
  check_device(t, like, name);
  check_dtype(t, dtype, name);
  check_shape(t, {size}, name);
  check_contiguous(t, name);
}

}  // namespace nf::ops
