# SPDX-License-Identifier: Apache-2.0
"""The residual stream of one step: what reads it through a norm, and what is added to it.

Two ways, the same bits while the linears add in the same order (up to 64 tokens). `Residual` works with any weights
and any number of tokens: a sub-block's output is added by its last linear, or by the norm of the next one.
`RowStatsResidual` is for packed weights and few tokens, where launches cost more than arithmetic: linears add to the
stream themselves and leave statistics of its rows, by which the next linear normalises and quantises the rows on its
way (ops.RowStats), so that a sub-block is its linears and nothing between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_fast import ops, reference
from nemotron_fast.ops import RowStats
from nemotron_fast.packed_weights import PackedWeight
from nemotron_fast.packing import BLOCK_ROWS
from nemotron_fast.weights import LinearWeight, MLPWeights

Linear = LinearWeight | PackedWeight

# Tokens that take RowStatsResidual; its kernels take up to 16. A step of Super-49B in FP8 after 128 tokens, on an H100,
# against that with Residual: at 1 token 17.08 ms and 17.15, at 4 17.19 and 17.10, at 8 17.54 and 17.32 (given scales);
# at 1 with scales per token 17.07 and 17.50.
FEW_TOKENS = 1

# Up to so many tokens the norm adds a linear's result to the residual stream; beyond, the linear does it itself, which
# is less traffic: such a step takes 17.46 ms with the norm and 17.50 with the linear at 16 tokens, 18.69 and 18.55 at
# 64.
MOST_DELTA_TOKENS = 16

_NORMS = ops.rms_norm, ops.rms_norm_fp8, ops.rms_norm_fp8_per_token
_ADD_NORMS = ops.add_rms_norm, ops.add_rms_norm_fp8, ops.add_rms_norm_fp8_per_token


class Residual:
    """`rows` [T, E], changed in place."""

    def __init__(self, rows: Tensor, eps: float, workspace: Tensor) -> None:
        self._rows = rows
        self._delta: Tensor | None = None  # not added yet
        self._eps = eps
        self._workspace = workspace  # of the packed linears

    def read(self, norm: Tensor, linear: Linear) -> Tensor:
        """linear(rms_norm(rows)) [T, N]."""
        x, x_scale = self._normed(norm, linear)
        return self._linear(x, x_scale, linear)

    def add(self, x: Tensor, linear: Linear, next_norm: Tensor) -> None:
        """rows += linear(x); x may be e4m3 by the linear's given scale already."""
        x, x_scale = quantize(x, linear)
        if isinstance(linear, PackedWeight) and len(x) > MOST_DELTA_TOKENS:
            rows, scales = self.finish(), {"x_scale": x_scale, "weight_scale": linear.weight_scale}
            ops.packed_linear_add(x, linear.packed, rows, self._workspace, **scales)
        else:
            self.add_delta(self._linear(x, x_scale, linear), next_norm)

    def add_mlp(self, block: MLPWeights, next_norm: Tensor) -> None:
        """rows += the block's gated FFN of rms_norm(rows)."""
        x, x_scale = self._normed(block.norm, block.gate_up)
        if isinstance(block.gate_up, LinearWeight):
            h = ops.silu_mul(self._linear(x, x_scale, block.gate_up))
        else:
            h = self._packed_swiglu(x, x_scale, block)
        self.add(h, block.down, next_norm)

    def add_delta(self, delta: Tensor, _next_norm: Tensor) -> None:
        """rows += delta [T, E]."""
        self.finish()
        self._delta = delta

    def finish(self) -> Tensor:
        """The rows, everything added."""
        if self._delta is not None:
            self._rows += self._delta
            self._delta = None
        return self._rows

    def _normed(self, norm: Tensor, linear: Linear) -> tuple[Tensor, Tensor | None]:
        """rms_norm(rows) as `linear` wants it, and its scale."""
        delta, self._delta = self._delta, None
        norms, args = (_NORMS, (self._rows,)) if delta is None else (_ADD_NORMS, (delta, self._rows))
        rounded, to_fp8, to_fp8_per_token = norms
        scale = linear.input_scale
        if linear.weight_scale is None:
            return rounded(*args, norm, self._eps), None
        if scale is None:
            return to_fp8_per_token(*args, norm, self._eps)
        return to_fp8(*args, norm, scale, self._eps), scale

    def _linear(self, x: Tensor, x_scale: Tensor | None, linear: Linear) -> Tensor:
        return run_linear(x, x_scale, linear, self._workspace, self._rows.dtype)

    def _packed_swiglu(self, x: Tensor, x_scale: Tensor | None, block: MLPWeights) -> Tensor:
        gate_up = block.gate_up
        scales = {"x_scale": x_scale, "weight_scale": gate_up.weight_scale, "out_scale": given_scale(block.down)}
        return ops.packed_swiglu(x, gate_up.packed, gate_up.num_rows // 2, self._workspace, **scales)


class RowStatsResidual:
    """The same for at most FEW_TOKENS tokens and packed weights; `first_norm` is the first to read."""

    def __init__(self, rows: Tensor, eps: float, workspace: Tensor, first_norm: Tensor) -> None:
        self._rows = rows
        self._eps = eps
        self._workspace = workspace
        self._stats = ops.row_stats(rows, first_norm)

    def read(self, norm: Tensor, linear: PackedWeight) -> Tensor:
        x, args = self._operand(self._rows, RowStats(self._stats, norm, self._eps), linear)
        return ops.packed_linear(x, linear.packed, linear.num_rows, self._workspace, **args)

    def add(self, x: Tensor, linear: PackedWeight, next_norm: Tensor) -> None:
        needs_scale = linear.weight_scale is not None and linear.input_scale is None
        self._add(x, RowStats(ops.row_stats(x)) if needs_scale else None, linear, next_norm)

    def add_mlp(self, block: MLPWeights, next_norm: Tensor) -> None:
        gate_up, down = block.gate_up, block.down
        x, args = self._operand(self._rows, RowStats(self._stats, block.norm, self._eps), gate_up)
        stats = None
        if down.weight_scale is not None and down.input_scale is None:
            blocks = -(-gate_up.num_rows // BLOCK_ROWS)
            stats = torch.empty(len(x), blocks, 2, device=x.device)
        args |= {"out_scale": given_scale(down), "out_stats": stats}
        h = ops.packed_swiglu(x, gate_up.packed, gate_up.num_rows // 2, self._workspace, **args)
        self._add(h, None if stats is None else RowStats(stats), down, next_norm)

    def add_delta(self, delta: Tensor, next_norm: Tensor) -> None:
        self._rows += delta
        self._stats = ops.row_stats(self._rows, next_norm)

    def finish(self) -> Tensor:
        return self._rows

    def _add(self, x: Tensor, rows: RowStats | None, linear: PackedWeight, next_norm: Tensor) -> None:
        x, args = self._operand(x, rows, linear)
        stats = torch.empty_like(self._stats)
        args |= {"out_stats": stats, "next_norm_weight": next_norm}
        ops.packed_linear_add(x, linear.packed, self._rows, self._workspace, **args)
        self._stats = stats

    def _operand(self, x: Tensor, rows: RowStats | None, linear: PackedWeight) -> tuple[Tensor, dict]:
        """x as the linear takes it, and the arguments that go with it."""
        if rows is None:
            x, _ = quantize(x, linear)
        return x, {"weight_scale": linear.weight_scale, "x_scale": linear.input_scale, "x_rows": rows}


def run_linear(x: Tensor, x_scale: Tensor | None, linear: Linear, workspace: Tensor, out_dtype: torch.dtype) -> Tensor:
    """x @ W^T, for an x in the weight's type."""
    scales = {"x_scale": x_scale, "weight_scale": linear.weight_scale}
    if isinstance(linear, LinearWeight):
        return ops.linear(x, linear.weight, out_dtype=out_dtype, **scales)
    return ops.packed_linear(x, linear.packed, linear.num_rows, workspace, out_dtype=out_dtype, **scales)


def quantize(x: Tensor, linear: Linear) -> tuple[Tensor, Tensor | None]:
    """x as the weight wants it, and its scale: unchanged, or FP8 by a given scale (unless it is), or FP8 per token."""
    if linear.weight_scale is None:
        return x, None
    scale = linear.input_scale
    if scale is None:
        return ops.quantize_fp8_per_token(x)
    return x if x.dtype == reference.FP8 else ops.quantize_fp8(x, scale), scale


def given_scale(linear: Linear) -> Tensor | None:
    """The scale [1] by which a kernel can write e4m3 for `linear` at once."""
    return None if linear.weight_scale is None else linear.input_scale
