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

// One workspace a device, for all calls: taken at the first one, never given back (22 MB on a GPU of 132
// SMs). So the addresses in a captured graph stay valid, and nothing is allocated in a capture, unless the
// first call of the process is itself captured: that is refused. Calls that may overlap must not use it at
// once: they belong on one stream.
void* workspace_of(int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<int, void*> workspaces;
  const std::lock_guard lock(mutex);
  if (const auto found = workspaces.find(device); found != workspaces.end()) return found->second;

  cudaStreamCaptureStatus capture;
  NF_CUDA(cudaStreamIsCapturing(stream, &capture));
  if (capture != cudaStreamCaptureStatusNone)
    throw Error(
        "attention: call it once outside of a CUDA graph before the first capture: that takes its workspace");
  void* workspace;
  const size_t num_bytes = size_t(attention_workspace_bytes());
  NF_CUDA(cudaMalloc(&workspace, num_bytes));
  NF_CUDA(cudaMemset(workspace, 0xff, num_bytes));
  NF_CUDA(cudaDeviceSynchronize());  // before any stream uses it
  return workspaces[device] = workspace;
}

// [T, H, D]: the heads of a token one after another.
void check_heads(const Tensor& t, const char* name) {
  check_rows(t, name);
  if (t.size(1) > 1 && t.stride(1) != t.size(2))
    reject(name, "stride of dim 1 is " + std::to_string(t.stride(1)) + ", want " + std::to_string(t.size(2)));
}

// `rows`: what it is made of, q or qkv.
void check_out(const Tensor& out, const std::optional<Tensor>& out_scale, const Tensor& rows) {
  check_device(out, rows, "out");
  check_dtype(out, out_scale ? ScalarType::Float8_e4m3fn : rows.scalar_type(), "out");
  if (out.dim() != 3) reject("out", "has " + std::to_string(out.dim()) + " dims, want 3");
  check_heads(out, "out");
  if (out_scale) check_vector(*out_scale, 1, ScalarType::Float, rows, "out_scale");
}

struct Scales {
  double softmax, k, v;
};

constexpr int64_t kPageSize = 64;

// What products of e4m3 want; the same words as reference_attention.py's.
void check_fp8_products(const Tensor& k_cache) {
  const std::string want = " for fp8_products; call without them";
  if (k_cache.scalar_type() != ScalarType::Float8_e4m3fn)
    reject("k_cache", std::string("dtype is ") + toString(k_cache.scalar_type()) + ", want Float8_e4m3fn" +
                          want + ", or keep keys and values in e4m3");
  if (k_cache.size(3) != 128)
    reject("k_cache", "head size is " + std::to_string(k_cache.size(3)) + ", want 128" + want);
  if (!has_prefill_attention()) reject("q", "is on a GPU without the kernel of prompts, want sm_90a" + want);
}

// The caches, the page table and the sequences, checked: what both ops have in common. `rows` is q or qkv,
// `out` is checked already.
template <class Scalar>
AttentionParams<Scalar> common_params(const Tensor& out, const Tensor& rows, const Tensor& k_cache,
                                      const Tensor& v_cache, const Tensor& page_table, const Tensor& q_start,
                                      const Tensor& kv_len, int64_t H, const Scales& scales) {
  const int64_t K = k_cache.size(1), D = k_cache.size(3), S = kv_len.size(0);
  const bool fp8 = check_caches(k_cache, v_cache, rows);
  check_shape(k_cache, {k_cache.size(0), K, kPageSize, D}, "k_cache");
  if (K == 0 || H % K != 0)
    reject("q", std::to_string(H) + " heads, want a multiple of K=" + std::to_string(K));
  check_device(page_table, rows, "page_table");
  check_dtype(page_table, ScalarType::Long, "page_table");
  check_shape(page_table, {S, page_table.size(1)}, "page_table");
  if (page_table.size(1) > 1 && page_table.stride(1) != 1)
    reject("page_table", "stride of the last dim is " + std::to_string(page_table.stride(1)) + ", want 1");
  check_vector(q_start, S + 1, ScalarType::Long, rows, "q_start");
  check_vector(kv_len, S, ScalarType::Long, rows, "kv_len");
  return {
      .out = out.mutable_data_ptr(),
      .out_scale = nullptr,
      .q = cptr<Scalar>(rows),
      .append = {},
      .k_cache = k_cache.mutable_data_ptr(),
      .v_cache = v_cache.mutable_data_ptr(),
      .page_table = cptr<int64_t>(page_table),
      .q_start = cptr<int64_t>(q_start),
      .kv_len = cptr<int64_t>(kv_len),
      .workspace = workspace_of(rows.get_device_index(), current_stream(rows)),
      .num_tokens = rows.size(0),
      .num_seqs = int(S),
      .most_queries = INT_MAX,
      .num_kv_heads = int(K),
      .group = int(H / K),
      .head_dim = int(D),
      .q_stride = row_stride(rows),
      .out_stride = row_stride(out),
      .k_page_stride = row_stride(k_cache),
      .v_page_stride = row_stride(v_cache),
      .page_table_stride = row_stride(page_table),
      .softmax_scale = float(scales.softmax),
      .k_scale = float(scales.k),
      .v_scale = float(scales.v),
      .fp8_cache = fp8,
  };
}

