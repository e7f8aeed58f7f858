// SPDX-License-Identifier: Apache-2.0
// The arithmetic of RoPE: written once, because rope_append and both attentions must agree to the bit.
#pragma once

#include "kernels/common/vec.cuh"

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

struct Angles {  // of 8 consecutive pairs
  float cos[8], sin[8];
};

// From their place in a row of cos_sin: cos, then sin `half` further on.
__device__ __forceinline__ Angles load_angles(const float* from, int half) {
  Angles angles;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 cos = __ldg(reinterpret_cast<const float4*>(from) + i);
    const float4 sin = __ldg(reinterpret_cast<const float4*>(from + half) + i);
    float *c = &angles.cos[4 * i], *s = &angles.sin[4 * i];
    c[0] = cos.x, c[1] = cos.y, c[2] = cos.z, c[3] = cos.w;
    s[0] = sin.x, s[1] = sin.y, s[2] = sin.z, s[3] = sin.w;
  }
  return angles;
}

// 8 elements of the lower half of a head and their partners.
template <class Scalar>
__device__ __forceinline__ void rotate_vecs(Vec<Scalar>& low, Vec<Scalar>& high, const Angles& a) {
#pragma unroll
  for (int i = 0; i < Vec<Scalar>::kPairs; ++i) {
    const HalfPairs v = rotate({low.pair(i), high.pair(i)}, {a.cos[2 * i], a.cos[2 * i + 1]},
                               {a.sin[2 * i], a.sin[2 * i + 1]});
    low.round_pair(i, v.low);
    high.round_pair(i, v.high);
  }
}

}  // namespace nf
