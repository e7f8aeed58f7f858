// SPDX-License-Identifier: Apache-2.0
// What test_prefill_attention.cu compares with.
#pragma once

#include <cuda_fp8.h>

#include "kernels/attention/prefill.h"

namespace {

constexpr int kPage = 64;

// A CTA per query and head. want = the result, magnitude = the same with |values|, squares = the root of the
// sum of the squared addends. With products of e4m3 the query is rounded, and no weight counts as less than
// 2^-14 of the largest there: below, its rounding does not shrink with it.
template <class Cached, class T>
__global__ void reference(double* want, double* magnitude, double* squares,
                          const nf::PrefillAttentionParams<T> p) {
  extern __shared__ double s_weights[];
  __shared__ double s_sum;
  __shared__ float s_scale;
  const int H = p.num_kv_heads * p.group, D = p.head_dim;
  const int token = blockIdx.x / H, head = blockIdx.x % H, kv_head = head / p.group;
  int seq = 0;
  while (p.q_start[seq + 1] <= token) ++seq;
  const int keys = int(p.kv_len[seq] - (p.q_start[seq + 1] - token) + 1);
  const auto row = [&](const void* cache, int64_t page_stride, int key) {
    return static_cast<const Cached*>(cache) +
           p.page_table[seq * p.page_table_stride + key / kPage] * page_stride +
           (kv_head * kPage + key % kPage) * D;
  };
  const T* q = p.q + token * p.q_stride + head * D;
  if (threadIdx.x == 0) {
    float largest = 0;
    for (int d = 0; d < D; ++d) largest = fmaxf(largest, fabsf(float(q[d])));
    s_scale = fmaxf(largest / 448.0f, 1e-12f);
  }
  __syncthreads();
  const auto query = [&](int d) {
    return p.fp8_products ? double(float(__nv_fp8_e4m3(float(q[d]) / s_scale))) * double(s_scale)
                          : double(float(q[d]));
  };
  for (int key = threadIdx.x; key < keys; key += blockDim.x) {
    double score = 0;
    for (int d = 0; d < D; ++d) score += query(d) * double(float(row(p.k_cache, p.k_page_stride, key)[d]));
    s_weights[key] = score * p.softmax_scale * p.k_scale;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double largest = -INFINITY, sum = 0;
    for (int key = 0; key < keys; ++key) largest = fmax(largest, s_weights[key]);
    for (int key = 0; key < keys; ++key) sum += s_weights[key] = exp(s_weights[key] - largest);
    s_sum = sum;
  }
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += blockDim.x) {
    double result = 0, absolute = 0, squared = 0;
    for (int key = 0; key < keys; ++key) {
      const double value = double(float(row(p.v_cache, p.v_page_stride, key)[d]));
      const double v = fmax(s_weights[key], p.fp8_products ? 0x1p-14 : 0.0) * value;
      result += s_weights[key] * value, absolute += fabs(v), squared += v * v;
    }
    const int64_t at = int64_t(blockIdx.x) * D + d;
    want[at] = result / s_sum * p.v_scale;
    magnitude[at] = absolute / s_sum * p.v_scale;
    squares[at] = sqrt(squared) / s_sum * p.v_scale;
  }
}

}  // namespace
