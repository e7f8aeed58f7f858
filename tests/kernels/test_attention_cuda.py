# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend of attention: against FP64, alone and in batches, twice, captured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nemotron_fast import ops
from nemotron_fast.testing.compare import assert_as_good_as, assert_bit_equal, poison

pytestmark = pytest.mark.gpu
FP8 = torch.float8_e4m3fn
PAGE = 64
MIXED = [(1, 1), (1, 63), (1, 64), (1, 65), (1, 129), (1, 1000), (1, 2048), (1, 5000)]  # new tokens, all tokens


@dataclass
class Problem:
    """Sequences of `shape` (new tokens, all tokens) on shuffled pages; NaN in every cached token that is not valid."""

    shape: list[tuple[int, int]]
    H: int
    K: int
    D: int = 128
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    fp8_products: bool = False
    per_query: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(self.seed)
        pages = [-(-length // PAGE) for _, length in self.shape]
        num_pages = sum(pages) + 2
        order = torch.randperm(num_pages, generator=generator, device="cuda")
        self.k_scale, self.v_scale = (0.5, 0.25) if self.kv_dtype == FP8 else (1.0, 1.0)
        self.caches = []
        size = (num_pages, self.K, PAGE, self.D)
        valid = torch.zeros(num_pages, PAGE, dtype=torch.bool, device="cuda")
        self.table = torch.zeros(len(pages), max(*pages, 1), dtype=torch.int64, device="cuda")
        used = 0
        for s, (count, (_, length)) in enumerate(zip(pages, self.shape, strict=True)):
            mine = order[used : used + count]
            used += count
            self.table[s, :count] = mine
            tokens = torch.arange(count * PAGE, device="cuda").view(count, PAGE)
            valid[mine] = tokens < length
        for _ in "kv":
            cache = torch.randn(size, generator=generator, device="cuda") * 2
            cache = torch.where(valid[:, None, :, None], cache, float("nan")).to(self.kv_dtype)
            self.caches.append(cache)
        new = [n for n, _ in self.shape]
        self.q = torch.randn(sum(new), self.H, self.D, generator=generator, device="cuda").to(self.dtype) * 2
        self.q_start = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], device="cuda")
        self.kv_len = torch.tensor([n for _, n in self.shape], device="cuda")

    def run(self, rows: slice = slice(None), out_scale: Tensor | None = None, cos_sin: Tensor | None = None) -> Tensor:
        """The op on all sequences, or on some as if they were the batch."""
        first = self.q_start[:-1][rows][0]
        q_start = torch.cat((self.q_start[:-1][rows], self.q_start[1:][rows][-1:])) - first
        q = self.q[int(first) : int(first + q_start[-1])]
        out = poison(*q.shape, dtype=self.dtype if out_scale is None else FP8, device="cuda")
        return ops.attention(
            q,
            *self.caches,
            self.table[rows],
            q_start,
            self.kv_len[rows],
            softmax_scale=self.D**-0.5,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
            out_scale=out_scale,
            cos_sin=cos_sin,
            fp8_products=self.fp8_products,
            per_query=self.per_query,
            out=out,
        )

    def dense(self, s: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q [H, new, D], k and v [H, length, D] of sequence s in FP64, and which keys each query sees."""
        new, length = self.shape[s]
        pages = self.table[s, : -(-length // PAGE)]
        k_HSD, v_HSD = (
            (c.view(torch.uint8)[pages].view(FP8) if c.dtype == FP8 else c[pages]).float().transpose(0, 1)
            .flatten(1, 2)[:, :length].repeat_interleave(self.H // self.K, 0).double() * scale
            for c, scale in zip(self.caches, (self.k_scale, self.v_scale), strict=True)
        )  # fmt: skip
        q_HND = self.q[int(self.q_start[s]) : int(self.q_start[s + 1])].double().transpose(0, 1)
        sees = torch.ones(new, length, dtype=torch.bool, device="cuda").tril(length - new)
        return q_HND, k_HSD, v_HSD, sees

    def check(self, out: Tensor) -> None:
        """At most twice the error of the same in torch, with scores and output in FP32 and weights in q's type; where
        products are of e4m3, of the rounded q, with weights in e4m3 that sum as they were."""
        for s, (new, _) in enumerate(self.shape):
            q, k, v, sees = self.dense(s)
            rounds = self.fp8_products and new > 8
            if rounds:
                scale = (q.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12).float()
                q = (q.float() / scale).to(FP8).double() * scale
            scores = (q @ k.transpose(1, 2) * self.D**-0.5).masked_fill(~sees, -math.inf)
            want = torch.softmax(scores, -1) @ v
            exact = torch.exp(scores - scores.amax(-1, keepdim=True)).float()
            weights = (256 * exact).to(FP8).double() / 256 if rounds else exact.to(self.dtype).double()
            total = (exact if rounds else weights).double().sum(-1, keepdim=True)
            peer = (weights @ v / total).to(self.dtype)
            rows = slice(int(self.q_start[s]), int(self.q_start[s + 1]))
            assert_as_good_as(out[rows].transpose(0, 1), peer, want)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("H,K", [(64, 8), (128, 8), (8, 8), (9, 3), (12, 1), (5, 1), (16, 1), (20, 2)])
def test_decode(H: int, K: int, D: int, kv_dtype: torch.dtype) -> None:
    problem = Problem(MIXED, H, K, D, kv_dtype=kv_dtype)
    out = problem.run()
    problem.check(out)
    assert_bit_equal(problem.run(), out)


@pytest.mark.parametrize("kv_dtype", [torch.float16, FP8], ids=str)
def test_half(kv_dtype: torch.dtype) -> None:
    problem = Problem(MIXED, 16, 2, dtype=torch.float16, kv_dtype=kv_dtype)
    problem.check(problem.run())


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("H,K", [(64, 8), (16, 1), (9, 3)])
def test_several_queries(H: int, K: int, kv_dtype: torch.dtype) -> None:
    """Speculation, slices of a prompt, whole prompts; a query right at a page's end; a lone token."""
    shape = [(2, 65), (8, 64), (1, 300), (3, 3), (5, 4097), (100, 300), (65, 65), (1, 1)]
    problem = Problem(shape, H, K, kv_dtype=kv_dtype)
    problem.check(problem.run())


@pytest.mark.parametrize("lengths", [[131072], [131072, 17, 1024, 40000], [200] * 300])
def test_extremes(lengths: list[int]) -> None:
    problem = Problem([(1, n) for n in lengths], 16, 2)
    out = problem.run()
    problem.check(out)
    assert_bit_equal(problem.run(), out)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("H,K", [(64, 8), (128, 8), (8, 1)])
def test_same_bits_alone_and_in_a_batch(H: int, K: int, kv_dtype: torch.dtype) -> None:
    lengths = [700, 2048, 33, 9000, 128, 64 * 31, 40000, 1] * 8
    problem = Problem([(1, n) for n in lengths], H, K, kv_dtype=kv_dtype)
    out = problem.run()
    for rows in (slice(0, 1), slice(1, 2), slice(3, 4), slice(6, 7), slice(2, 5), slice(5, 21), slice(40, 64)):
        assert_bit_equal(problem.run(rows), out[rows])


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("H,K", [(64, 8), (128, 8), (9, 3), (5, 1)])
def test_per_query_has_the_bits_of_a_decode_step(H: int, K: int, kv_dtype: torch.dtype) -> None:
    problem = Problem([(1, 130), (65, 65), (7, 200), (130, 1000), (40, 8200)], H, K, kv_dtype=kv_dtype, per_query=True)
    out = problem.run()
    problem.check(out)
    for s, (new, length) in enumerate(problem.shape):
        for i in range(0, new, 13):
            t, seen = int(problem.q_start[s]) + i, torch.tensor([length - new + i + 1], device="cuda")
            alone = ops.attention(
                problem.q[t : t + 1],
                *problem.caches,
                problem.table[s : s + 1],
                torch.tensor([0, 1], device="cuda"),
                seen,
                softmax_scale=problem.D**-0.5,
                k_scale=problem.k_scale,
                v_scale=problem.v_scale,
            )
            assert_bit_equal(out[t : t + 1], alone)


def test_graph_replays_with_new_inputs() -> None:
    """The lengths change, too: the grid does not depend on them."""
    lengths = [[1, 900, 4000, 64], [3000, 1, 65, 130], [64, 64, 64, 64]]
    problems = [Problem([(1, n) for n in some], 64, 8, seed=i) for i, some in enumerate(lengths)]
    want = [p.run() for p in problems]
    static = Problem([(1, 4096)] * 4, 64, 8)
    static.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention(
            static.q, *static.caches, static.table, static.q_start, static.kv_len, softmax_scale=128**-0.5
        )
    for problem, expected in zip(problems, want, strict=True):
        static.q.copy_(problem.q)
        static.kv_len.copy_(problem.kv_len)
        static.table.zero_()
        static.table[:, : problem.table.shape[1]] = problem.table
        for ours, theirs in zip(static.caches, problem.caches, strict=True):
            ours[: len(theirs)] = theirs
        graph.replay()
        assert_bit_equal(out, expected)


def test_queries_as_a_strided_view_and_empty_sequences() -> None:
    H, K, D = 16, 2, 128
    qkv = torch.randn(3, (H + 2 * K) * D, device="cuda").bfloat16()
    caches = [torch.randn(4, K, PAGE, D, device="cuda").bfloat16() for _ in "kv"]
    view = qkv.view(3, -1, D)[:, :H]
    table = torch.arange(4, device="cuda").view(4, 1)
    q_start = torch.tensor([0, 1, 1, 2, 3], device="cuda")  # the second has no query, the third no key
    args = (*caches, table, q_start, torch.tensor([10, 5, 0, 64], device="cuda"))
    got, want = (ops.attention(q, *args, softmax_scale=0.125) for q in (view, view.contiguous()))
    assert_bit_equal(got, want)
    assert (got[1] == 0).all() and got.isfinite().all()


def test_no_tokens() -> None:
    problem = Problem([(1, 5)], 8, 1)
    none = torch.zeros(1, dtype=torch.int64, device="cuda")
    out = ops.attention(problem.q[:0], *problem.caches, problem.table[:0], none, none[:0], softmax_scale=1.0)
    assert out.shape == (0, 8, 128)


@pytest.mark.parametrize(
    "H,K,D,message", [(8, 1, 80, "D=80 is not built"), (32, 1, 128, "G=32"), (9, 2, 64, "9 heads, want a multiple")]
)
def test_rejects(H: int, K: int, D: int, message: str) -> None:
    q = torch.zeros(1, H, D, device="cuda").bfloat16()
    cache = torch.zeros(1, K, PAGE, D, device="cuda").bfloat16()
    table, q_start = torch.zeros(1, 1, dtype=torch.int64, device="cuda"), torch.tensor([0, 1], device="cuda")
    with pytest.raises(RuntimeError, match=message):
        ops.attention(q, cache, cache, table, q_start, q_start[1:], softmax_scale=1.0)


@pytest.mark.parametrize(
    "D,kv_dtype,message",
    [
        (128, torch.bfloat16, "k_cache: dtype is BFloat16, want Float8_e4m3fn for fp8_products; call without them"),
        (64, FP8, "k_cache: head size is 64, want 128 for fp8_products; call without them"),
    ],
)
def test_rejects_fp8_products(D: int, kv_dtype: torch.dtype, message: str) -> None:
    """In whatever step."""
    for new in (1, 20):
        problem = Problem([(new, 20)], 8, 1, D, kv_dtype=kv_dtype, fp8_products=True)
        with pytest.raises(RuntimeError, match=message):
            problem.run()


def test_opcheck() -> None:
    problem = Problem([(1, 70)], 8, 1)
    args = (problem.q, *problem.caches, problem.table, problem.q_start, problem.kv_len, 0.1, 1.0, 1.0, None)
    torch.library.opcheck(torch.ops.nemotron_fast.attention.default, (torch.empty_like(problem.q), *args))
