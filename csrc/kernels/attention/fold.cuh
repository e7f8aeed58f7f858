// SPDX-License-Identifier: Apache-2.0
// The result of some keys, softmax(scores) * values before the division, and how two of them become one.
// Spread over the CTA's threads as the fragments of the product are (kernel.cuh).
#pragma once

#include "host/attention_schedule.h"
#include "kernels/common/device.cuh"

namespace nf::attn {

template <class C>
struct State {
  float o[C::kTilesM][C::kTilesN][4];
  float m[C::kTilesN][2];  // largest score, in units of log 2; of columns 2q and 2q+1
  float l[C::kTilesN][2];  // sum of the weights

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) m[n][i] = -INFINITY, l[n][i] = 0.0f;
#pragma unroll
      for (int t = 0; t < C::kTilesM; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[t][n][e] = 0.0f;
      }
    }
  }
};

// exp2(m - reference), 0 for a state without keys.
__device__ __forceinline__ float weight_of(float m, float reference) {
  return exp2f(m - (reference == -INFINITY ? 0.0f : reference));
}

// right = left + right. Written with explicit roundings: the same bits wherever the compiler inlines it.
template <class C>
__device__ __forceinline__ void merge(const State<C>& left, State<C>& right) {
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    float a[2], b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float m = fmaxf(left.m[n][i], right.m[n][i]);
      a[i] = weight_of(left.m[n][i], m), b[i] = weight_of(right.m[n][i], m);
      right.m[n][i] = m;
      right.l[n][i] = __fmaf_rn(left.l[n][i], a[i], __fmul_rn(right.l[n][i], b[i]));
    }
#pragma unroll
    for (int t = 0; t < C::kTilesM; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        right.o[t][n][e] = __fmaf_rn(left.o[t][n][e], a[e & 1], __fmul_rn(right.o[t][n][e], b[e & 1]));
    }
  }
}

template <class C>
__device__ __forceinline__ void merge_into_left(State<C>& left, State<C> right) {
  merge<C>(left, right);
  left = right;
}

// A state in memory: every thread's o, then m and l of all columns. In global memory one copy of the latter
// is enough; on the stack in shared memory each warp keeps its own, so that no barrier is needed.
template <class C>
__device__ __forceinline__ void store_state(float* o, float* ml, bool writes_ml, const State<C>& s) {
  const int lane = threadIdx.x % kWarpSize, q = lane % 4;
#pragma unroll
  for (int t = 0; t < C::kTilesM; ++t) {
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        o[((t * C::kTilesN + n) * 4 + e) * C::kThreads + threadIdx.x] = s.o[t][n][e];
    }
  }
  if (!writes_ml || lane >= 4) return;
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n)
    reinterpret_cast<float4*>(ml)[n * 4 + q] = {s.m[n][0], s.l[n][0], s.m[n][1], s.l[n][1]};
}

// With kGlobal past L1, which may not know of another SM's stores.
template <bool kGlobal, class C>
__device__ __forceinline__ void load_state(const float* o, const float* ml, State<C>& s) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int t = 0; t < C::kTilesM; ++t) {
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float* from = o + ((t * C::kTilesN + n) * 4 + e) * C::kThreads + threadIdx.x;
        s.o[t][n][e] = kGlobal ? __ldcg(from) : *from;
      }
    }
  }
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    const float4* from = reinterpret_cast<const float4*>(ml) + n * 4 + q;
    const float4 v = kGlobal ? __ldcg(from) : *from;
    s.m[n][0] = v.x, s.l[n][0] = v.y, s.m[n][1] = v.z, s.l[n][1] = v.w;
  }
}

// Subtrees that wait for their right sibling, one a level; the last is the groups so far.
template <class C>
struct StackSmem {
  alignas(16) float o[kGroupLevel + 1][C::kStateFloats * C::kThreads];
  alignas(16) float ml[kGroupLevel + 1][C::kWarps][C::kColumns * 2];
};

template <class C>
struct Stack {
  StackSmem<C>& s;
  uint32_t pending;  // levels in use

  __device__ __forceinline__ void put(int level, const State<C>& state) {
    store_state<C>(s.o[level], s.ml[level][threadIdx.x / kWarpSize], true, state);
    __syncwarp();  // m and l are the warp's
    pending |= 1u << level;
  }
  __device__ __forceinline__ void take(int level, State<C>& state) {
    load_state<false, C>(s.o[level], s.ml[level][threadIdx.x / kWarpSize], state);
    __syncwarp();  // read before the level is put again
    pending &= ~(1u << level);
  }
  // state = what waits at `level` + state
  __device__ __forceinline__ void merge_left(int level, State<C>& state) {
    State<C> left;
    take(level, left);
    merge<C>(left, state);
  }
  __device__ __forceinline__ void merge_all(State<C>& state) {
    for (int level = 0; level <= kGroupLevel; ++level)
      if (pending >> level & 1) merge_left(level, state);
  }
};

}  // namespace nf::attn
