// SPDX-License-Identifier: Apache-2.0
// RoPE and KV append. One thread = 16 elements of one head of one token: d..d+7 and the partners D/2 further
// on; those of k and v come first. Latency bound in decode; moves 4*K*D*T elements and 2*H*D of each token
// whose q is rotated.
#include <cstdint>
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
  const auto units = [&p](int heads) { return uint32_t(heads * p.head_dim / 16); };  // of a token
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t num_kv_units = uint32_t(p.num_tokens) * units(2 * p.num_kv_heads);
  const bool is_q = index >= num_kv_units;
  const uint32_t units_of_token = units(is_q ? p.num_heads : 2 * p.num_kv_heads);
  const uint32_t at = is_q ? index - num_kv_units : index, token = at / units_of_token;
  if (is_q && token >= p.num_rotated) return;
  const int parts = int(units(1)), unit = int(at % units_of_token);
  const int head = unit / parts, d = unit % parts * 8, half = p.head_dim / 2;  // head: of q, or of k and v

  Scalar* from = p.qkv + token * p.qkv_stride + (is_q ? head : p.num_heads + head) * p.head_dim + d;
  Vec<Scalar> low = load_vec(from, 0), high = load_vec(from + half, 0);
  const bool is_v = !is_q && head >= p.num_kv_heads;
  if (!is_v) rotate_vecs(low, high, load_angles(p.cos_sin + p.positions[token] * p.cos_sin_stride + d, half));
  if (is_q) {
    store_vec(from, 0, low);
    store_vec(from + half, 0, high);
    return;
  }

  const int64_t slot = p.slots[token];
  if (slot < 0 || slot >= p.num_pages * p.page_size) return;
  const int64_t page_stride = is_v ? p.v_page_stride : p.k_page_stride;
  const int64_t row = int64_t(is_v ? head - p.num_kv_heads : head) * p.page_size + slot % p.page_size;
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
  NF_CHECK(p.num_rotated >= 0 && p.num_rotated <= p.num_tokens,
           std::to_string(p.num_rotated) + " rotated of T=" + std::to_string(p.num_tokens));
  if (p.num_tokens == 0) return;
  const int64_t parts = p.head_dim / 16;
  const int64_t threads = (p.num_tokens * 2 * p.num_kv_heads + p.num_rotated * p.num_heads) * parts;
  NF_CHECK(threads <= INT32_MAX, "T=" + std::to_string(p.num_tokens));
  const Grid grid{.ctas = dim3(unsigned((threads + kThreads - 1) / kThreads)), .threads = kThreads};
  if (p.fp8_cache)
    launch<rope_append_kernel<Scalar, true>>(grid, stream, p);
  else
    launch<rope_append_kernel<Scalar, false>>(grid, stream, p);
}

template void rope_append(const RopeAppendParams<__nv_bfloat16>&, cudaStream_t);
template void rope_append(const RopeAppendParams<__half>&, cudaStream_t);

}  // namespace nf
