# SPDX-License-Identifier: Apache-2.0
"""The wrappers of RoPE and attention, as ops.py has the others, and there they are too."""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_fast import reference

_ops = torch.ops.nemotron_fast


def rope_append(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    num_rotated: int | None = None,
) -> None:
    """Append rotated k and v of qkv [T, (H + 2K) D] to the caches [P, K, B, D] and rotate q in place.

    cos_sin [positions, D] float32 (cos, then sin); positions [T] int64; slots [T] int64 = page * B + offset, a
    token with a slot outside the cache is not appended, but has a position. q is rotated of the first `num_rotated`
    tokens, None is T: attention may do the rest.
    """
    num_rotated = len(qkv) if num_rotated is None else num_rotated
    _ops.rope_append.default(qkv, k_cache, v_cache, cos_sin, positions, slots, k_scale, v_scale, num_rotated)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    *,
    softmax_scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out_scale: Tensor | None = None,
    cos_sin: Tensor | None = None,
    fp8_products: bool = False,
    per_query: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """out [T, H, D]: causal attention of q [T, H, D] over the caches [P, K, B, D]; e4m3 if there is an out_scale [1].

    page_table [S, pages] int64, q_start [S + 1] int64, kv_len [S] int64: sequence s owns queries
    q_start[s]..q_start[s+1]-1, which are the last of its kv_len[s] cached tokens. Where these are more than
    MOST_DECODE_QUERIES: with cos_sin [positions, D] q comes unrotated (that of shorter sequences rotated) and RoPE is
    applied here (sm_90a); with `fp8_products` (e4m3 caches, D 128) q (a scale a row) and softmax weights round to e4m3.
    `per_query`: bits as if alone; with neither of these.
    """
    if out is None:
        dtype = q.dtype if out_scale is None else reference.FP8
        out = torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    args = (softmax_scale, k_scale, v_scale, out_scale, cos_sin, fp8_products, per_query)
    _ops.attention.default(out, q, k_cache, v_cache, page_table, q_start, kv_len, *args)
    return out


def decode_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos_sin: Tensor,
    page_table: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    *,
    softmax_scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """rope_append, then attention, of steps with at most 8 new tokens a sequence; out is e4m3 if there is an out_scale.

    qkv [T, (H + 2K) D] is unrotated and stays so. A token's position is its index in its sequence, its slot is where
    page_table has that position. Rows from q_start[S] on are padding: zero in out. out_scale [1] float32: out is
    quantize_fp8 of the attention.
    """
    if out is None:
        dim = k_cache.shape[3]
        num_heads = qkv.shape[1] // dim - 2 * k_cache.shape[1]
        dtype = qkv.dtype if out_scale is None else reference.FP8
        out = torch.empty(qkv.shape[0], num_heads, dim, dtype=dtype, device=qkv.device)
    scales = (softmax_scale, k_scale, v_scale, out_scale)
    _ops.decode_attention.default(out, qkv, k_cache, v_cache, cos_sin, page_table, q_start, kv_len, *scales)
    return out
