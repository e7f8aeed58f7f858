# SPDX-License-Identifier: Apache-2.0
"""One typed wrapper per op, those of attention and sampling in files of their own; shapes are stated here, once.

The schemas live in csrc/ops/library.cpp, the CPU kernels in cpu_backend.py, the CUDA kernels in csrc/. Dimension
letters: T tokens of the step, S sequences, E hidden size, H query heads, K KV heads, D head size, F FFN width,
V vocabulary, P pages, B tokens per page. Every op writes into given outputs, so that it can be captured in a
CUDA graph; a wrapper allocates the output when none is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_fast import cpu_backend, packing, reference  # noqa: F401  (cpu_backend registers the CPU kernels)
from nemotron_fast.attention_ops import attention, decode_attention, rope_append  # noqa: F401
from nemotron_fast.sampling_ops import penalize, sample, top_logprobs  # noqa: F401

RowStats = reference.RowStats

_ops = torch.ops.nemotron_fast


def embed(ids: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """out [T, E] = weight[ids]; weight [V, E], ids [T] int64; an id outside [0, V) gives zeros."""
    if out is None:
        out = weight.new_empty(ids.shape[0], weight.shape[1])
    _ops.embed.default(out, ids, weight)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """out [T, E] = x / sqrt(mean(x^2) + eps) * weight; x [T, E], weight [E]."""
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _ops.rms_norm.default(out, x, weight, eps)
    return out


def rms_norm_fp8(x: Tensor, weight: Tensor, scale: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """out [T, E] e4m3 = quantize_fp8(rms_norm(x [T, E]), scale [1])."""
    out, _ = _fp8_outputs(x, out, scale)
    _ops.rms_norm_fp8.default(out, x, weight, scale, eps)
    return out


def rms_norm_fp8_per_token(
    x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out [T, E] e4m3, scale [T]) = quantize_fp8_per_token(rms_norm(x [T, E]))."""
    out, scale = _fp8_outputs(x, out, scale)
    _ops.rms_norm_fp8_per_token.default(out, scale, x, weight, eps)
    return out, scale


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """residual [T, E] += x [T, E] in place; out [T, E] = rms_norm(residual)."""
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _ops.add_rms_norm.default(out, residual, x, weight, eps)
    return out


def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """residual [T, E] += x [T, E] in place; out [T, E] e4m3 = quantize_fp8(rms_norm(residual), scale [1])."""
    out, _ = _fp8_outputs(x, out, scale)
    _ops.add_rms_norm_fp8.default(out, residual, x, weight, scale, eps)
    return out


def add_rms_norm_fp8_per_token(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """residual [T, E] += x [T, E] in place; (out e4m3, scale [T]) = quantize_fp8_per_token(rms_norm(residual))."""
    out, scale = _fp8_outputs(x, out, scale)
    _ops.add_rms_norm_fp8_per_token.default(out, scale, residual, x, weight, eps)
    return out, scale


def row_stats(x: Tensor, norm_weight: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """out [T, X/128, 2] float32: per block of 128 columns of x [T, X], sum of x^2 and largest |x * norm_weight [X]|."""
    if out is None:
        out = torch.empty(x.shape[0], -(-x.shape[1] // reference.STATS_BLOCK), 2, device=x.device)
    _ops.row_stats.default(out, x, norm_weight)
    return out


def quantize_fp8(x: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """out [T, X] e4m3 = x / scale, saturating; scale [1] float32."""
    out, _ = _fp8_outputs(x, out, scale)
    _ops.quantize_fp8.default(out, x, scale)
    return out


def quantize_fp8_per_token(
    x: Tensor, *, out: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out [T, X] e4m3, scale [T] float32): each row divided by its own max|x| / 448."""
    out, scale = _fp8_outputs(x, out, scale)
    _ops.quantize_fp8_per_token.default(out, scale, x)
    return out, scale


def _fp8_outputs(x: Tensor, out: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """e4m3 rows, and a scale for each: what was not given is allocated."""
    if out is None:
        out = torch.empty(x.shape, dtype=reference.FP8, device=x.device)
    if scale is None:
        scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return out, scale


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """out [T, N] = x [T, K] @ weight [N, K]^T, in x's type unless `out_dtype` says otherwise.

    FP8 (both operands e4m3) needs x_scale ([1] or [T]), weight_scale ([1] or [N]) and `out_dtype`.
    """
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype or x.dtype, device=x.device)
    _ops.linear.default(out, x, weight, x_scale, weight_scale)
    return out


def pack_weight(weight: Tensor, *, gate_up: bool = False, out: Tensor | None = None) -> Tensor:
    """out [N/128, K bytes/128, 128, 128 bytes] (rounded up): weight [N, K], e4m3 or bf16, as packed linears read it.

    N and K are multiples of 16. `gate_up`: for packed_swiglu; rows are gate, then up.
    """
    if out is None:
        out = weight.new_empty(packing.packed_shape(*weight.shape, weight.dtype))
    _ops.pack_weight.default(out, weight, gate_up)
    return out


def packed_linear(
    x: Tensor,
    packed: Tensor,
    num_rows: int,
    workspace: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    x_rows: RowStats | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """out [T, N] bf16 or float32 = x [T, K] @ weight [N, K]^T; x has the weight's type.

    x_scale [1] or [T], weight_scale [1] or [N] float32, None is 1. `workspace`: packing.make_workspace, one per stream.
    With `x_rows` (T <= 16), x is bf16 and is normalised and, for an e4m3 weight, quantised on its way, by x_scale [1]
    or as the norm ops do.
    """
    if out is None:
        out = torch.empty(x.shape[0], num_rows, dtype=out_dtype, device=x.device)
    _ops.packed_linear.default(out, x, packed, x_scale, weight_scale, *_row_args(x_rows), workspace)
    return out


def packed_linear_add(
    x: Tensor,
    packed: Tensor,
    residual: Tensor,
    workspace: Tensor,
    *,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    x_rows: RowStats | None = None,
    out_stats: Tensor | None = None,
    next_norm_weight: Tensor | None = None,
) -> None:
    """residual [T, N] bf16 += packed_linear(x [T, K]) in place; out_stats [T, N/128, 2] = row_stats of it (T <= 16)."""
    _ops.packed_linear_add.default(
        residual, out_stats, x, packed, x_scale, weight_scale, *_row_args(x_rows), next_norm_weight, workspace
    )


def packed_swiglu(
    x: Tensor,
    packed: Tensor,
    width: int,
    workspace: Tensor,
    *,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    x_rows: RowStats | None = None,
    out: Tensor | None = None,
    out_stats: Tensor | None = None,
) -> Tensor:
    """out [T, F] = silu(gate) * up of x [T, K], gate_up [2F, K] packed as such; e4m3 if there is an out_scale [1].

    weight_scale [1] or [2F], in the order before packing. out_stats [T, F/64, 2]: statistics of out, without a norm.
    """
    if out is None:
        dtype = torch.bfloat16 if out_scale is None else reference.FP8
        out = torch.empty(x.shape[0], width, dtype=dtype, device=x.device)
    _ops.packed_swiglu.default(
        out, out_stats, x, packed, x_scale, weight_scale, out_scale, *_row_args(x_rows), workspace
    )
    return out


def _row_args(rows: RowStats | None) -> tuple[Tensor | None, Tensor | None, float]:
    return (None, None, 0.0) if rows is None else (rows.stats, rows.norm_weight, rows.eps)


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """out [T, F] = silu(gate) * up; gate_up [T, 2F] holds gate, then up."""
    if out is None:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _ops.silu_mul.default(out, gate_up)
    return out
