// SPDX-License-Identifier: Apache-2.0
// 16-byte vectors of a 2-byte type, and their conversion to float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace nf {

// Two bf16 in a word: one instruction each, where nvcc 13.0 makes two of __bfloat1622float2() for the upper.
__device__ __forceinline__ float2 widen_bf16(uint32_t bits) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}
__device__ __forceinline__ float2 widen_bf16(__nv_bfloat162 v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof(bits));
  return widen_bf16(bits);
}

template <class T>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ float2 widen(Type v) { return widen_bf16(v); }
  static __device__ __forceinline__ Type round(float2 v) { return __float22bfloat162_rn(v); }
};
template <>
struct PairOf<__half> {
  using Type = __half2;
  static __device__ __forceinline__ float2 widen(Type v) { return __half22float2(v); }
  static __device__ __forceinline__ Type round(float2 v) { return __float22half2_rn(v); }
};

// v, rounded to T and widened again: what a reader of a stored T would see.
template <class T>
__device__ __forceinline__ float2 round_through(float2 v) {
  return PairOf<T>::widen(PairOf<T>::round(v));
}

// Kept as words, not as an array of T: nvcc 13.0 splits the copy of such an array into 4-byte loads.
template <class T>
struct alignas(16) Vec {
  static constexpr int kPairs = 4;
  static constexpr int kElements = 2 * kPairs;
  uint32_t word[kPairs];

  __device__ __forceinline__ float2 pair(int i) const {
    typename PairOf<T>::Type v;
    memcpy(&v, &word[i], sizeof(v));
    return PairOf<T>::widen(v);
  }
  __device__ __forceinline__ void round_pair(int i, float2 v) {
    const typename PairOf<T>::Type rounded = PairOf<T>::round(v);
    memcpy(&word[i], &rounded, sizeof(rounded));
  }
  // Hides the value from the compiler, which else keeps earlier pair()s, twice the registers, to save a
  // widening here.
  __device__ __forceinline__ void keep_packed() {
    asm volatile("" : "+r"(word[0]), "+r"(word[1]), "+r"(word[2]), "+r"(word[3]));
  }
};

// `row` is 16-byte aligned; one instruction each.
template <class T>
__device__ __forceinline__ Vec<T> load_vec(const T* row, int vec_idx) {
  const uint4 v = reinterpret_cast<const uint4*>(row)[vec_idx];
  return {v.x, v.y, v.z, v.w};
}
template <class T>
__device__ __forceinline__ void store_vec(T* row, int vec_idx, const Vec<T>& v) {
  reinterpret_cast<uint4*>(row)[vec_idx] = uint4{v.word[0], v.word[1], v.word[2], v.word[3]};
}

}  // namespace nf
