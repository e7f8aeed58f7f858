// SPDX-License-Identifier: Apache-2.0
// The arithmetic of RoPE: written once, because rope_append and decode_attention must agree to the bit.
#pragma once

#include <vector_types.h>

namespace nf {

// Two neighbours of the lower half of a head and their partners D/2 further on.
struct HalfPairs {
  float2 low, high;
};

// Each product and sum rounded on its own, as in the reference: no FMA, whatever surrounds it.
__device__ __forceinline__ HalfPairs rotate(HalfPairs v, float2 cos, float2 sin) {
  const auto low = [](float l, float h, float c, float s) {
    return __fsub_rn(__fmul_rn(l, c), __fmul_rn(h, s));
  };
  const auto high = [](float l, float h, float c, float s) {
    return __fadd_rn(__fmul_rn(h, c), __fmul_rn(l, s));
  };
  return {{low(v.low.x, v.high.x, cos.x, sin.x), low(v.low.y, v.high.y, cos.y, sin.y)},
          {high(v.low.x, v.high.x, cos.x, sin.x), high(v.low.y, v.high.y, cos.y, sin.y)}};
}

}  // namespace nf
