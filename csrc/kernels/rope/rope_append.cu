// SPDX-License-Identifier: Apache-2.0
// RoPE and KV append. One thread = 16 elements of one head of one token: d..d+7 and the partners D/2 further
// on. Latency bound in decode; moves (2H + 4K)*D*T elements (the v heads are read only in qkv, written only
// in the cache).
#include <climits>
#include <string>

#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/vec.cuh"
#include "kernels/quant/fp8.cuh"
#include "kernels/rope/rope_append.h"
#include "kernels/rope/rotate.cuh"

namespace nf {
namespace {

constexpr int kThreads = 128;

struct Angles {  // of 8 consecutive pairs
  float cos[8], sin[8];
};

__device__ __forceinline__ void load8(float (&to)[8], const float* from) {  // `from` is 16-byte aligned
  const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

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

// 8 elements to a cache row of e4m3 (divided by the scale) or Scalar.
template <bool kFp8, class Scalar>
__device__ __forceinline__ void store_kv(void* cache, int64_t element, const Vec<Scalar>& v,
                                         const Divisor& scale) {
  if constexpr (kFp8)
    store_fp8(static_cast<__nv_fp8_e4m3*>(cache) + element, 0, v, scale);
  else
    store_vec(static_cast<Scalar*>(cache) + element, 0, v);
}

template <class Scalar, bool kFp8>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(const RopeAppendParams<Scalar> p) {
  let_successor_start();
  wait_for_predecessor();
  const int parts = p.head_dim / 16, heads = p.num_heads + 2 * p.num_kv_heads;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = index / (heads * parts);
  if (token >= p.num_tokens) return;
  const int unit = int(index % (heads * parts));
  const int head = unit / parts, d = unit % parts * 8, half = p.head_dim / 2;

  Scalar* at = p.qkv + token * p.qkv_stride + int64_t(head) * p.head_dim + d;
  Vec<Scalar> low = load_vec(at, 0), high = load_vec(at + half, 0);
  const bool is_v = head >= p.num_heads + p.num_kv_heads;
  if (!is_v) {
    const float* row = p.cos_sin + p.positions[token] * p.cos_sin_stride + d;
    Angles angles;
    load8(angles.cos, row);
    load8(angles.sin, row + half);
    rotate_vecs(low, high, angles);
    store_vec(at, 0, low);
    store_vec(at + half, 0, high);
  }
  if (head < p.num_heads) return;  // a query

  const int64_t slot = p.slots[token];
  if (slot < 0 || slot >= p.num_pages * p.page_size) return;
  const int kv_head = (head - p.num_heads) % p.num_kv_heads;
  const int64_t page_stride = is_v ? p.v_page_stride : p.k_page_stride;
  const int64_t row = int64_t(kv_head) * p.page_size + slot % p.page_size;
  const int64_t element = slot / p.page_size * page_stride + row * p.head_dim + d;
  void* cache = is_v ? p.v_cache : p.k_cache;
  const Divisor scale = is_v ? p.v_scale : p.k_scale;
  store_kv<kFp8>(cache, element, low, scale);
  store_kv<kFp8>(cache, element + half, high, scale);
}

}  // namespace

template <class Scalar>
void rope_append(const RopeAppendParams<Scalar>& p, cudaStream_t stream) {
  NF_CHECK(p.head_dim > 0 && p.head_dim % 16 == 0, "D=" + std::to_string(p.head_dim));
  NF_CHECK(p.num_kv_heads > 0 && p.num_heads > 0, "H=" + std::to_string(p.num_heads));
  if (p.num_tokens == 0) return;
  const int64_t threads = p.num_tokens * (p.num_heads + 2 * p.num_kv_heads) * (p.head_dim / 16);
  const int64_t ctas = (threads + kThreads - 1) / kThreads;
  NF_CHECK(ctas <= INT_MAX, "T=" + std::to_string(p.num_tokens));
  const Grid grid{.ctas = dim3(unsigned(ctas)), .threads = kThreads};
  if (p.fp8_cache)
    launch<rope_append_kernel<Scalar, true>>(grid, stream, p);
  else
    launch<rope_append_kernel<Scalar, false>>(grid, stream, p);
}

template void rope_append(const RopeAppendParams<__nv_bfloat16>&, cudaStream_t);
template void rope_append(const RopeAppendParams<__half>&, cudaStream_t);

}  // namespace nf
