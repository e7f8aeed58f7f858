# SPDX-License-Identifier: Apache-2.0
"""Ops that do the work of several others in one launch: as those in turn, which is what the kernels must equal, and
their CPU backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_fast import reference


def decode_attention(
    qkv_TX: Tensor,
    k_cache_PKBD: Tensor,
    v_cache_PKBD: Tensor,
    cos_sin_SD: Tensor,
    page_table_SP: Tensor,
    q_start_S: Tensor,
    kv_len_S: Tensor,
    softmax_scale: float,
    k_scale: float,
    v_scale: float,
    out_scale: Tensor | None,
) -> Tensor:
    """rope_append, but that qkv stays as it is, then attention and, with an out_scale, quantize_fp8."""
    num_kv, page_size, dim = k_cache_PKBD.shape[1:]
    counts_S = q_start_S.diff()
    seq_T = torch.arange(len(counts_S)).repeat_interleave(counts_S)
    positions_T = torch.arange(len(qkv_TX)) - q_start_S[1:][seq_T] + kv_len_S[seq_T]
    slots_T = page_table_SP[seq_T, positions_T // page_size] * page_size + positions_T % page_size
    qkv_TX, caches = qkv_TX.clone(), (k_cache_PKBD, v_cache_PKBD)
    reference.rope_append(qkv_TX, *caches, cos_sin_SD, positions_T, slots_T, k_scale, v_scale)
    q_THD = qkv_TX.unflatten(1, (-1, dim))[:, : -2 * num_kv]
    sequences = (page_table_SP, q_start_S, kv_len_S)
    out_THD = reference.attention(q_THD, *caches, *sequences, softmax_scale, k_scale, v_scale)
    return out_THD if out_scale is None else reference.quantize_fp8(out_THD, out_scale)


def _decode_attention_op(out: Tensor, *args: Tensor | float | None) -> None:
    out.copy_(decode_attention(*args))


OP_NAMES = ("decode_attention",)

_library = torch.library.Library("nemotron_fast", "IMPL")
_library.impl("decode_attention", _decode_attention_op, "CPU")
_library.impl("decode_attention", lambda *_: None, "Meta")  # the output is given, so its shape needs no inference
