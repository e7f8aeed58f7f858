// SPDX-License-Identifier: Apache-2.0
// RMS norm and residual add + RMS norm, also with the result as e4m3. Grid (T); one CTA = one row, held in
// registers between its one read and its one write. Bandwidth bound: moves 2*T*E elements (4*T*E with a
// residual) and E weights; to e4m3 nearly as much bound by instructions, 19 an element with 4 vectors a
// thread and 23 with 2.
#include <climits>
#include <string>
#include <type_traits>

#include "kernels/common/check.h"
#include "kernels/common/dispatch.h"
#include "kernels/common/launch.h"
#include "kernels/common/vec.cuh"
#include "kernels/norm/rms_norm.h"
#include "kernels/norm/row_stats.cuh"

namespace nf {
namespace {

template <class Scalar_, class Out_, int kVecs_, bool kAdd_, bool kScalesRows_>
struct Config {
  using Scalar = Scalar_;
  using Out = Out_;
  static constexpr int kVecs = kVecs_;  // of a row, per thread
  static constexpr bool kAdd = kAdd_;   // is there a residual?
  static constexpr bool kFp8 = std::is_same_v<Out, __nv_fp8_e4m3>;
  static constexpr bool kScalesRows = kScalesRows_;  // does each row of an e4m3 result get its own scale?
  using Stats = std::conditional_t<kScalesRows, float2, float>;
  static constexpr int kMaxThreads = kVecs < 4 ? 512 : 1024;
  static constexpr int kMinCtas = 1024 / kMaxThreads;  // at most 64 registers a thread
};

// Of the row, a thread's i-th vector.
__device__ __forceinline__ int vec_idx(int i) { return i * int(blockDim.x) + int(threadIdx.x); }

// residual + x, rounded: what the residual will be.
template <class Scalar>
__device__ __forceinline__ Vec<Scalar> add(const Vec<Scalar>& residual, const Vec<Scalar>& x) {
  Vec<Scalar> sum;
#pragma unroll
  for (int i = 0; i < Vec<Scalar>::kPairs; ++i) {
    const float2 a = residual.pair(i), b = x.pair(i);
    sum.round_pair(i, {a.x + b.x, a.y + b.y});
  }
  return sum;
}

template <class C>
using Row = Vec<typename C::Scalar>[C::kVecs];  // a thread's part

template <class C>
__device__ __forceinline__ void load_row(Row<C>& to, const typename C::Scalar* from, int num_vecs) {
#pragma unroll
  for (int i = 0; i < C::kVecs; ++i)
    to[i] = vec_idx(i) < num_vecs ? load_vec(from, vec_idx(i)) : Vec<typename C::Scalar>{};
}

// r_row += the row of the residual, which gets the sum, too.
template <class C>
__device__ __forceinline__ void add_to_residual(Row<C>& r_row, typename C::Scalar* residual, int num_vecs) {
  Row<C> r_residual;  // loaded before the first store, which might alias it
  load_row<C>(r_residual, residual, num_vecs);
#pragma unroll
  for (int i = 0; i < C::kVecs; ++i) {
    if (vec_idx(i) >= num_vecs) continue;
    r_row[i] = add(r_residual[i], r_row[i]);
    store_vec(residual, vec_idx(i), r_row[i]);
  }
}

// The statistics of the CTA's row, added as row_stats.h has it.
template <class C>
__device__ __forceinline__ typename C::Stats row_stats(Row<C>& r_row, const Row<C>& r_weight, int num_vecs) {
  using Stats = typename C::Stats;
  __shared__ alignas(16) Stats s_strips[C::kMaxThreads * C::kVecs / kStripLanes];
#pragma unroll
  for (int i = 0; i < C::kVecs; ++i) {
    r_row[i].keep_packed();
    const Stats strip = strip_stats<Stats>(r_row[i], r_weight[i]);
    if (vec_idx(i) % kStripLanes == 0) s_strips[vec_idx(i) / kStripLanes] = strip;
  }
  __syncthreads();  // s_strips are complete
  return merge_blocks<2>((num_vecs + kBlockLanes - 1) / kBlockLanes, [&](int i) {
    return block_stats<Stats>([&](int strip) { return s_strips[i * kBlockStrips + strip]; });
  });
}

template <class C>
__global__ void __launch_bounds__(C::kMaxThreads, C::kMinCtas)
    rms_norm_kernel(const RmsNormParams<typename C::Scalar, typename C::Out> p) {
  const int num_vecs = p.dim / Vec<typename C::Scalar>::kElements;
  let_successor_start();
  // The weight depends on no kernel of the step: it is loaded while the predecessor still runs, where
  // registers allow.
  Row<C> r_weight, r_row;
  if constexpr (C::kVecs < 4) load_row<C>(r_weight, p.weight, num_vecs);
  wait_for_predecessor();

  const int64_t row = blockIdx.x;
  load_row<C>(r_row, p.x + row * p.x_stride, num_vecs);
  float scale = 0.0f;
  if (C::kFp8 && !C::kScalesRows) scale = *p.scale;
  if constexpr (C::kAdd) add_to_residual<C>(r_row, p.residual + row * p.residual_stride, num_vecs);
  if constexpr (C::kVecs == 4) load_row<C>(r_weight, p.weight, num_vecs);
  const auto stats = row_stats<C>(r_row, r_weight, num_vecs);
  float inv_rms;
  if constexpr (C::kScalesRows) {
    inv_rms = inv_rms_of(stats.x, p.dim, p.eps);
    scale = own_fp8_scale(stats.y, inv_rms);
    if (threadIdx.x == 0) p.scale[row] = scale;
  } else {
    inv_rms = inv_rms_of(stats, p.dim, p.eps);
  }
  const Divisor divisor = scale;

  typename C::Out* out = p.out + row * p.out_stride;
#pragma unroll
  for (int i = 0; i < C::kVecs; ++i) {
    if (vec_idx(i) >= num_vecs) continue;
    r_row[i].keep_packed();
    r_row[i] = normalize(r_row[i], inv_rms, r_weight[i]);
    if constexpr (C::kFp8)
      store_fp8(out, vec_idx(i), r_row[i], divisor);
    else
      store_vec(out, vec_idx(i), r_row[i]);
  }
}

// Are rows whole vectors of 8 elements?
template <class T>
bool rows_are_aligned(const T* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % (8 * sizeof(T)) == 0 && stride % 8 == 0;
}

template <bool kAdd, class Scalar, class Out>
void check_and_launch(const RmsNormParams<Scalar, Out>& p, const NormConfig& config, cudaStream_t stream) {
  NF_CHECK(p.dim > 0 && p.dim % Vec<Scalar>::kElements == 0, "E=" + std::to_string(p.dim));
  NF_CHECK(config.threads % kWarpSize == 0, to_string(config));
  NF_CHECK(int64_t(config.threads) * config.vecs_per_thread * Vec<Scalar>::kElements >= p.dim,
           to_string(config) + " for E=" + std::to_string(p.dim));
  NF_CHECK(p.num_tokens >= 0 && p.num_tokens <= INT_MAX, "T=" + std::to_string(p.num_tokens));
  if (p.num_tokens == 0) return;
  NF_CHECK(rows_are_aligned(p.out, p.out_stride), "stride " + std::to_string(p.out_stride));
  NF_CHECK(rows_are_aligned(p.x, p.x_stride), "stride " + std::to_string(p.x_stride));
  NF_CHECK(rows_are_aligned(p.weight, 0), "an address that is no multiple of 16");
  NF_CHECK((p.residual != nullptr) == kAdd, p.residual ? "a residual" : "no residual");
  NF_CHECK(rows_are_aligned(p.residual, p.residual_stride), "stride " + std::to_string(p.residual_stride));
  NF_CHECK((p.scale != nullptr) == (sizeof(Out) == 1), p.scale ? "a scale" : "no scale");

  dispatch<1, 2, 4>("vecs_per_thread", config.vecs_per_thread, [&](auto vecs) {
    const auto run = [&]<class C>(C) {
      NF_CHECK(config.threads <= C::kMaxThreads, to_string(config));
      launch<rms_norm_kernel<C>>({.ctas = dim3(unsigned(p.num_tokens)), .threads = config.threads}, stream,
                                 p);
    };
    if constexpr (sizeof(Out) == 1)
      if (p.scale_per_token) return run(Config<Scalar, Out, vecs, kAdd, true>{});
    run(Config<Scalar, Out, vecs, kAdd, false>{});
  });
}

}  // namespace

template <class Scalar, class Out>
void rms_norm(const RmsNormParams<Scalar, Out>& p, const NormConfig& config, cudaStream_t stream) {
  check_and_launch<false>(p, config, stream);
}

template <class Scalar, class Out>
void add_rms_norm(const RmsNormParams<Scalar, Out>& p, const NormConfig& config, cudaStream_t stream) {
  check_and_launch<true>(p, config, stream);
}

#define NF_NORMS(Scalar, Out)                                                                 \
  template void rms_norm(const RmsNormParams<Scalar, Out>&, const NormConfig&, cudaStream_t); \
  template void add_rms_norm(const RmsNormParams<Scalar, Out>&, const NormConfig&, cudaStream_t);
NF_NORMS(__nv_bfloat16, __nv_bfloat16)
NF_NORMS(__nv_bfloat16, __nv_fp8_e4m3)
NF_NORMS(__half, __half)
NF_NORMS(__half, __nv_fp8_e4m3)
#undef NF_NORMS

}  // namespace nf
