# SPDX-License-Identifier: Apache-2.0
"""Registers the references as the CPU kernels of the ops: a reference returns what its op writes.

Importing this module is what makes the ops run without a GPU; OP_NAMES are all ops that do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemotron_fast import (
    _C,  # noqa: F401  (defines the schemas)
    packing,
    reference,
    reference_attention,
    reference_sampling,
)
from nemotron_fast.reference import RowStats


def _write(out: Tensor, result: Tensor) -> None:
    """Round to the type of the given output, which must have the result's shape."""
    if out.shape != result.shape:
        raise RuntimeError(f"the output has shape {tuple(out.shape)}, want {tuple(result.shape)}")
    out.copy_(result)


def _returns(function: Callable[..., Any]) -> Callable[..., None]:
    """The op form of a reference that returns what the op writes to its first argument."""

    def kernel(out: Tensor, *args: Any) -> None:
        _write(out, function(*args))

    return kernel


def _returns_rows_and_scales(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., None]:
    """The same with two outputs."""

    def kernel(out: Tensor, scale: Tensor, *args: Any) -> None:
        for target, result in zip((out, scale), function(*args), strict=True):
            _write(target, result)

    return kernel


def _top_logprobs(
    chosen: Tensor, rank: Tensor, top_values: Tensor, top_ids: Tensor, logits: Tensor, tokens: Tensor
) -> None:
    results = reference_sampling.top_logprobs(logits, tokens, top_values.shape[1])
    for out, result in zip((chosen, rank, top_values, top_ids), results, strict=True):
        _write(out, result)


def _row_stats(stats: Tensor, x: Tensor, norm_weight: Tensor | None) -> None:
    _write(stats, reference.row_stats(x, norm_weight))


def _packed_linear(
    out: Tensor,
    x: Tensor,
    packed: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    x_stats: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    _workspace: Tensor,
) -> None:
    rows = None if x_stats is None else RowStats(x_stats, norm_weight, eps)
    _write(out, packing.packed_linear(x, packed, out.shape[1], x_scale, weight_scale, rows))


def _packed_linear_add(
    residual: Tensor,
    out_stats: Tensor | None,
    x: Tensor,
    packed: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    x_stats: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    next_norm_weight: Tensor | None,
    _workspace: Tensor,
) -> None:
    rows = None if x_stats is None else RowStats(x_stats, norm_weight, eps)
    stats = packing.packed_linear_add(residual, x, packed, x_scale, weight_scale, rows, next_norm_weight)
    if out_stats is not None:
        _write(out_stats, stats)


def _packed_swiglu(
    out: Tensor,
    out_stats: Tensor | None,
    x: Tensor,
    packed: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    out_scale: Tensor | None,
    x_stats: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    _workspace: Tensor,
) -> None:
    rows = None if x_stats is None else RowStats(x_stats, norm_weight, eps)
    h_TF = packing.packed_swiglu(x, packed, out.shape[1], x_scale, weight_scale, out_scale, rows)
    _write(out, h_TF)
    if out_stats is not None:
        _write(out_stats, reference.row_stats(h_TF, None, packing.BLOCK_ROWS // 2))


_KERNELS = {
    "embed": _returns(reference.embed),
    "rms_norm": _returns(reference.rms_norm),
    "rms_norm_fp8": _returns(reference.rms_norm_fp8),
    "rms_norm_fp8_per_token": _returns_rows_and_scales(reference.rms_norm_fp8_per_token),
    "add_rms_norm": _returns(reference.add_rms_norm),
    "add_rms_norm_fp8": _returns(reference.add_rms_norm_fp8),
    "add_rms_norm_fp8_per_token": _returns_rows_and_scales(reference.add_rms_norm_fp8_per_token),
    "row_stats": _row_stats,
    "quantize_fp8": _returns(reference.quantize_fp8),
    "quantize_fp8_per_token": _returns_rows_and_scales(reference.quantize_fp8_per_token),
    "linear": _returns(reference.linear),
    "pack_weight": _returns(packing.pack_weight),
    "packed_linear": _packed_linear,
    "packed_linear_add": _packed_linear_add,
    "packed_swiglu": _packed_swiglu,
    "silu_mul": _returns(reference.silu_mul),
    "rope_append": reference_attention.rope_append,
    "attention": _returns(reference_attention.attention),
    "decode_attention": _returns(reference_attention.decode_attention),
    "penalize": reference_sampling.penalize,
    "sample": _returns(reference_sampling.sample),
    "top_logprobs": _top_logprobs,
}
OP_NAMES = tuple(_KERNELS)

_library = torch.library.Library("nemotron_fast", "IMPL")
for _name, _kernel in _KERNELS.items():
    _library.impl(_name, _kernel, "CPU")
    _library.impl(_name, lambda *_: None, "Meta")  # outputs are given, so shapes need no inference
