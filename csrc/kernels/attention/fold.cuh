// SPDX-License-Identifier: Apache-2.0
// The result of some keys, softmax(scores) * values before the division, spread over the CTA's threads: how
// two of them become one, and how one gets from the warps to the threads, onto the stack, to another CTA.
// Thread i has row i / 16 of every 8, and of each 64 elements of D four, from i % 16 * 4 on: what it stores
// it alone reads again, so that nothing here waits for another thread but the meeting of the warps.
#pragma once

#include "kernels/attention/kernel.cuh"
#include "kernels/ptx/l2_policy.cuh"

namespace nf::attn {

template <class C>
struct State {
  float4 o[C::kTilesN][C::kParts];
  float m[C::kTilesN], l[C::kTilesN];
};

__device__ __forceinline__ float4 scaled(float4 v, float a) {
  return {__fmul_rn(v.x, a), __fmul_rn(v.y, a), __fmul_rn(v.z, a), __fmul_rn(v.w, a)};
}
__device__ __forceinline__ float4 scaled_plus(float4 v, float a, float4 sum) {
  return {__fmaf_rn(v.x, a, sum.x), __fmaf_rn(v.y, a, sum.y), __fmaf_rn(v.z, a, sum.z),
          __fmaf_rn(v.w, a, sum.w)};
}

// left += right. Written with explicit roundings: the same bits wherever the compiler inlines it.
template <class C>
__device__ __forceinline__ void merge(State<C>& left, const State<C>& right) {
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    const float m = fmaxf(left.m[n], right.m[n]);
    const float a = weight_of(left.m[n], m), b = weight_of(right.m[n], m);
    left.m[n] = m;
    left.l[n] = __fmaf_rn(left.l[n], a, __fmul_rn(right.l[n], b));
#pragma unroll
    for (int i = 0; i < C::kParts; ++i) left.o[n][i] = scaled_plus(left.o[n][i], a, scaled(right.o[n][i], b));
  }
}

// Where the warps meet at a leaf's end. Each puts its o into slots of its own ring, 8 rows of D floats each,
// and says which.
template <class C>
struct MeetingSmem {
  alignas(16) float2 ml[C::kWarps][C::kColumns];
  uint32_t slot[C::kWarps][C::kTilesN];  // shared addresses
};

// (With __cvta_shared_to_generic instead, nvcc 13.0 does not come to an end.)
__device__ __forceinline__ float* at_shared(uint32_t address) {
  extern __shared__ __align__(128) uint8_t smem[];
  return reinterpret_cast<float*>(smem + (address - uint32_t(__cvta_generic_to_shared(smem))));
}

// Float `d` of row r of 8 is at d ^ swizzle(r): then neither the fragments nor the rows meet in a bank.
__device__ __forceinline__ int swizzle(int row) { return (row >> 1 & 3) << 3; }

template <class C>
__device__ __forceinline__ void put_fragments(MeetingSmem<C>& s, const uint32_t (&slot)[C::kTilesN],
                                              const Fragments<C>& f) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, q = lane % 4;
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    float* to = at_shared(slot[n]);
#pragma unroll
    for (int t = 0; t < C::kTilesM; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 2 * q + i;
        const float first = f.o[t][n][i], second = f.o[t][n][2 + i];
        if constexpr (C::kFp8) {  // neighbours in d
          *reinterpret_cast<float2*>(to + row * C::kHeadDim + ((t * 16 + 2 * g) ^ swizzle(row))) = {first,
                                                                                                    second};
        } else {
          to[row * C::kHeadDim + ((t * 16 + g) ^ swizzle(row))] = first;
          to[row * C::kHeadDim + ((t * 16 + 8 + g) ^ swizzle(row))] = second;
        }
      }
    }
    if (g == 0)
      *reinterpret_cast<float4*>(&s.ml[warp][n * 8 + 2 * q]) = {f.m[n][0], f.l[n][0], f.m[n][1], f.l[n][1]};
    if (lane == 0) s.slot[warp][n] = slot[n];
  }
}

// The sum of what the warps have put: all, or only the first half of them.
template <class C>
__device__ __forceinline__ void take_sum(const MeetingSmem<C>& s, bool all, State<C>& sum) {
  const int row = threadIdx.x / 16, d = threadIdx.x % 16 * 4;
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    float2 ml[C::kWarps];
    float m = -INFINITY;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      ml[w] = all || w < C::kWarps / 2 ? s.ml[w][n * 8 + row] : float2{-INFINITY, 0.0f};
      m = fmaxf(m, ml[w].x);
    }
    sum.m[n] = m, sum.l[n] = 0.0f;
#pragma unroll
    for (float4& o : sum.o[n]) o = {0.0f, 0.0f, 0.0f, 0.0f};
    const auto add = [&](int w) {
      const float a = weight_of(ml[w].x, m);
      const float* from = at_shared(s.slot[w][n]) + row * C::kHeadDim;
      sum.l[n] = __fmaf_rn(ml[w].y, a, sum.l[n]);
#pragma unroll
      for (int i = 0; i < C::kParts; ++i) {
        const float4 v = *reinterpret_cast<const float4*>(from + ((i * 64 + d) ^ swizzle(row)));
        sum.o[n][i] = scaled_plus(v, a, sum.o[n][i]);
      }
    };
#pragma unroll
    for (int w = 0; w < C::kWarps / 2; ++w) add(w);
    if (!all) continue;
#pragma unroll
    for (int w = C::kWarps / 2; w < C::kWarps; ++w) add(w);
  }
}

