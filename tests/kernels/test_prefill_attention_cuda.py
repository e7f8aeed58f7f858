# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend of attention where sequences have more than 8 queries: prompts, chunks of them, mixed batches."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from test_attention_cuda import FP8, Problem
from torch import Tensor

from nemotron_fast import ops, reference_attention
from nemotron_fast.testing.compare import assert_bit_equal, assert_close, poison

pytestmark = pytest.mark.gpu
# New tokens, all tokens: whole prompts around the edges of tiles and blocks, later chunks, decoding between them.
KINDS = {"bf16": {}, "e4m3": {"kv_dtype": FP8}, "e4m3 products": {"kv_dtype": FP8, "fp8_products": True}}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_kind_and_size = pytest.mark.parametrize(
    "D,kind",
    [
        pytest.param(D, kind, id=f"{D}-{name}")
        for (name, kind), D in itertools.product(KINDS.items(), (64, 128))
        if D == 128 or "fp8_products" not in kind
    ],
)
MIXED = [(9, 9), (65, 65), (1, 70), (200, 333), (1, 1), (8, 100), (500, 1200), (128, 128), (129, 129), (16, 2048)]


def run_chunk(problem: Problem, s: int, begin: int, end: int) -> Tensor:
    """New tokens [begin, end) of sequence s, as if what follows were not there yet."""
    new, length = problem.shape[s]
    first = int(problem.q_start[s])
    q = problem.q[first + begin : first + end]
    return ops.attention(
        q,
        *problem.caches,
        problem.table[s : s + 1],
        torch.tensor([0, end - begin], device="cuda"),
        torch.tensor([length - new + end], device="cuda"),
        softmax_scale=problem.D**-0.5,
        k_scale=problem.k_scale,
        v_scale=problem.v_scale,
        fp8_products=problem.fp8_products,
        out=poison(*q.shape, dtype=q.dtype, device="cuda"),
    )


@every_kind_and_size
@pytest.mark.parametrize("H,K", [(64, 8), (32, 2), (8, 8), (9, 3), (5, 1)])
def test_mixed_batch(H: int, K: int, D: int, kind: dict) -> None:
    problem = Problem(MIXED, H, K, D, **kind)
    out = problem.run()
    problem.check(out)
    assert_bit_equal(problem.run(), out)


