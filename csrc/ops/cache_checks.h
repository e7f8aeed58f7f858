// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/tensor_checks.h"

namespace nf::ops {

// k and v caches [P, K, B, D]: contiguous within a page, in the type of `activations` or in e4m3. Says
// whether it is e4m3.
inline bool check_caches(const Tensor& k_cache, const Tensor& v_cache, const Tensor& activations) {
  const bool fp8 = k_cache.scalar_type() == ScalarType::Float8_e4m3fn;
  const auto check = [&](const Tensor& t, const char* name) {
    check_device(t, activations, name);
    check_dtype(t, fp8 ? ScalarType::Float8_e4m3fn : activations.scalar_type(), name);
    check_shape(t, {k_cache.size(0), k_cache.size(1), k_cache.size(2), k_cache.size(3)}, name);
    check_rows(t, name);
    int64_t want = t.size(3);
    for (int64_t dim : {2, 1}) {
      if (t.size(dim) > 1 && t.stride(dim) != want)
        reject(name, "stride of dim " + std::to_string(dim) + " is " + std::to_string(t.stride(dim)) +
                         ", want " + std::to_string(want));
      want *= t.size(dim);
    }
  };
  check(k_cache, "k_cache");
  check(v_cache, "v_cache");
  return fp8;
}

// [positions, D] float32: cos, then sin.
inline void check_cos_sin(const Tensor& cos_sin, const Tensor& activations, int64_t D) {
  check_device(cos_sin, activations, "cos_sin");
  check_dtype(cos_sin, ScalarType::Float, "cos_sin");
  check_shape(cos_sin, {cos_sin.size(0), D}, "cos_sin");
  check_rows(cos_sin, "cos_sin");
}

}  // namespace nf::ops
