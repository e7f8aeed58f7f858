# SPDX-License-Identifier: Apache-2.0
"""RoPE and attention in plain torch, as reference.py has the other ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_fast.reference import CHUNK_ELEMENTS, FP8, FP8_MAX, quantize_fp8, quantize_fp8_per_token, wide

MOST_DECODE_QUERIES = 8  # sequences with more in a step are prompts (kMostDecodeQueries)
WEIGHT_SCALE = 256.0  # of softmax weights in e4m3: 1 becomes 256


def rope_append(
    qkv_TX: Tensor,
    k_cache_PKBD: Tensor,
    v_cache_PKBD: Tensor,
    cos_sin_SD: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    k_scale: float,
    v_scale: float,
    num_rotated: int,
) -> None:
    """Write rotated k and v to their slots (page * page size + offset); rotate the first num_rotated q inside qkv.

    A slot outside the cache is not written. A cache of FP8 stores x / scale, saturating.
    """
    if not 0 <= num_rotated <= len(qkv_TX):  # as csrc/ops/rope.cpp
        raise RuntimeError(f"num_rotated: is {num_rotated}, want 0..{len(qkv_TX)}")
    num_pages, num_kv, page_size, dim = k_cache_PKBD.shape
    heads_TXD = qkv_TX.unflatten(1, (qkv_TX.shape[1] // dim, dim))
    rotate(heads_TXD[:num_rotated, : -2 * num_kv], cos_sin_SD[positions_T[:num_rotated]])
    kept_T = (slots_T >= 0) & (slots_T < num_pages * page_size)
    angles_TD, slots_T = cos_sin_SD[positions_T[kept_T]], slots_T[kept_T]
    append(heads_TXD[:, -2 * num_kv :][kept_T], k_cache_PKBD, v_cache_PKBD, angles_TD, slots_T, k_scale, v_scale)


def rotate(x_TXD: Tensor, cos_sin_TD: Tensor) -> None:
    """RoPE in place; a row of cos_sin is one token's."""
    x_TXD.copy_(_rotate(x_TXD, cos_sin_TD))


def append(
    kv_TXD: Tensor,
    k_cache_PKBD: Tensor,
    v_cache_PKBD: Tensor,
    cos_sin_TD: Tensor,
    slots_T: Tensor,
    k_scale: float,
    v_scale: float,
) -> None:
    """Write k, which it rotates, and v to their slots, all inside of the cache."""
    num_kv, page_size = k_cache_PKBD.shape[1:3]
    new_k_TKD, new_v_TKD = _rotate(kv_TXD[:, :num_kv], cos_sin_TD), kv_TXD[:, num_kv:]
    page, offset = slots_T // page_size, slots_T % page_size
    for cache, new, scale in ((k_cache_PKBD, new_k_TKD, k_scale), (v_cache_PKBD, new_v_TKD, v_scale)):
        if cache.dtype == FP8:  # indexed stores are not implemented for FP8: store its bytes
            stored = (wide(new) / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
            cache.view(torch.uint8)[page, :, offset] = stored.view(torch.uint8)
        else:
            cache[page, :, offset] = new.to(cache.dtype)


def _rotate(x_TXD: Tensor, cos_sin_TD: Tensor) -> Tensor:
    """Half-split RoPE; a row of cos_sin holds cos then sin, D/2 each."""
    cos, sin = cos_sin_TD.unsqueeze(1).chunk(2, dim=-1)
    low, high = wide(x_TXD).chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x_TXD.dtype)