// Subtrees that wait for their right sibling, one a level.
template <class C>
struct StackSmem {
  alignas(16) float4 o[kLevels][C::kTilesN][C::kParts][C::kThreads];
  alignas(16) float2 ml[kLevels][C::kColumns];
};

template <class C>
struct Stack {
  StackSmem<C>& s;
  uint32_t pending = 0;  // levels in use

  __device__ __forceinline__ void put(int level, const State<C>& state) {
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < C::kParts; ++i) s.o[level][n][i][threadIdx.x] = state.o[n][i];
      if (threadIdx.x % 16 == 0) s.ml[level][n * 8 + threadIdx.x / 16] = {state.m[n], state.l[n]};
    }
    __syncwarp();  // a row's m and l are of 16 threads of a warp
    pending |= 1u << level;
  }
  __device__ __forceinline__ void take(int level, State<C>& state) {
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < C::kParts; ++i) state.o[n][i] = s.o[level][n][i][threadIdx.x];
      const float2 ml = s.ml[level][n * 8 + threadIdx.x / 16];
      state.m[n] = ml.x, state.l[n] = ml.y;
    }
    __syncwarp();  // read before the level is put again
    pending &= ~(1u << level);
  }
  // state = what waits at levels [begin, end) + state
  __device__ __forceinline__ void merge_left(int begin, int end, State<C>& state) {
#pragma unroll 1
    for (int level = begin; level < end; ++level) {
      if (!(pending >> level & 1)) continue;
      State<C> left;
      take(level, left);
      merge<C>(left, state);
      state = left;
    }
  }
};

// A state on its way to another CTA. Every thread finds what its namesake stored, and word by word sees
// whether it is there: no fence and no counter, which would be three trips to L2 where nothing hides them.
// (Generic addresses: what a CTA keeps for itself lies in shared memory.)
constexpr uint32_t kAbsent = 0xffffffffu;  // a NaN that no arithmetic makes

__device__ __forceinline__ void store_relaxed(uint4* to, uint4 v) {
  asm volatile("st.relaxed.gpu.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint4 load_relaxed(const uint4* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

// The same in global memory, kept in L2: the few MB that CTAs leave each other would not outlast the pages
// that are read meanwhile. (An H100: steps of 64 to 256 sequences take 0.2 ms less so.)
__device__ __forceinline__ void store_kept(uint4* to, uint4 v) {
  asm volatile("st.relaxed.gpu.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w), "l"(ptx::evict_last_policy())
               : "memory");
}
__device__ __forceinline__ uint4 load_kept(const uint4* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from), "l"(ptx::evict_last_policy())
               : "memory");
  return v;
}

// A thread's share of a state, as it travels: the o, then m and l of the first and of the last n.
template <class C>
struct Parcel {
  static constexpr int kWords = C::kTilesN * C::kParts + 1;
  uint4 word[kWords];

  Parcel() = default;
  __device__ __forceinline__ explicit Parcel(const State<C>& state) {
    const auto present = [](float f) { return min(__float_as_uint(f), kAbsent - 1); };  // or another NaN
    const auto bits = [&](float4 v) { return uint4{present(v.x), present(v.y), present(v.z), present(v.w)}; };
#pragma unroll
    for (int i = 0; i < kWords - 1; ++i) word[i] = bits(state.o[i / C::kParts][i % C::kParts]);
    constexpr int kLast = C::kTilesN - 1;
    word[kWords - 1] = bits({state.m[0], state.l[0], state.m[kLast], state.l[kLast]});
  }
  __device__ __forceinline__ void open(State<C>& state) const {
    const auto floats = [](uint4 v) {
      return float4{__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
    };
#pragma unroll
    for (int i = 0; i < kWords - 1; ++i) state.o[i / C::kParts][i % C::kParts] = floats(word[i]);
    const float4 ml = floats(word[kWords - 1]);
    state.m[C::kTilesN - 1] = ml.z, state.l[C::kTilesN - 1] = ml.w;
    state.m[0] = ml.x, state.l[0] = ml.y;
  }
  __device__ __forceinline__ bool is_complete() const {
    bool absent = false;
#pragma unroll
    for (const uint4& v : word)
      absent |= v.x == kAbsent || v.y == kAbsent || v.z == kAbsent || v.w == kAbsent;
    return !absent;
  }

  // To and from the thread's words of a Partial. kKept: which is in global memory, and kept in L2.
  template <bool kKept>
  __device__ __forceinline__ void store(uint4* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) store_word<kKept>(to + i * C::kThreads, word[i]);
  }
  template <bool kKept>
  __device__ __forceinline__ void load(const uint4* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      word[i] = kKept ? load_kept(from + i * C::kThreads) : load_relaxed(from + i * C::kThreads);
  }
  template <bool kKept>
  static __device__ __forceinline__ void clear(uint4* to) {  // for the next launch
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      store_word<kKept>(to + i * C::kThreads, {kAbsent, kAbsent, kAbsent, kAbsent});
  }

 private:
  template <bool kKept>
  static __device__ __forceinline__ void store_word(uint4* to, uint4 v) {
    if constexpr (kKept)
      store_kept(to, v);
    else
      store_relaxed(to, v);
  }
};

template <class C>
struct Partial {
  uint4 word[Parcel<C>::kWords][C::kThreads];

  __device__ __forceinline__ uint4* of_thread() { return &word[0][threadIdx.x]; }
};

}  // namespace nf::attn
