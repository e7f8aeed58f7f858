// SPDX-License-Identifier: Apache-2.0
#include "kernels/rope/rope_append.h"
#include "ops/cache_checks.h"
#include "ops/register.h"
#include "ops/vector_checks.h"

namespace nf::ops {
namespace {

void rope_append(Tensor qkv, Tensor k_cache, Tensor v_cache, Tensor cos_sin, Tensor positions, Tensor slots,
                 double k_scale, double v_scale, int64_t num_rotated) {
  if (qkv.dim() != 2) reject("qkv", "has " + std::to_string(qkv.dim()) + " dims, want 2");
  if (k_cache.dim() != 4) reject("k_cache", "has " + std::to_string(k_cache.dim()) + " dims, want 4");
  const int64_t T = qkv.size(0), X = qkv.size(1), P = k_cache.size(0), K = k_cache.size(1);
  const int64_t B = k_cache.size(2), D = k_cache.size(3), H = X / D - 2 * K;

  if (X % D != 0 || H <= 0)
    reject("qkv", "dim 1 is " + std::to_string(X) + ", want (H + 2K) * D with K=" + std::to_string(K) +
                      ", D=" + std::to_string(D));
  check_rows(qkv, "qkv");
  const bool fp8 = check_caches(k_cache, v_cache, qkv);
  check_cos_sin(cos_sin, qkv, D);
  check_vector(positions, T, ScalarType::Long, qkv, "positions");
  check_vector(slots, T, ScalarType::Long, qkv, "slots");
  if (num_rotated < 0 || num_rotated > T)
    reject("num_rotated", "is " + std::to_string(num_rotated) + ", want 0.." + std::to_string(T));

  const DeviceGuard guard(qkv.get_device_index());
  const cudaStream_t stream = current_stream(qkv);
  dispatch_half_types(qkv, "qkv", [&](auto scalar) {
    using Scalar = decltype(scalar);
    nf::rope_append<Scalar>(
        {
            .qkv = ptr<Scalar>(qkv),
            .k_cache = k_cache.mutable_data_ptr(),
            .v_cache = v_cache.mutable_data_ptr(),
            .cos_sin = cptr<float>(cos_sin),
            .positions = cptr<int64_t>(positions),
            .slots = cptr<int64_t>(slots),
            .num_tokens = T,
            .num_rotated = num_rotated,
            .num_heads = int(H),
            .num_kv_heads = int(K),
            .head_dim = int(D),
            .num_pages = P,
            .page_size = int(B),
            .qkv_stride = row_stride(qkv),
            .k_page_stride = row_stride(k_cache),
            .v_page_stride = row_stride(v_cache),
            .cos_sin_stride = row_stride(cos_sin),
            .k_scale = float(k_scale),
            .v_scale = float(v_scale),
            .fp8_cache = fp8,
        },
        stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nemotron_fast, CUDA, m) {
  register_cuda(m, "rope_append", TORCH_BOX(&rope_append));
}

}  // namespace nf::ops
