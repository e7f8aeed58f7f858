# SPDX-License-Identifier: Apache-2.0
"""Every op in plain torch: the oracle for the kernels, and (through cpu_backend.py) the CPU backend. Attention and
sampling have files of their own.

A function here takes the op's inputs and returns its output, or changes in place exactly the arguments that
the op's schema marks. Math is in FP32 (FP64 for FP64 input); the result is rounded once to the output's type
unless a docstring says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite e4m3
CHUNK_ELEMENTS = 1 << 22  # of an FP8 weight, or of scores of e4m3 products, that are held in FP32
STATS_BLOCK = 128  # columns of a block of row_stats
MIN_SCALE = 1e-12  # of a dynamic scale, so that an all-zero row divides by something


def embed(ids_T: Tensor, weight_VE: Tensor) -> Tensor:
    """Rows of the table; an id outside it (another rank's) gives a row of zeros."""
    inside = (ids_T >= 0) & (ids_T < weight_VE.shape[0])
    if bool(inside.all()):
        return weight_VE[ids_T]
    return torch.where(inside[:, None], weight_VE[ids_T.clamp(0, weight_VE.shape[0] - 1)], 0)


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's type, then times weight and rounded again (as Llama does)."""
    wide_TE = wide(x_TE)
    scaled = wide_TE * torch.rsqrt(wide_TE.square().mean(-1, keepdim=True) + eps)
    return weight_E * scaled.to(x_TE.dtype)


def rms_norm_fp8(x_TE: Tensor, weight_E: Tensor, scale_1: Tensor, eps: float) -> Tensor:
    """quantize_fp8 of the rms_norm, which is rounded to x's type first."""
    return quantize_fp8(rms_norm(x_TE, weight_E, eps), scale_1)


def rms_norm_fp8_per_token(x_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """apply_row_stats_fp8 of x's own statistics."""
    return apply_row_stats_fp8(x_TE, RowStats(row_stats(x_TE, weight_E), weight_E, eps))


def add_rms_norm(residual_TE: Tensor, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """residual += x in place, then rms_norm of it."""
    residual_TE += x_TE
    return rms_norm(residual_TE, weight_E, eps)


def add_rms_norm_fp8(residual_TE: Tensor, x_TE: Tensor, weight_E: Tensor, scale_1: Tensor, eps: float) -> Tensor:
    """residual += x in place, then rms_norm_fp8 of it."""
    residual_TE += x_TE
    return rms_norm_fp8(residual_TE, weight_E, scale_1, eps)


def add_rms_norm_fp8_per_token(
    residual_TE: Tensor, x_TE: Tensor, weight_E: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual += x in place, then rms_norm_fp8_per_token of it."""
    residual_TE += x_TE
    return rms_norm_fp8_per_token(residual_TE, weight_E, eps)


@dataclass(frozen=True)
class RowStats:
    """Rows whose statistics came with them, and the norm that they are still to go through."""

    stats: Tensor  # [T, blocks, 2] float32: per block of columns, sum of x^2 and largest |x * norm weight|
    norm_weight: Tensor | None = None  # None: no norm
    eps: float = 0.0


def row_stats(x_TX: Tensor, norm_weight: Tensor | None, block: int = STATS_BLOCK) -> Tensor:
    """[T, blocks of columns, 2] float32: sum of x^2, largest |x * norm_weight| (|x| without a norm)."""
    wide_TX = wide(x_TX)
    weighted_TX = wide_TX if norm_weight is None else wide_TX * norm_weight

    def blocks(t_TX: Tensor) -> Tensor:
        missing = -t_TX.shape[1] % block  # zeros, which change neither
        return (functional.pad(t_TX, (0, missing)) if missing else t_TX).unflatten(1, (-1, block))

    return torch.stack([blocks(wide_TX).square().sum(-1), blocks(weighted_TX).abs().amax(-1)], -1).float()


def apply_row_stats(x_TX: Tensor, rows: RowStats) -> Tensor:
    """rms_norm of x by the given statistics; x if there is no norm."""
    if rows.norm_weight is None:
        return x_TX
    return rows.norm_weight * (wide(x_TX) * _inv_rms(x_TX, rows)).to(x_TX.dtype)


def apply_row_stats_fp8(x_TX: Tensor, rows: RowStats) -> tuple[Tensor, Tensor]:
    """The same divided by scale [T] = largest |x * norm_weight| / rms / 448, and the scale."""
    largest_T1 = rows.stats[..., 1].amax(-1, keepdim=True)
    if rows.norm_weight is not None:
        largest_T1 = largest_T1 * _inv_rms(x_TX, rows)
    scale_T1 = (largest_T1 / FP8_MAX).clamp(min=MIN_SCALE)
    return quantize_fp8(apply_row_stats(x_TX, rows), scale_T1), scale_T1[:, 0]


def _inv_rms(x_TX: Tensor, rows: RowStats) -> Tensor:
    return torch.rsqrt(rows.stats[..., 0].sum(-1, keepdim=True) / x_TX.shape[1] + rows.eps)


def quantize_fp8(x_TX: Tensor, scale_1: Tensor) -> Tensor:
    """round_e4m3(x / scale), saturating."""
    return (wide(x_TX) / scale_1).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def quantize_fp8_per_token(x_TX: Tensor) -> tuple[Tensor, Tensor]:
    """The quantised rows [T, X] and their scales [T] = max|x| / 448."""
    scale_T = (wide(x_TX).abs().amax(-1) / FP8_MAX).clamp(min=MIN_SCALE).float()
    return quantize_fp8(x_TX, scale_T[:, None]), scale_T


def linear(x_TK: Tensor, weight_NK: Tensor, x_scale: Tensor | None, weight_scale: Tensor | None) -> Tensor:
    """x @ weight^T, [T, N]; for FP8 operands in FP32 and times their scales ([1] or one per row)."""
    if weight_NK.dtype != FP8:
        return functional.linear(x_TK, weight_NK)
    wide_TK = x_TK.float()
    rows = max(1, CHUNK_ELEMENTS // max(1, weight_NK.shape[1]))  # widened at a time
    parts = [functional.linear(wide_TK, part.float()) for part in weight_NK.split(rows)]
    return torch.cat(parts, -1) * x_scale.reshape(-1, 1) * weight_scale


def silu_mul(gate_up_TX: Tensor) -> Tensor:
    """silu(gate) * up, [T, F], of rows that hold gate then up."""
    gate_TF, up_TF = wide(gate_up_TX).chunk(2, dim=-1)
    return functional.silu(gate_TF) * up_TF


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
