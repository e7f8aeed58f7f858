# SPDX-License-Identifier: Apache-2.0
"""attention (decode and one prefill) against SDPA on contiguous BF16 keys and values, decode_attention against the two
ops that it fuses and SDPA, which does less, and rope_append against torch.

python bench/bench_attention.py [--device cuda|cpu] [--only attention-fp8]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_fast import ops, reference, reference_attention
from nemotron_fast.testing import cases, compare, runner

PAGE = 64


@dataclass(frozen=True)
class Paged:
    q: Tensor  # [S * new, H, D]
    dense: tuple[Tensor, Tensor]  # k and v as SDPA wants them, [S, K, length, D]
    caches: tuple[Tensor, Tensor]  # the same in pages
    table: Tensor
    q_start: Tensor
    kv_len: Tensor


def make_paged(case: cases.AttentionCase, device: torch.device) -> Paged:
    pages = -(-case.length // PAGE)
    table = torch.randperm(case.S * pages, device=device).view(case.S, pages)
    q = runner.randn(case.S * case.new, case.H, case.D, device=device)
    caches, dense = [], []
    for _ in "kv":
        values = runner.randn(case.S, case.K, pages, PAGE, case.D, device=device)
        if case.fp8_kv:
            values = values.to(reference.FP8).to(values.dtype)  # what the peer sees is what the cache holds
        cache = torch.empty(case.S * pages, case.K, PAGE, case.D, dtype=values.dtype, device=device)
        cache[table] = values.transpose(1, 2)
        caches.append(cache.to(reference.FP8) if case.fp8_kv else cache)
        dense.append(values.flatten(2, 3)[:, :, : case.length].contiguous())
    q_start = torch.arange(0, (case.S + 1) * case.new, case.new, device=device)
    return Paged(q, tuple(dense), tuple(caches), table, q_start, torch.full((case.S,), case.length, device=device))


def our_attention(s: Paged, *, fp8_products: bool = False) -> Tensor:
    options = {"softmax_scale": s.q.shape[2] ** -0.5, "fp8_products": fp8_products}
    return ops.attention(s.q, *s.caches, s.table, s.q_start, s.kv_len, **options)


def sdpa(s: Paged, dtype: torch.dtype | None = None) -> Tensor:
    """Every case has one new token or nothing but new tokens: no mask, or the plain causal one."""
    q = s.q.view(s.table.shape[0], -1, *s.q.shape[1:]).transpose(1, 2)
    operands = [t.to(dtype or t.dtype) for t in (q, *s.dense)]
    out = functional.scaled_dot_product_attention(*operands, is_causal=q.shape[2] > 1, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Decode:
    paged: Paged
    qkv: Tensor  # [S, (H + 2K) D]
    cos_sin: Tensor
    positions: Tensor
    slots: Tensor

    def to(self, qkv: Tensor, caches: tuple[Tensor, Tensor]) -> Decode:
        return replace(self, qkv=qkv, paged=replace(self.paged, caches=caches))


def make_decode(case: cases.AttentionCase, device: torch.device) -> Decode:
    paged = make_paged(case, device)
    position = case.length - 1
    angles = torch.rand(case.length, case.D // 2, device=device) * 6
    return Decode(
        paged,
        runner.randn(case.S, (case.H + 2 * case.K) * case.D, device=device),
        torch.cat((angles.cos(), angles.sin()), -1),
        paged.kv_len - 1,
        paged.table[:, position // PAGE] * PAGE + position % PAGE,
    )


def our_decode_attention(s: Decode) -> Tensor:
    p, dim = s.paged, s.cos_sin.shape[1]
    sequences = (p.table, p.q_start, p.kv_len)
    return ops.decode_attention(s.qkv, *p.caches, s.cos_sin, *sequences, softmax_scale=dim**-0.5)


def two_ops(s: Decode) -> Tensor:
    p, dim = s.paged, s.cos_sin.shape[1]
    ops.rope_append(s.qkv, *p.caches, s.cos_sin, s.positions, s.slots)
    q = s.qkv.view(len(s.qkv), -1, dim)[:, : p.q.shape[1]]
    return ops.attention(q, *p.caches, p.table, p.q_start, p.kv_len, softmax_scale=dim**-0.5)


def check_decode(s: Decode, call: runner.Call) -> None:
    found, want = (s.to(s.qkv.clone(), tuple(c.clone() for c in s.paged.caches)) for _ in range(2))
    compare.assert_bit_equal(call(found), two_ops(want))
    for cache, want_cache in zip(found.paged.caches, want.paged.caches, strict=True):
        compare.assert_bit_equal(cache.view(torch.uint8), want_cache.view(torch.uint8))


def our_rope_append(s: list[Tensor]) -> None:
    ops.rope_append(*s)


def torch_rope_append(s: list[Tensor]) -> None:
    """The reference, for slots that are all inside of the cache: to look for others it would wait for the GPU."""
    qkv, *caches, cos_sin, positions, slots = s
    num_kv, angles = caches[0].shape[1], cos_sin[positions]
    heads = qkv.unflatten(1, (-1, cos_sin.shape[1]))
    reference_attention.rotate(heads[:, : -2 * num_kv], angles)
    reference_attention.append(heads[:, -2 * num_kv :], *caches, angles, slots, 1.0, 1.0)


def make_rope(case: cases.RopeCase, device: torch.device) -> list[Tensor]:
    qkv = runner.randn(case.T, (case.H + 2 * case.K) * case.D, device=device)
    dtype = reference.FP8 if case.fp8_kv else torch.bfloat16
    pages = -(-case.T // PAGE)
    caches = [torch.zeros(pages, case.K, PAGE, case.D, device=device).to(dtype) for _ in "kv"]
    angles = torch.rand(max(case.T, 128), case.D // 2, device=device) * 6
    positions = torch.randperm(len(angles), device=device)[: case.T]
    slots = torch.randperm(pages * PAGE, device=device)[: case.T]
    return [qkv, *caches, torch.cat((angles.cos(), angles.sin()), -1), positions, slots]


def check_rope(s: list[Tensor], call: runner.Call) -> None:
    found, want = ([t.clone() for t in s] for _ in range(2))
    want[0] = want[0].float()
    call(found)
    torch_rope_append(want)
    compare.assert_close(found[0], want[0], rtol=2**-7, atol=2**-7)
    step = 2**-3 if s[1].dtype == reference.FP8 else 2**-7
    for cache, want_cache in zip(found[1:3], want[1:3], strict=True):
        compare.assert_close(cache, want_cache, rtol=step, atol=2**-7)


def rows(device: torch.device, quick: bool) -> Iterator[runner.Row]:
    near = runner.equals(partial(sdpa, dtype=torch.float32), rtol=2**-6, atol=2**-7)  # softmax weights rounded to BF16
    for case in cases.ATTENTION_BENCH_CPU if quick else cases.ATTENTION_BENCH:
        yield runner.Row(case, partial(make_paged, case, device), our_attention, {"sdpa bf16": sdpa}, near)
    for case in cases.DECODE_BENCH_CPU if quick else cases.DECODE_BENCH:
        peers = {"two ops": two_ops, "sdpa bf16": lambda s: sdpa(s.paged)}
        make = partial(make_decode, case, device)
        yield runner.Row(case, make, our_decode_attention, peers, check_decode, lambda *_: None)
    for case in cases.ROPE_BENCH_CPU if quick else cases.ROPE_BENCH:
        peers = runner.eager_and_compiled(torch_rope_append, device)
        yield runner.Row(case, partial(make_rope, case, device), our_rope_append, peers, check_rope)


if __name__ == "__main__":
    runner.main("attention", __doc__, rows)
