// SPDX-License-Identifier: Apache-2.0
#include "kernels/sampling/penalize.h"
#include "kernels/sampling/sample.h"
#include "ops/register.h"
#include "ops/vector_checks.h"

namespace nf::ops {
namespace {

void check_logits(const Tensor& logits) {
  if (logits.dim() != 2) reject("logits", "has " + std::to_string(logits.dim()) + " dims, want 2");
  check_dtype(logits, ScalarType::Float, "logits");
  if (logits.size(1) > 1 && logits.stride(1) != 1)
    reject("logits", "stride of the last dim is " + std::to_string(logits.stride(1)) + ", want 1");
}

void penalize(Tensor logits, Tensor output_counts, Tensor in_prompt, Tensor presence, Tensor frequency,
              Tensor repetition) {
  check_logits(logits);
  const int64_t S = logits.size(0), V = logits.size(1);

  const auto check_matrix = [&](const Tensor& t, ScalarType dtype, const char* name) {
    check_device(t, logits, name);
    check_dtype(t, dtype, name);
    check_shape(t, {S, V}, name);
    check_contiguous(t, name);
  };
  check_matrix(output_counts, ScalarType::Int, "output_counts");
  check_matrix(in_prompt, ScalarType::Bool, "in_prompt");
  check_vector(presence, S, ScalarType::Float, logits, "presence");
  check_vector(frequency, S, ScalarType::Float, logits, "frequency");
  check_vector(repetition, S, ScalarType::Float, logits, "repetition");

  const DeviceGuard guard(logits.get_device_index());
  nf::penalize(
      {
          .logits = ptr<float>(logits),
          .output_counts = cptr<int32_t>(output_counts),
          .in_prompt = cptr<bool>(in_prompt),
          .presence = cptr<float>(presence),
          .frequency = cptr<float>(frequency),
          .repetition = cptr<float>(repetition),
          .num_rows = S,
          .vocab = V,
          .logits_stride = row_stride(logits),
      },
      current_stream(logits));
}

void sample(Tensor tokens, Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p,
            Tensor seed, Tensor step) {
  check_logits(logits);
  const int64_t S = logits.size(0), V = logits.size(1);

  check_vector(tokens, S, ScalarType::Long, logits, "tokens");
  check_vector(temperature, S, ScalarType::Float, logits, "temperature");
  check_vector(top_k, S, ScalarType::Int, logits, "top_k");
  check_vector(top_p, S, ScalarType::Float, logits, "top_p");
  check_vector(min_p, S, ScalarType::Float, logits, "min_p");
  check_vector(seed, S, ScalarType::Long, logits, "seed");
  check_vector(step, S, ScalarType::Long, logits, "step");

  const DeviceGuard guard(logits.get_device_index());
  nf::sample(
      {
          .tokens = ptr<int64_t>(tokens),
          .logits = cptr<float>(logits),
          .temperature = cptr<float>(temperature),
          .top_k = cptr<int32_t>(top_k),
          .top_p = cptr<float>(top_p),
          .min_p = cptr<float>(min_p),
          .seed = cptr<int64_t>(seed),
          .step = cptr<int64_t>(step),
          .num_rows = S,
          .vocab = V,
          .logits_stride = row_stride(logits),
      },
      current_stream(logits));
}

void top_logprobs(Tensor chosen, Tensor rank, Tensor top_values, Tensor top_ids, Tensor logits,
                  Tensor tokens) {
  check_logits(logits);
  if (top_values.dim() != 2)
    reject("top_values", "has " + std::to_string(top_values.dim()) + " dims, want 2");
  const int64_t S = logits.size(0), V = logits.size(1), N = top_values.size(1);

  const auto check_matrix = [&](const Tensor& t, ScalarType dtype, const char* name) {
    check_device(t, logits, name);
    check_dtype(t, dtype, name);
    check_shape(t, {S, N}, name);
    check_contiguous(t, name);
  };
  check_vector(chosen, S, ScalarType::Float, logits, "chosen");
  check_vector(rank, S, ScalarType::Long, logits, "rank");
  check_matrix(top_values, ScalarType::Float, "top_values");
  check_matrix(top_ids, ScalarType::Long, "top_ids");
  check_vector(tokens, S, ScalarType::Long, logits, "tokens");

  const DeviceGuard guard(logits.get_device_index());
  nf::top_logprobs(
      {
          .chosen = ptr<float>(chosen),
          .rank = ptr<int64_t>(rank),
          .top_values = ptr<float>(top_values),
          .top_ids = ptr<int64_t>(top_ids),
          .logits = cptr<float>(logits),
          .tokens = cptr<int64_t>(tokens),
          .num_rows = S,
          .vocab = V,
          .num_top = int(N),
          .logits_stride = row_stride(logits),
      },
      current_stream(logits));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nemotron_fast, CUDA, m) {
  register_cuda(m, "penalize", TORCH_BOX(&penalize));
  register_cuda(m, "sample", TORCH_BOX(&sample));
  register_cuda(m, "top_logprobs", TORCH_BOX(&top_logprobs));
}

}  // namespace nf::ops