// The same for the kernel of prompts.
template <class Scalar>
PrefillAttentionParams<Scalar> prefill_params(const AttentionParams<Scalar>& p, int64_t num_pages,
                                              bool fp8_products) {
  return {
      .out = p.out,
      .out_scale = p.out_scale,
      .q = p.q,
      .k_cache = p.k_cache,
      .v_cache = p.v_cache,
      .page_table = p.page_table,
      .q_start = p.q_start,
      .kv_len = p.kv_len,
      .num_tokens = p.num_tokens,
      .num_pages = num_pages,
      .num_seqs = p.num_seqs,
      .num_kv_heads = p.num_kv_heads,
      .group = p.group,
      .head_dim = p.head_dim,
      .q_stride = p.q_stride,
      .out_stride = p.out_stride,
      .k_page_stride = p.k_page_stride,
      .v_page_stride = p.v_page_stride,
      .page_table_stride = p.page_table_stride,
      .softmax_scale = p.softmax_scale,
      .k_scale = p.k_scale,
      .v_scale = p.v_scale,
      .fp8_cache = p.fp8_cache,
      .fp8_products = fp8_products,
  };
}

void attention(Tensor out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor q_start,
               Tensor kv_len, double softmax_scale, double k_scale, double v_scale,
               std::optional<Tensor> out_scale, std::optional<Tensor> cos_sin, bool fp8_products,
               bool per_query) {
  if (q.dim() != 3) reject("q", "has " + std::to_string(q.dim()) + " dims, want 3");
  if (k_cache.dim() != 4) reject("k_cache", "has " + std::to_string(k_cache.dim()) + " dims, want 4");
  if (q.size(2) != k_cache.size(3))
    reject("q", "head size is " + std::to_string(q.size(2)) + ", want " + std::to_string(k_cache.size(3)));
  check_heads(q, "q");
  check_out(out, out_scale, q);
  check_shape(out, {q.size(0), q.size(1), q.size(2)}, "out");

  const DeviceGuard guard(q.get_device_index());
  if (fp8_products) check_fp8_products(k_cache);
  if (fp8_products && per_query) reject("q", "fp8_products are of many queries, want no per_query");
  if (cos_sin) {
    check_cos_sin(*cos_sin, q, q.size(2));
    if (per_query) reject("q", "cos_sin is for many queries, want no per_query");
    if (!has_prefill_attention())
      reject("q", "is on a GPU without the kernel of prompts, want sm_90a for cos_sin; rotate q before");
  }
  const cudaStream_t stream = current_stream(q);
  dispatch_half_types(q, "q", [&](auto scalar) {
    using Scalar = decltype(scalar);
    AttentionParams<Scalar> p = common_params<Scalar>(out, q, k_cache, v_cache, page_table, q_start, kv_len,
                                                      q.size(1), {softmax_scale, k_scale, v_scale});
    if (out_scale) p.out_scale = cptr<float>(*out_scale);
    p.per_query = per_query;
    // More tokens than sequences: some have a prompt in this step. (Or, where some have no token, with fewer;
    // that matters only if prompts are computed in another way.) Each kernel leaves the other's sequences
    // alone, which only the GPU tells apart. A lone sequence has all the tokens.
    const bool has_prompt = !per_query && p.num_tokens > kMostDecodeQueries &&
                            (p.num_tokens > p.num_seqs || fp8_products || cos_sin) && has_prefill_attention();
    if (has_prompt) {
      PrefillAttentionParams<Scalar> prompts = prefill_params(p, k_cache.size(0), fp8_products);
      if (cos_sin) prompts.cos_sin = cptr<float>(*cos_sin), prompts.cos_sin_stride = row_stride(*cos_sin);
      nf::prefill_attention(prompts, stream);
      if (p.num_seqs == 1) return;
      p.most_queries = kMostDecodeQueries;
    }
    nf::attention(p, stream);
  });
}

void decode_attention(Tensor out, Tensor qkv, Tensor k_cache, Tensor v_cache, Tensor cos_sin,
                      Tensor page_table, Tensor q_start, Tensor kv_len, double softmax_scale, double k_scale,
                      double v_scale, std::optional<Tensor> out_scale) {
  if (qkv.dim() != 2) reject("qkv", "has " + std::to_string(qkv.dim()) + " dims, want 2");
  if (k_cache.dim() != 4) reject("k_cache", "has " + std::to_string(k_cache.dim()) + " dims, want 4");
  const int64_t T = qkv.size(0), X = qkv.size(1), K = k_cache.size(1), D = k_cache.size(3), H = X / D - 2 * K;
  if (X % D != 0 || H <= 0)
    reject("qkv", "dim 1 is " + std::to_string(X) + ", want (H + 2K) * D with K=" + std::to_string(K) +
                      ", D=" + std::to_string(D));
  check_rows(qkv, "qkv");
  check_out(out, out_scale, qkv);
  check_shape(out, {T, H, D}, "out");
  check_cos_sin(cos_sin, qkv, D);

  const DeviceGuard guard(qkv.get_device_index());
  dispatch_half_types(qkv, "qkv", [&](auto scalar) {
    using Scalar = decltype(scalar);
    AttentionParams<Scalar> p = common_params<Scalar>(out, qkv, k_cache, v_cache, page_table, q_start, kv_len,
                                                      H, {softmax_scale, k_scale, v_scale});
    if (out_scale) p.out_scale = cptr<float>(*out_scale);
    p.append = {.k = p.q + H * D,
                .v = p.q + (H + K) * D,
                .cos_sin = cptr<float>(cos_sin),
                .cos_sin_stride = row_stride(cos_sin)};
    nf::attention(p, current_stream(qkv));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nemotron_fast, CUDA, m) {
  register_cuda(m, "attention", TORCH_BOX(&attention));
  register_cuda(m, "decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace nf::ops
