// SPDX-License-Identifier: Apache-2.0
// Every op's schema: the contract with Python. Outputs are given by the caller, so that ops suit CUDA graphs.
// The CUDA backend of an op is registered in <family>.cpp, the CPU backend by
// python/nemotron_fast/cpu_backend.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(nemotron_fast, m) {
  m.def("embed(Tensor(a!) out, Tensor ids, Tensor weight) -> ()");

  m.def("rms_norm(Tensor(a!) out, Tensor x, Tensor weight, float eps) -> ()");
  m.def("rms_norm_fp8(Tensor(a!) out, Tensor x, Tensor weight, Tensor scale, float eps) -> ()");
  m.def("rms_norm_fp8_per_token(Tensor(a!) out, Tensor(b!) scale, Tensor x, Tensor weight, float eps) -> ()");
  m.def("add_rms_norm(Tensor(a!) out, Tensor(b!) residual, Tensor x, Tensor weight, float eps) -> ()");
  m.def(
      "add_rms_norm_fp8(Tensor(a!) out, Tensor(b!) residual, Tensor x, Tensor weight, Tensor scale, float "
      "eps) -> ()");
  m.def(
      "add_rms_norm_fp8_per_token(Tensor(a!) out, Tensor(b!) scale, Tensor(c!) residual, Tensor x, Tensor "
      "weight, float eps) -> ()");

  m.def("row_stats(Tensor(a!) stats, Tensor x, Tensor? norm_weight) -> ()");

  m.def("quantize_fp8(Tensor(a!) out, Tensor x, Tensor scale) -> ()");
  m.def("quantize_fp8_per_token(Tensor(a!) out, Tensor(b!) scale, Tensor x) -> ()");

  m.def("linear(Tensor(a!) out, Tensor x, Tensor weight, Tensor? x_scale, Tensor? weight_scale) -> ()");
  m.def("pack_weight(Tensor(a!) out, Tensor weight, bool gate_up) -> ()");
  m.def(
      "packed_linear(Tensor(a!) out, Tensor x, Tensor packed, Tensor? x_scale, Tensor? weight_scale, Tensor? "
      "x_stats, Tensor? norm_weight, float eps, Tensor(b!) workspace) -> ()");
  m.def(
      "packed_linear_add(Tensor(a!) residual, Tensor(b!)? out_stats, Tensor x, Tensor packed, Tensor? "
      "x_scale, "
      "Tensor? weight_scale, Tensor? x_stats, Tensor? norm_weight, float eps, Tensor? next_norm_weight, "
      "Tensor(c!) workspace) -> ()");
  m.def(
      "packed_swiglu(Tensor(a!) out, Tensor(b!)? out_stats, Tensor x, Tensor packed, Tensor? x_scale, "
      "Tensor? "
      "weight_scale, Tensor? out_scale, Tensor? x_stats, Tensor? norm_weight, float eps, Tensor(c!) "
      "workspace) -> ()");
  m.def("silu_mul(Tensor(a!) out, Tensor gate_up) -> ()");

  m.def(
      "rope_append(Tensor(a!) qkv, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor cos_sin, Tensor positions, "
      "Tensor slots, float k_scale, float v_scale, int num_rotated) -> ()");
  m.def(
      "attention(Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor "
      "q_start, Tensor kv_len, float softmax_scale, float k_scale, float v_scale, Tensor? out_scale, "
      "Tensor? cos_sin=None, bool fp8_products=False, bool per_query=False) -> ()");
  m.def(
      "decode_attention(Tensor(a!) out, Tensor qkv, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor cos_sin, "
      "Tensor page_table, Tensor q_start, Tensor kv_len, float softmax_scale, float k_scale, float v_scale, "
      "Tensor? out_scale) -> ()");

  m.def(
      "penalize(Tensor(a!) logits, Tensor output_counts, Tensor in_prompt, Tensor presence, Tensor "
      "frequency, "
      "Tensor repetition) -> ()");
  m.def(
      "sample(Tensor(a!) tokens, Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor "
      "min_p, "
      "Tensor seed, Tensor step) -> ()");
  m.def(
      "top_logprobs(Tensor(a!) chosen, Tensor(b!) rank, Tensor(c!) top_values, Tensor(d!) top_ids, Tensor "
      "logits, "
      "Tensor tokens) -> ()");
}
