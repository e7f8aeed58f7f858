# SPDX-License-Identifier: Apache-2.0
"""Every op in plain torch: the oracle for the kernels, and (through cpu_backend.py) the CPU backend.

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
MOST_DECODE_QUERIES = 8  # sequences with more in a step are prompts (kMostDecodeQueries)
WEIGHT_SCALE = 256.0  # of softmax weights in e4m3: 1 becomes 256
MIN_SCALE = 1e-12  # of a dynamic scale, so that an all-zero row divides by something


def embed(ids_T: Tensor, weight_VE: Tensor) -> Tensor:
    """Rows of the table; an id outside it (another rank's) gives a row of zeros."""
    inside = (ids_T >= 0) & (ids_T < weight_VE.shape[0])
    if bool(inside.all()):
        return weight_VE[ids_T]
    return torch.where(inside[:, None], weight_VE[ids_T.clamp(0, weight_VE.shape[0] - 1)], 0)


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's type, then times weight and rounded again (as Llama does)."""
    wide = _wide(x_TE)
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
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
    wide_TX = _wide(x_TX)
    weighted_TX = wide_TX if norm_weight is None else wide_TX * norm_weight
    parts = zip(wide_TX.split(block, -1), weighted_TX.split(block, -1), strict=True)
    return torch.stack([torch.stack([x.square().sum(-1), w.abs().amax(-1)], -1) for x, w in parts], 1).float()


def apply_row_stats(x_TX: Tensor, rows: RowStats) -> Tensor:
    """rms_norm of x by the given statistics; x if there is no norm."""
    if rows.norm_weight is None:
        return x_TX
    return rows.norm_weight * (_wide(x_TX) * _inv_rms(x_TX, rows)).to(x_TX.dtype)


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
    return (_wide(x_TX) / scale_1).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def quantize_fp8_per_token(x_TX: Tensor) -> tuple[Tensor, Tensor]:
    """The quantised rows [T, X] and their scales [T] = max|x| / 448."""
    scale_T = (_wide(x_TX).abs().amax(-1) / FP8_MAX).clamp(min=MIN_SCALE).float()
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
    gate_TF, up_TF = _wide(gate_up_TX).chunk(2, dim=-1)
    return functional.silu(gate_TF) * up_TF


def rope_append(
    qkv_TX: Tensor,
    k_cache_PKBD: Tensor,
    v_cache_PKBD: Tensor,
    cos_sin_SD: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    k_scale: float,
    v_scale: float,
) -> None:
    """Rotate q and k inside qkv (half-split RoPE), and write k and v to their slots (page * page size + offset).

    Row p of cos_sin holds cos then sin, D/2 each, of position p. A cache of FP8 stores x / scale, saturating.
    """
    _, num_kv, page_size, dim = k_cache_PKBD.shape
    heads_TXD = qkv_TX.unflatten(1, (qkv_TX.shape[1] // dim, dim))
    rotated = heads_TXD[:, :-num_kv]  # q and k
    cos, sin = cos_sin_SD[positions_T].unsqueeze(1).chunk(2, dim=-1)
    low, high = _wide(rotated).chunk(2, dim=-1)
    rotated.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
    page, offset = slots_T // page_size, slots_T % page_size
    for cache, new, scale in (
        (k_cache_PKBD, heads_TXD[:, -2 * num_kv : -num_kv], k_scale),
        (v_cache_PKBD, heads_TXD[:, -num_kv:], v_scale),
    ):
        if cache.dtype == FP8:  # indexed stores are not implemented for FP8: store its bytes
            stored = (_wide(new) / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
            cache.view(torch.uint8)[page, :, offset] = stored.view(torch.uint8)
        else:
            cache[page, :, offset] = new.to(cache.dtype)


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
    fp8_products: bool = False,
    per_query: bool = False,
) -> Tensor:
    """Causal attention over paged KV, variable lengths, grouped heads; with an out_scale, quantize_fp8 of it.

    Sequence s owns the queries q_start[s]..q_start[s+1]-1; they are the last of its kv_len[s] tokens. Rows behind the
    last query, which decode_attention may have, are zero in the result. `fp8_products`: prompts through _attend_fp8.
    """
    if fp8_products:
        _check_fp8_products(k_cache_PKBD, per_query)
    out_THD = torch.zeros_like(q_THD, memory_format=torch.contiguous_format)
    page_size = k_cache_PKBD.shape[2]
    starts, lengths = q_start_S.tolist(), kv_len_S.tolist()
    for s, length in enumerate(lengths):
        rows = slice(starts[s], starts[s + 1])
        pages = page_table_SP[s, : -(-length // page_size)]
        if fp8_products and starts[s + 1] - starts[s] > MOST_DECODE_QUERIES:
            k_KSD, v_KSD = (_gather(cache, pages, length, 1.0) for cache in (k_cache_PKBD, v_cache_PKBD))
            out_THD[rows] = _attend_fp8(q_THD[rows], k_KSD, v_KSD, softmax_scale * k_scale, v_scale).to(out_THD.dtype)
            continue
        k_KSD = _gather(k_cache_PKBD, pages, length, k_scale)
        v_KSD = _gather(v_cache_PKBD, pages, length, v_scale)
        q_HND = _wide(q_THD[rows]).transpose(0, 1)
        num_new = q_HND.shape[1]
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
    codes_XD, scale_X, k_KSD, v_KSD = (t.to(_wide(q_NHD).dtype) for t in (*rounded_q, k_KSD, v_KSD))
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
    rope_append(qkv_TX[: len(seq_T)], *caches, cos_sin_SD, positions_T, slots_T, k_scale, v_scale)
    q_THD = qkv_TX.unflatten(1, (-1, dim))[:, : -2 * num_kv]
    sequences = (page_table_SP, q_start_S, kv_len_S)
    return attention(q_THD, *caches, *sequences, softmax_scale, k_scale, v_scale, out_scale)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gather(cache_PKBD: Tensor, pages: Tensor, length: int, scale: float) -> Tensor:
    """The first `length` tokens of a page list as [K, length, D]; FP8 is multiplied by its scale."""
    if cache_PKBD.dtype == FP8:
        picked = cache_PKBD.view(torch.uint8)[pages].view(FP8).float() * scale
    else:
        picked = cache_PKBD[pages]
    return picked.transpose(0, 1).flatten(1, 2)[:, :length]
