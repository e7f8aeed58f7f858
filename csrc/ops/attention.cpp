// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention/attention.h"

#include <climits>
#include <map>
#include <mutex>

#include "kernels/attention/prefill.h"
#include "kernels/common/check.h"
#include "ops/cache_checks.h"
#include "ops/register.h"
#include "ops/vector_checks.h"

namespace nf::ops {
namespace {

// One workspace a device, for all calls: taken at the first one, never given back (29 MB on a GPU of 132
// SMs). So the addresses in a captured graph stay valid, and nothing is allocated in a capture, unless the
// first call of the process is itself captured: that is refused. Calls that may overlap must not use it at
// once: they belong on one stream.
AttentionWorkspace workspace_of(int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<int, AttentionWorkspace> workspaces;
  const std::lock_guard lock(mutex);
  if (const auto found = workspaces.find(device); found != workspaces.end()) return found->second;

  cudaStreamCaptureStatus capture;
  NF_CUDA(cudaStreamIsCapturing(stream, &capture));
  if (capture != cudaStreamCaptureStatusNone)
    throw Error(
        "attention: call it once outside of a CUDA graph before the first capture: that takes its workspace");
  void *partials, *counters;
  const size_t counter_bytes = size_t(attention_counters()) * sizeof(int);
  NF_CUDA(cudaMalloc(&partials, size_t(attention_partial_floats()) * sizeof(float)));
  NF_CUDA(cudaMalloc(&counters, counter_bytes));
  NF_CUDA(cudaMemset(counters, 0, counter_bytes));
  NF_CUDA(cudaDeviceSynchronize());  // zero before any stream counts
  return workspaces[device] = {static_cast<float*>(partials), static_cast<int*>(counters)};
}

// [T, H, D]: the heads of a token one after another.
void check_heads(const Tensor& t, const char* name) {
  check_rows(t, name);
  if (t.size(1) > 1 && t.stride(1) != t.size(2))
    reject(name, "stride of dim 1 is " + std::to_string(t.stride(1)) + ", want " + std::to_string(t.size(2)));
}

void attention(Tensor out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor q_start,
               Tensor kv_len, double softmax_scale, double k_scale, double v_scale) {
  if (q.dim() != 3) reject("q", "has " + std::to_string(q.dim()) + " dims, want 3");
  if (k_cache.dim() != 4) reject("k_cache", "has " + std::to_string(k_cache.dim()) + " dims, want 4");
  const int64_t T = q.size(0), H = q.size(1), D = q.size(2), K = k_cache.size(1), S = kv_len.size(0);
  constexpr int64_t kPageSize = 64;

  check_heads(q, "q");
  check_device(out, q, "out");
  check_dtype(out, q.scalar_type(), "out");
  check_shape(out, {T, H, D}, "out");
  check_heads(out, "out");
  const bool fp8 = check_caches(k_cache, v_cache, q);
  check_shape(k_cache, {k_cache.size(0), K, kPageSize, D}, "k_cache");
  if (K == 0 || H % K != 0)
    reject("q", std::to_string(H) + " heads, want a multiple of K=" + std::to_string(K));
  check_device(page_table, q, "page_table");
  check_dtype(page_table, ScalarType::Long, "page_table");
  check_shape(page_table, {S, page_table.size(1)}, "page_table");
  if (page_table.size(1) > 1 && page_table.stride(1) != 1)
    reject("page_table", "stride of the last dim is " + std::to_string(page_table.stride(1)) + ", want 1");
  check_vector(q_start, S + 1, ScalarType::Long, q, "q_start");
  check_vector(kv_len, S, ScalarType::Long, q, "kv_len");

  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  const AttentionWorkspace workspace = workspace_of(q.get_device_index(), stream);
  dispatch_half_types(q, "q", [&](auto scalar) {
    using Scalar = decltype(scalar);
    // More tokens than sequences: some have a prompt in this step. Each kernel leaves the other's sequences
    // alone, which only the GPU tells apart. A lone sequence has all the tokens.
    const bool has_prompt = T > kMostDecodeQueries && T > S && has_prefill_attention();
    const bool has_others = !has_prompt || S > 1;
    const auto with_arguments = [&](auto p) {
      p.out = ptr<Scalar>(out);
      p.q = cptr<Scalar>(q);
      p.k_cache = k_cache.const_data_ptr();
      p.v_cache = v_cache.const_data_ptr();
      p.page_table = cptr<int64_t>(page_table);
      p.q_start = cptr<int64_t>(q_start);
      p.kv_len = cptr<int64_t>(kv_len);
      p.num_tokens = T;
      p.num_seqs = int(S);
      p.num_kv_heads = int(K);
      p.group = int(H / K);
      p.head_dim = int(D);
      p.q_stride = row_stride(q);
      p.out_stride = row_stride(out);
      p.k_page_stride = row_stride(k_cache);
      p.v_page_stride = row_stride(v_cache);
      p.page_table_stride = row_stride(page_table);
      p.softmax_scale = float(softmax_scale);
      p.k_scale = float(k_scale);
      p.v_scale = float(v_scale);
      p.fp8_cache = fp8;
      return p;
    };
    if (has_prompt) {
      auto p = with_arguments(PrefillAttentionParams<Scalar>{});
      p.num_pages = k_cache.size(0);
      nf::prefill_attention(p, stream);
    }
    if (has_others) {
      auto p = with_arguments(AttentionParams<Scalar>{});
      p.workspace = workspace;
      p.most_queries = has_prompt ? kMostDecodeQueries : INT_MAX;
      nf::attention(p, stream);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nemotron_fast, CUDA, m) { register_cuda(m, "attention", TORCH_BOX(&attention)); }

}  // namespace nf::ops
