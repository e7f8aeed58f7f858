// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/linear.h"

#include <climits>

#include "kernels/common/check.h"
#include "ops/register.h"
#include "ops/row_stats.h"

namespace nf::ops {
namespace {

int num_sms(const Tensor& t) {
  int n;
  NF_CUDA(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, t.get_device_index()));
  return n;
}

void check_packed(const Tensor& packed, int64_t num_rows, int64_t num_cols) {
  const int element_bytes = int(packed.element_size());
  const PackedShape shape = packed_shape(num_rows, num_cols, element_bytes);
  check_shape(packed, {shape.num_blocks(), shape.k_tiles(), kBlockRows, kTileRowBytes / element_bytes},
              "packed");
  if (!packed.is_contiguous() || reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 != 0)
    reject("packed", "want it contiguous, at a multiple of 16 bytes");
}

// e4m3 or bf16, as x
template <class F>
void dispatch_element(const Tensor& t, const char* name, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float8_e4m3fn:
      return f(__nv_fp8_e4m3{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    default:
      reject(name, std::string("dtype is ") + toString(t.scalar_type()) + ", want Float8_e4m3fn or BFloat16");
  }
}

// A scale of one value, or of `size`; null if there is none.
const float* check_scale(const OptionalTensor& scale, int64_t size, const Tensor& like, const char* name) {
  if (!scale) return nullptr;
  check_device(*scale, like, name);
  check_dtype(*scale, ScalarType::Float, name);
  if (scale->numel() != 1) check_shape(*scale, {size}, name);
  if (!scale->is_contiguous()) reject(name, "is not contiguous");
  return cptr<float>(*scale);
}

void pack_weight(Tensor out, Tensor weight, bool gate_up) {
  if (weight.dim() != 2) reject("weight", "has " + std::to_string(weight.dim()) + " dims, want 2");
  check_device(weight, weight, "weight");
  check_device(out, weight, "out");
  check_dtype(out, weight.scalar_type(), "out");
  if (!weight.is_contiguous()) reject("weight", "is not contiguous");
  check_packed(out, weight.size(0), weight.size(1));
  const DeviceGuard guard(weight.get_device_index());
  nf::pack_weight({.packed = out.mutable_data_ptr(),
                   .weight = weight.const_data_ptr(),
                   .shape = packed_shape(weight.size(0), weight.size(1), int(weight.element_size())),
                   .interleave = gate_up},
                  current_stream(weight));
}

OutType out_type_of(const Tensor& out) {
  switch (out.scalar_type()) {
    case ScalarType::BFloat16:
      return OutType::kBfloat16;
    case ScalarType::Float:
      return OutType::kFloat;
    case ScalarType::Float8_e4m3fn:
      return OutType::kFp8;
    default:
      reject("out", std::string("dtype is ") + toString(out.scalar_type()) +
                        ", want BFloat16, Float or Float8_e4m3fn");
  }
}

// What the three ops have in common.
struct Operands {
  const Tensor& x;
  const Tensor& packed;
  const OptionalTensor& x_scale;
  const OptionalTensor& weight_scale;
  const OptionalTensor& x_stats;
  const OptionalTensor& norm_weight;
  double eps;
  const Tensor& workspace;
};

PackedLinearParams make_params(Epilogue epilogue, const Tensor& out, const Operands& in) {
  const Tensor& x = in.x;
  if (x.dim() != 2) reject("x", "has " + std::to_string(x.dim()) + " dims, want 2");
  if (out.dim() != 2) reject("out", "has " + std::to_string(out.dim()) + " dims, want 2");
  const int64_t T = x.size(0), K = x.size(1), N = out.size(1) * (epilogue == Epilogue::kSwiglu ? 2 : 1);
  check_device(x, x, "x");
  check_rows(x, "x");
  check_device(out, x, "out");
  check_shape(out, {T, out.size(1)}, "out");
  check_rows(out, "out");
  check_device(in.packed, x, "packed");
  check_dtype(x, in.x_stats ? ScalarType::BFloat16 : in.packed.scalar_type(), "x");
  check_packed(in.packed, N, K);
  const int64_t max_tokens = in.x_stats ? kMaxTokensWithStats : INT_MAX;
  if (T > max_tokens)
    reject("x", "dim 0 is " + std::to_string(T) + ", want at most " + std::to_string(max_tokens));
  const int sms = num_sms(x);
  const int64_t workspace_bytes = linear_workspace_bytes(sms);
  check_device(in.workspace, x, "workspace");
  if (in.workspace.numel() * int64_t(in.workspace.element_size()) < workspace_bytes)
    reject("workspace", "is too small, want " + std::to_string(workspace_bytes) + " bytes");

  const float* x_scale = check_scale(in.x_scale, T, x, "x_scale");
  PackedLinearParams params{
      .out = out.mutable_data_ptr(),
      .x = x.const_data_ptr(),
      .packed = in.packed.const_data_ptr(),
      .weight_scale = check_scale(in.weight_scale, N, x, "weight_scale"),
      .workspace = in.workspace.mutable_data_ptr(),
      .num_tokens = int(T),
      .num_rows = int(N),
      .num_cols = int(K),
      .out_stride = row_stride(out),
      .x_stride = T > 1 ? x.stride(0) : K,  // a tensor map wants one even of a lone row
      .x_scale_per_token = in.x_scale && in.x_scale->numel() > 1,
      .weight_scale_per_row = in.weight_scale && in.weight_scale->numel() > 1,
      .out_type = out_type_of(out),
      .epilogue = epilogue,
      .schedule = make_linear_schedule(N, K, int(in.packed.element_size()), sms),
      .num_sms = sms,
  };
  if (in.x_stats) {
    if (params.x_scale_per_token) reject("x_scale", "is one per token: the statistics give that");
    params.x_rows = check_row_stats(*in.x_stats, in.norm_weight, in.eps, x);
    params.x_rows.fp8_scale = x_scale;
  } else {
    params.x_scale = x_scale;
  }
  return params;
}

// Statistics of out, one block per block of the weight.
void set_out_stats(PackedLinearParams& params, const OptionalTensor& out_stats, const Tensor& x) {
  if (!out_stats) return;
  const int64_t blocks = (params.num_rows + kBlockRows - 1) / kBlockRows;
  check_stats(*out_stats, params.num_tokens, x, "out_stats");
  check_shape(*out_stats, {params.num_tokens, blocks, 2}, "out_stats");
  if (params.num_tokens > kMaxTokensWithStats)
    reject("out_stats", "are for at most " + std::to_string(kMaxTokensWithStats) + " tokens");
  params.out_stats = reinterpret_cast<float2*>(ptr<float>(*out_stats));
}

void run(const PackedLinearParams& params, const Operands& in) {
  const DeviceGuard guard(in.x.get_device_index());
  const cudaStream_t stream = current_stream(in.x);
  dispatch_element(in.packed, "packed",
                   [&](auto element) { nf::packed_linear<decltype(element)>(params, stream); });
}

void packed_linear(Tensor out, Tensor x, Tensor packed, OptionalTensor x_scale, OptionalTensor weight_scale,
                   OptionalTensor x_stats, OptionalTensor norm_weight, double eps, Tensor workspace) {
  const Operands in{x, packed, x_scale, weight_scale, x_stats, norm_weight, eps, workspace};
  run(make_params(Epilogue::kStore, out, in), in);
}

void packed_linear_add(Tensor residual, OptionalTensor out_stats, Tensor x, Tensor packed,
                       OptionalTensor x_scale, OptionalTensor weight_scale, OptionalTensor x_stats,
                       OptionalTensor norm_weight, double eps, OptionalTensor next_norm_weight,
                       Tensor workspace) {
  const Operands in{x, packed, x_scale, weight_scale, x_stats, norm_weight, eps, workspace};
  PackedLinearParams params = make_params(Epilogue::kAdd, residual, in);
  set_out_stats(params, out_stats, x);
  params.out_norm_weight = check_norm_weight(next_norm_weight, residual.size(1), x, "next_norm_weight");
  run(params, in);
}

void packed_swiglu(Tensor out, OptionalTensor out_stats, Tensor x, Tensor packed, OptionalTensor x_scale,
                   OptionalTensor weight_scale, OptionalTensor out_scale, OptionalTensor x_stats,
                   OptionalTensor norm_weight, double eps, Tensor workspace) {
  const Operands in{x, packed, x_scale, weight_scale, x_stats, norm_weight, eps, workspace};
  PackedLinearParams params = make_params(Epilogue::kSwiglu, out, in);
  set_out_stats(params, out_stats, x);
  params.out_scale = check_scale(out_scale, 1, x, "out_scale");
  run(params, in);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nemotron_fast, CUDA, m) {
  register_cuda(m, "pack_weight", TORCH_BOX(&pack_weight));
  register_cuda(m, "packed_linear", TORCH_BOX(&packed_linear));
  register_cuda(m, "packed_linear_add", TORCH_BOX(&packed_linear_add));
  register_cuda(m, "packed_swiglu", TORCH_BOX(&packed_swiglu));
}

}  // namespace nf::ops