def attention(
    q_THD: Tensor,
    k_cache_PKBD: Tensor,
    v_cache_PKBD: Tensor,
    page_table_SP: Tensor,
    q_start_S: Tensor,
    kv_len_S: Tensor,
    softmax_scale: float,
    k_scale: float,
    v_scale: float,
    out_scale: Tensor | None = None,
    cos_sin_SD: Tensor | None = None,
    fp8_products: bool = False,
    per_query: bool = False,
) -> Tensor:
    """Causal attention over paged KV, variable lengths, grouped heads; with an out_scale, quantize_fp8 of it.

    Sequence s owns the queries q_start[s]..q_start[s+1]-1; they are the last of its kv_len[s] tokens. Rows behind the
    last query, which decode_attention may have, are zero in the result. Of prompts: with cos_sin q is not rotated yet;
    `fp8_products`: through _attend_fp8.
    """
    if fp8_products:
        _check_fp8_products(k_cache_PKBD, per_query)
    if cos_sin_SD is not None and per_query:  # as csrc/ops/attention.cpp
        raise RuntimeError("q: cos_sin is for many queries, want no per_query")
    out_THD = torch.zeros_like(q_THD, memory_format=torch.contiguous_format)
    page_size = k_cache_PKBD.shape[2]
    starts, lengths = q_start_S.tolist(), kv_len_S.tolist()
    for s, length in enumerate(lengths):
        rows = slice(starts[s], starts[s + 1])
        q_NHD, num_new = q_THD[rows], starts[s + 1] - starts[s]
        pages = page_table_SP[s, : -(-length // page_size)]
        is_prompt = num_new > MOST_DECODE_QUERIES
        if is_prompt and cos_sin_SD is not None:
            q_NHD = _rotate(q_NHD, cos_sin_SD[length - num_new : length])
        if is_prompt and fp8_products:
            k_KSD, v_KSD = (_gather(cache, pages, length, 1.0) for cache in (k_cache_PKBD, v_cache_PKBD))
            out_THD[rows] = _attend_fp8(q_NHD, k_KSD, v_KSD, softmax_scale * k_scale, v_scale).to(out_THD.dtype)
            continue
        k_KSD = _gather(k_cache_PKBD, pages, length, k_scale)
        v_KSD = _gather(v_cache_PKBD, pages, length, v_scale)
        q_HND = wide(q_NHD).transpose(0, 1)
        mask = None
        if num_new > 1:
            mask = torch.ones(num_new, length, dtype=torch.bool).tril(length - num_new)
        o_HND = functional.scaled_dot_product_attention(
            q_HND[None],
            k_KSD[None].to(q_HND.dtype),
            v_KSD[None].to(q_HND.dtype),
            mask,
            scale=softmax_scale,
            enable_gqa=True,
        )[0]
        out_THD[rows] = o_HND.transpose(0, 1).to(out_THD.dtype)
    return out_THD if out_scale is None else quantize_fp8(out_THD, out_scale)


def _attend_fp8(q_NHD: Tensor, k_KSD: Tensor, v_KSD: Tensor, score_scale: float, v_scale: float) -> Tensor:
    """One prompt's attention with the operands of both products in e4m3, on the codes of keys and values, [N, H, D].

    Rows of q are quantize_fp8_per_token's. Weights are exp(score - the largest of the row); times values go those
    rounded, 256 for 1, and their sum is that of the unrounded ones. (The kernel takes the largest of the keys so far,
    in blocks of 128 from the last to the first: where that is not the row's, it rounds other multiples.)
    """
    (N, H, _), (K, S, _) = q_NHD.shape, k_KSD.shape
    rounded_q = quantize_fp8_per_token(q_NHD.flatten(0, 1))
    codes_XD, scale_X, k_KSD, v_KSD = (t.to(wide(q_NHD).dtype) for t in (*rounded_q, k_KSD, v_KSD))
    codes_NKGD = codes_XD.view(N, K, H // K, -1)
    scale_KGN1 = scale_X.view(N, K, H // K).permute(1, 2, 0)[..., None] * score_scale
    rows = max(1, CHUNK_ELEMENTS // (H * S))  # of which the scores are there at a time
    parts = []
    for begin in range(0, N, rows):
        end = min(begin + rows, N)
        seen = S - N + end  # keys that the last of these queries sees
        hidden = torch.ones(end - begin, seen, dtype=torch.bool, device=q_NHD.device).triu(seen - (end - begin) + 1)
        scores_KGNS = torch.einsum("nkgd,ksd->kgns", codes_NKGD[begin:end], k_KSD[:, :seen])
        scores_KGNS = (scores_KGNS * scale_KGN1[:, :, begin:end]).masked_fill(hidden, -torch.inf)
        weights_KGNS = torch.exp(scores_KGNS - scores_KGNS.amax(-1, keepdim=True))
        rounded_KGNS = (weights_KGNS * WEIGHT_SCALE).to(FP8).to(k_KSD.dtype)
        sums_KGND = torch.einsum("kgns,ksd->kgnd", rounded_KGNS, v_KSD[:, :seen])
        sums_KGND *= v_scale / (WEIGHT_SCALE * weights_KGNS.sum(-1, keepdim=True))
        parts.append(sums_KGND.permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(parts)


def _check_fp8_products(k_cache_PKBD: Tensor, per_query: bool) -> None:
    """As csrc/ops/attention.cpp."""
    if per_query:
        raise RuntimeError("q: fp8_products are of many queries, want no per_query")
    dtype, dim = k_cache_PKBD.dtype, k_cache_PKBD.shape[3]
    if dtype != FP8:
        found = str(dtype).removeprefix("torch.")
        raise RuntimeError(
            f"k_cache: dtype is {found}, want float8_e4m3fn for fp8_products; call without them, or keep keys and "
            "values in e4m3"
        )
    if dim != 128:
        raise RuntimeError(f"k_cache: head size is {dim}, want 128 for fp8_products; call without them")


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
    """rope_append, but that qkv stays as it is, then attention."""
    num_kv, page_size, dim = k_cache_PKBD.shape[1:]
    counts_S = q_start_S.diff()
    seq_T = torch.arange(len(counts_S)).repeat_interleave(counts_S)
    positions_T = torch.arange(len(seq_T)) - q_start_S[1:][seq_T] + kv_len_S[seq_T]
    slots_T = page_table_SP[seq_T, positions_T // page_size] * page_size + positions_T % page_size
    qkv_TX, caches = qkv_TX.clone(), (k_cache_PKBD, v_cache_PKBD)
    rope_append(qkv_TX[: len(seq_T)], *caches, cos_sin_SD, positions_T, slots_T, k_scale, v_scale, len(seq_T))
    q_THD = qkv_TX.unflatten(1, (-1, dim))[:, : -2 * num_kv]
    sequences = (page_table_SP, q_start_S, kv_len_S)
    return attention(q_THD, *caches, *sequences, softmax_scale, k_scale, v_scale, out_scale)


def _gather(cache_PKBD: Tensor, pages: Tensor, length: int, scale: float) -> Tensor:
    """The first `length` tokens of a page list as [K, length, D]; FP8 is multiplied by its scale."""
    if cache_PKBD.dtype == FP8:
        picked = cache_PKBD.view(torch.uint8)[pages].view(FP8).float() * scale
    else:
        picked = cache_PKBD[pages]
    return picked.transpose(0, 1).flatten(1, 2)[:, :length]
