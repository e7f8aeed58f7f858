# SPDX-License-Identifier: Apache-2.0
"""Packed weights: the format of csrc/host/weight_layout.h in torch, and the reference of the ops on it.

packed [blocks of 128 rows, k tiles of 128 bytes, 128 rows, 128 bytes] in the weight's type; the eight 16-byte chunks
of row r are permuted by xor with r % 8; rows and columns beyond the weight are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_fast import _C, reference

BLOCK_ROWS = 128
TILE_BYTES = 128  # of K
CPU_WORKSPACE_BYTES = 16  # the CPU backend needs none


def packed_shape(num_rows: int, num_cols: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Shape of the packed form of a weight [N, K]; N and K are multiples of 16."""
    if num_rows <= 0 or num_cols <= 0 or num_rows % 16 or num_cols % 16:
        raise ValueError(f"a weight [{num_rows}, {num_cols}] cannot be packed: want positive multiples of 16")
    tile = TILE_BYTES // dtype.itemsize
    return -(-num_rows // BLOCK_ROWS), -(-num_cols // tile), BLOCK_ROWS, tile


def make_workspace(device: torch.device | str) -> Tensor:
    """What the packed linears on one stream share. All bits are set: "no partial sum here yet"."""
    device = torch.device(device)
    size = CPU_WORKSPACE_BYTES
    if device.type == "cuda":
        size = _C.linear_workspace_bytes(torch.cuda.get_device_properties(device).multi_processor_count)
    return torch.full((size,), 255, dtype=torch.uint8, device=device)


def interleave(gate_up_XK: Tensor) -> Tensor:
    """Rows of gate, then up, to eight of each in turn."""
    _, K = gate_up_XK.shape
    return _bits(gate_up_XK).view(2, -1, 8, K).transpose(0, 1).reshape(-1, K).view(gate_up_XK.dtype)


def deinterleave(rows_XK: Tensor) -> Tensor:
    """The inverse of interleave."""
    _, K = rows_XK.shape
    return _bits(rows_XK).view(-1, 2, 8, K).transpose(0, 1).reshape(-1, K).view(rows_XK.dtype)


def pack_weight(weight_NK: Tensor, gate_up: bool) -> Tensor:
    """The packed form of a weight; a gate_up weight has its rows interleaved first."""
    if gate_up:
        weight_NK = interleave(weight_NK)
    blocks, k_tiles, rows, tile = packed_shape(*weight_NK.shape, weight_NK.dtype)
    padded = torch.zeros(blocks * rows, k_tiles * tile, dtype=weight_NK.dtype, device=weight_NK.device)
    padded[: weight_NK.shape[0], : weight_NK.shape[1]] = weight_NK
    tiles = padded.view(torch.uint8).view(blocks, rows, k_tiles, 8, 16).transpose(1, 2)
    return _swizzle(tiles).view(blocks, k_tiles, rows, TILE_BYTES).view(weight_NK.dtype)


def unpack_weight(packed: Tensor, num_rows: int, num_cols: int, *, gate_up: bool = False) -> Tensor:
    """The weight [N, K] of a packed form."""
    blocks, k_tiles, rows, _ = packed.shape
    tiles = _swizzle(packed.view(torch.uint8).view(blocks, k_tiles, rows, 8, 16)).transpose(1, 2)
    weight_NK = tiles.reshape(blocks * rows, k_tiles * TILE_BYTES).view(packed.dtype)[:num_rows, :num_cols].contiguous()
    return deinterleave(weight_NK) if gate_up else weight_NK


def packed_linear(
    x_TK: Tensor,
    packed: Tensor,
    num_rows: int,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    x_rows: reference.RowStats | None = None,
) -> Tensor:
    """x @ weight^T times the scales, [T, N], in FP32. With `x_rows`, x is normalised and quantised by them first."""
    x_TK, x_scale = _ready(x_TK, packed, x_scale, x_rows)
    return _linear(x_TK, unpack_weight(packed, num_rows, x_TK.shape[1]), x_scale, weight_scale)


def packed_linear_add(
    residual_TN: Tensor,
    x_TK: Tensor,
    packed: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    x_rows: reference.RowStats | None = None,
    next_norm_weight: Tensor | None = None,
) -> Tensor:
    """residual += x @ weight^T, which is rounded first. Returns row_stats of the residual."""
    y_TN = packed_linear(x_TK, packed, residual_TN.shape[1], x_scale, weight_scale, x_rows)
    residual_TN += y_TN.to(residual_TN.dtype)
    return reference.row_stats(residual_TN, next_norm_weight)


def packed_swiglu(
    x_TK: Tensor,
    packed: Tensor,
    width: int,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    out_scale: Tensor | None,
    x_rows: reference.RowStats | None = None,
) -> Tensor:
    """silu(gate) * up of a packed gate_up weight, [T, F]: rounded to bf16 before and after, then e4m3 if out_scale."""
    x_TK, x_scale = _ready(x_TK, packed, x_scale, x_rows)
    weight_XK = unpack_weight(packed, 2 * width, x_TK.shape[1], gate_up=True)
    gate_up_TX = _linear(x_TK, weight_XK, x_scale, weight_scale).bfloat16()
    h_TF = reference.silu_mul(gate_up_TX).bfloat16()
    return h_TF if out_scale is None else reference.quantize_fp8(h_TF, out_scale)


def _ready(
    x_TK: Tensor, packed: Tensor, x_scale: Tensor | None, x_rows: reference.RowStats | None
) -> tuple[Tensor, Tensor | None]:
    """x in the weight's type and its scale."""
    if x_rows is None:
        return x_TK, x_scale
    if packed.dtype == torch.bfloat16:
        return reference.apply_row_stats(x_TK, x_rows), None
    if x_scale is not None:
        return reference.quantize_fp8(reference.apply_row_stats(x_TK, x_rows), x_scale), x_scale
    return reference.apply_row_stats_fp8(x_TK, x_rows)


def _linear(x_TK: Tensor, weight_NK: Tensor, x_scale: Tensor | None, weight_scale: Tensor | None) -> Tensor:
    y_TN = x_TK.float() @ weight_NK.float().T
    if x_scale is not None:
        y_TN = y_TN * x_scale.reshape(-1, 1)
    return y_TN if weight_scale is None else y_TN * weight_scale


def _swizzle(tiles: Tensor) -> Tensor:
    """Permutes the chunks of [..., rows, 8, 16]; its own inverse."""
    rows = torch.arange(tiles.shape[-3], device=tiles.device)[:, None]
    chunk = torch.arange(8, device=tiles.device) ^ (rows % 8)
    return tiles[..., rows, chunk, :]


def _bits(x: Tensor) -> Tensor:
    """Integers of the same size: some copies are not implemented for FP8."""
    return x.view({1: torch.uint8, 2: torch.int16}[x.dtype.itemsize])
