# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend of attention where sequences have more than 8 queries: prompts, chunks of them, mixed batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_attention_cuda import FP8, Problem
from torch import Tensor

from nemotron_fast import ops, reference
from nemotron_fast.testing.compare import assert_bit_equal, assert_close, poison

pytestmark = pytest.mark.gpu
# New tokens, all tokens: whole prompts around the edges of tiles and blocks, later chunks, decoding between them.
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
        out=poison(*q.shape, dtype=q.dtype, device="cuda"),
    )


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("H,K", [(64, 8), (32, 2), (8, 8), (9, 3), (5, 1)])
def test_mixed_batch(H: int, K: int, D: int, kv_dtype: torch.dtype) -> None:
    problem = Problem(MIXED, H, K, D, kv_dtype=kv_dtype)
    out = problem.run()
    problem.check(out)
    assert_bit_equal(problem.run(), out)


@pytest.mark.parametrize("kv_dtype", [torch.float16, FP8], ids=str)
def test_half(kv_dtype: torch.dtype) -> None:
    problem = Problem(MIXED, 16, 2, dtype=torch.float16, kv_dtype=kv_dtype)
    problem.check(problem.run())


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=str)
def test_same_bits_alone_and_in_a_batch(kv_dtype: torch.dtype) -> None:
    problem = Problem(MIXED, 64, 8, kv_dtype=kv_dtype)
    out = problem.run()
    for s in range(len(MIXED)):
        rows = slice(int(problem.q_start[s]), int(problem.q_start[s + 1]))
        if MIXED[s][0] > 8:
            assert_bit_equal(problem.run(slice(s, s + 1)), out[rows])
    assert_bit_equal(problem.run(slice(2, 5)), out[int(problem.q_start[2]) : int(problem.q_start[5])])


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("H,K", [(64, 8), (9, 3)])
def test_quantised_result(H: int, K: int, D: int, kv_dtype: torch.dtype) -> None:
    """The kernels of prompts and of decoding alike."""
    problem, scale = Problem(MIXED, H, K, D, kv_dtype=kv_dtype), torch.tensor([0.007], device="cuda")
    assert_bit_equal(problem.run(out_scale=scale).flatten(1), ops.quantize_fp8(problem.run().flatten(1), scale))


@pytest.mark.parametrize("H,K", [(64, 8), (9, 3)])
def test_same_bits_in_any_chunks(H: int, K: int) -> None:
    problem = Problem([(1000, 1500)], H, K)
    whole = problem.run()
    for cuts in ([0, 500, 1000], [0, 9, 77, 205, 461, 990, 1000], [0, 12, 24, 1000]):
        parts = [run_chunk(problem, 0, begin, end) for begin, end in itertools.pairwise(cuts)]
        assert_bit_equal(torch.cat(parts), whole)


def test_large_batch_and_long_context() -> None:
    problem = Problem([(20 + i % 50, 20 + i % 50 + 7 * i) for i in range(200)], 16, 2)
    problem.check(problem.run())
    problem = Problem([(300, 131072)], 8, 1)
    problem.check(problem.run())


def test_against_the_reference() -> None:
    """The oracle of the whole engine, on the CPU. It rounds nothing in between; we round the weights."""
    problem = Problem([(70, 200), (1, 90)], 16, 2)
    caches = [c.nan_to_num().cpu() for c in problem.caches]
    rest = [t.cpu() for t in (problem.table, problem.q_start, problem.kv_len)]
    want = reference.attention(problem.q.cpu(), *caches, *rest, 128**-0.5, 1.0, 1.0)
    assert_close(problem.run(), want, rtol=2**-6, atol=2**-5)


def test_rejects_too_many_sequences() -> None:
    q = torch.zeros(1100, 8, 128, device="cuda").bfloat16()
    cache = torch.zeros(1, 1, 64, 128, device="cuda").bfloat16()
    q_start = torch.arange(1026, device="cuda").clamp(max=1025)
    q_start[-1] = 1100
    table = torch.zeros(1025, 1, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="S=1025"):
        ops.attention(q, cache, cache, table, q_start, q_start[1:], softmax_scale=1.0)