@every_kind_and_size
@pytest.mark.parametrize("H,K", [(64, 8), (8, 8), (9, 3), (16, 1)])
def test_rotates_queries_of_prompts(H: int, K: int, D: int, kind: dict) -> None:
    """Bit for bit as if rope_append had done it; positions end with the longest sequence."""
    problem = Problem(MIXED, H, K, D, **kind)
    num_positions = max(length for _, length in MIXED)
    angles = torch.rand(num_positions, D // 2, device="cuda") * 6
    memory = torch.full((num_positions + 128, D), float("nan"), device="cuda")
    cos_sin = memory[:num_positions].copy_(torch.cat((angles.cos(), angles.sin()), -1))
    out = problem.run(cos_sin=cos_sin)

    few = torch.cat([torch.full((new,), new <= 8) for new, _ in MIXED]).cuda()
    positions = torch.cat([torch.arange(length - new, length) for new, length in MIXED]).cuda()
    qkv = torch.cat((problem.q.flatten(1), torch.zeros_like(problem.q[:, :1].repeat(1, 2 * K, 1)).flatten(1)), -1)
    scratch = [torch.zeros(len(qkv) // 64 + 1, K, 64, D, device="cuda", dtype=qkv.dtype) for _ in "kv"]
    ops.rope_append(qkv, *scratch, cos_sin, positions, torch.arange(len(qkv), device="cuda"))
    rotated = qkv.view(len(qkv), -1, D)[:, :H]
    problem.q = torch.where(few[:, None, None], problem.q, rotated).contiguous()
    assert_bit_equal(out, problem.run())


@every_kind
def test_half(kind: dict) -> None:
    """In the place of BF16."""
    problem = Problem(MIXED, 16, 2, **{"dtype": torch.float16, "kv_dtype": torch.float16} | kind)
    problem.check(problem.run())


@every_kind
def test_same_bits_alone_and_in_a_batch(kind: dict) -> None:
    problem = Problem(MIXED, 64, 8, **kind)
    out = problem.run()
    for s in range(len(MIXED)):
        rows = slice(int(problem.q_start[s]), int(problem.q_start[s + 1]))
        if MIXED[s][0] > 8:
            assert_bit_equal(problem.run(slice(s, s + 1)), out[rows])
    assert_bit_equal(problem.run(slice(2, 5)), out[int(problem.q_start[2]) : int(problem.q_start[5])])


@every_kind_and_size
@pytest.mark.parametrize("H,K", [(64, 8), (9, 3)])
def test_quantised_result(H: int, K: int, D: int, kind: dict) -> None:
    """The kernels of prompts and of decoding alike."""
    problem, scale = Problem(MIXED, H, K, D, **kind), torch.tensor([0.007], device="cuda")
    assert_bit_equal(problem.run(out_scale=scale).flatten(1), ops.quantize_fp8(problem.run().flatten(1), scale))


@every_kind
@pytest.mark.parametrize("H,K", [(64, 8), (9, 3)])
def test_same_bits_in_any_chunks(H: int, K: int, kind: dict) -> None:
    problem = Problem([(1000, 1500)], H, K, **kind)
    whole = problem.run()
    for cuts in ([0, 500, 1000], [0, 9, 77, 205, 461, 990, 1000], [0, 12, 24, 1000]):
        parts = [run_chunk(problem, 0, begin, end) for begin, end in itertools.pairwise(cuts)]
        assert_bit_equal(torch.cat(parts), whole)


@every_kind
def test_large_batch_and_long_context(kind: dict) -> None:
    problem = Problem([(20 + i % 50, 20 + i % 50 + 7 * i) for i in range(200)], 16, 2, **kind)
    problem.check(problem.run())
    problem = Problem([(300, 131072)], 8, 1, **kind)
    problem.check(problem.run())


def test_against_the_reference() -> None:
    """The oracle of the whole engine, on the CPU. It rounds nothing in between; we round the weights."""
    problem = Problem([(70, 200), (1, 90)], 16, 2)
    caches = [c.nan_to_num().cpu() for c in problem.caches]
    rest = [t.cpu() for t in (problem.table, problem.q_start, problem.kv_len)]
    want = reference_attention.attention(problem.q.cpu(), *caches, *rest, 128**-0.5, 1.0, 1.0)
    assert_close(problem.run(), want, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("equal_values", [False, True])
@pytest.mark.parametrize("H,K", [(64, 8), (9, 3)])
def test_fp8_products_round_as_the_reference(H: int, K: int, equal_values: bool) -> None:
    """Sequences of one block of keys: the largest score so far is the row's, so that both round the same weights.

    In units of what the reference's roundings change: 0.16 if the tensor cores, which keep 14 bits of a sum, err by
    2^-12 in scores and so push weights over borders; but 0.9 or more if q or the weights were not rounded, 1.3 if under
    another scale (all simulated). q is small, so that the roundings of weights count as much as its own. Where values
    are equal, the change is what the rounded weights sum to over what the others do.
    """
    problem = Problem([(128, 128), (9, 9), (30, 100), (65, 65)], H, K, kv_dtype=FP8, fp8_products=True)
    problem.q *= 0.25
    if equal_values:
        problem.caches[1] = torch.full(problem.caches[1].shape, 2.0, device="cuda").to(FP8)
    rest = (problem.table, problem.q_start, problem.kv_len)
    args = [t.cpu() for t in (problem.q, *problem.caches, *rest)]
    scales = (128**-0.5, problem.k_scale, problem.v_scale, None)
    rounded, exact = (
        reference_attention.attention(*args, *scales, None, products).float() for products in (True, False)
    )
    error, unit = ((t - rounded).square().mean().sqrt().item() for t in (problem.run().cpu().float(), exact))
    assert error <= 0.4 * unit


def test_fp8_products_are_those_of_prompts_alone() -> None:
    """Whatever the step holds besides; the last has fewer tokens than sequences."""
    for shape in ([(20, 50), (8, 100), (1, 300)], [(1, 40), (8, 8)], [(10, 50), *[(0, 5)] * 20]):
        problem = Problem(shape, 16, 2, kv_dtype=FP8, fp8_products=True)
        out, plain = (p.run() for p in (problem, dataclasses.replace(problem, fp8_products=False)))
        for s, (new, _) in enumerate(shape):
            rows = slice(int(problem.q_start[s]), int(problem.q_start[s + 1]))
            if new <= 8:
                assert_bit_equal(out[rows], plain[rows])
            else:
                assert_bit_equal(out[rows], problem.run(slice(s, s + 1)))
                assert not torch.equal(out[rows], plain[rows])


def test_rejects_too_many_sequences() -> None:
    q = torch.zeros(1100, 8, 128, device="cuda").bfloat16()
    cache = torch.zeros(1, 1, 64, 128, device="cuda").bfloat16()
    q_start = torch.arange(1026, device="cuda").clamp(max=1025)
    q_start[-1] = 1100
    table = torch.zeros(1025, 1, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="S=1025"):
        ops.attention(q, cache, cache, table, q_start, q_start[1:], softmax_scale=1.0)
