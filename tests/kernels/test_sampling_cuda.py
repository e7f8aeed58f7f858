# SPDX-License-Identifier: Apache-2.0
"""The CUDA backends of penalize, sample and top_logprobs: tokens and sets equal to the CPU reference's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron_fast import ops
from nemotron_fast.testing.compare import assert_bit_equal, assert_close, poison

pytestmark = pytest.mark.gpu
LLAMA3 = 128256
VOCABS = (5, 1000, 1003, 49152, LLAMA3)
OPTIONS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "hot": {"temperature": 3.0},
    "cold": {"temperature": 0.05},
    "top-k 1": {"top_k": 1},
    "top-k 50": {"top_k": 50},
    "top-k 5000": {"top_k": 5000},
    "top-p 0.1": {"top_p": 0.1},
    "top-p 0.95": {"top_p": 0.95},
    "top-p tiny": {"top_p": 1e-6},
    "min-p": {"min_p": 0.05},
    "min-p 1": {"min_p": 1.0},
    "all": {"temperature": 0.7, "top_k": 200, "top_p": 0.9, "min_p": 0.01},
}


def make_logits(rows: int, vocab: int, kind: str = "peaked") -> Tensor:
    flat = torch.randn(rows, vocab, device="cuda")
    return flat if kind == "flat" else flat * 3 + 0.5


def columns(rows: int, device: str = "cuda", **options: float) -> list[Tensor]:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    made = [
        torch.full((rows,), values[n], dtype=torch.int32 if n == "top_k" else torch.float32, device=device)
        for n in ("temperature", "top_k", "top_p", "min_p")
    ]
    seeds = torch.arange(rows, device=device) * 7919 - 5
    return [*made, seeds, torch.arange(rows, device=device)]


def run(logits: Tensor, args: list[Tensor]) -> Tensor:
    return ops.sample(logits, *args, out=poison(len(logits), dtype=torch.int64, device="cuda"))


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_sample_equals_the_reference(options: dict[str, float], vocab: int, kind: str) -> None:
    """Token for token, except near ties: logarithms differ by an ulp, sums by less than 1e-4 of the mass."""
    rows = 24 if vocab == LLAMA3 else 64
    logits = make_logits(rows, vocab, kind)
    args = columns(rows, **options)
    found = run(logits, args)
    want = ops.sample(logits.cpu(), *(a.cpu() for a in args))
    assert int((found.cpu() != want).sum()) <= (0 if options.get("temperature") == 0.0 else 1)
    assert_bit_equal(run(logits, args), found)


@pytest.mark.parametrize("options", [{"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.02}, OPTIONS["all"]], ids=str)
def test_sample_draws_exactly_the_kept_tokens(options: dict[str, float]) -> None:
    """Many draws from one row: all kept tokens appear, and no other."""
    vocab, draws = 3000, 20000
    row = torch.randn(vocab) * 2.5
    t = options.get("temperature", 1.0)
    p, order = torch.softmax(row / t, 0).sort(descending=True)
    keep = torch.ones(vocab, dtype=torch.bool)
    if top_k := options.get("top_k"):
        keep[int(top_k) :] = False
    p = p * keep / p[keep].sum()
    keep &= p.cumsum(0) - p < options.get("top_p", 1.0)
    keep &= p >= p[0] * options.get("min_p", 0.0)
    kept = set(order[keep].tolist())
    logits = row.cuda().expand(draws, -1)
    args = columns(draws, **options)
    args[4].fill_(11)
    counts = torch.bincount(run(logits.contiguous(), args).cpu(), minlength=vocab)
    drawn = set(counts.nonzero().flatten().tolist())
    assert drawn <= kept
    expected = torch.zeros(vocab).index_put((order,), p * keep) / p[keep].sum()
    assert all(i in drawn for i in kept if expected[i] * draws > 20)
    sigma = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 5 * sigma + 5e-4).all()


@pytest.mark.parametrize("options", [{}, {"top_p": 0.95}, {"top_k": 40, "top_p": 0.8}], ids=str)
def test_a_row_is_the_same_alone_and_in_a_batch(options: dict[str, float]) -> None:
    """Also through other cluster sizes: 1 row, 20, 40 and 200."""
    logits = make_logits(200, LLAMA3)
    args = columns(200, **options)
    all_rows = run(logits, args)
    for rows in (slice(3, 4), slice(0, 20), slice(100, 140)):
        assert_bit_equal(run(logits[rows], [a[rows] for a in args]), all_rows[rows])


def test_sample_with_ties_infinities_and_mixed_options() -> None:
    vocab = LLAMA3
    logits = torch.full((6, vocab), -torch.inf, device="cuda")
    logits[0, 77] = 1.0  # all others forbidden
    logits[1] = 0.0  # all equal: kept together
    logits[2, 100:300] = 2.0
    logits[3, [5, 9]] = torch.tensor([3.0, 3.0], device="cuda")
    logits[4] = torch.linspace(-1e4, 1e4, vocab, device="cuda")
    logits[5, 9:] = 1.0
    args = columns(6)
    args[0][3] = 0.0
    args[1][:] = torch.tensor([5, 3, 10, 0, 100, 0])
    args[2][:] = torch.tensor([0.9, 0.5, 0.5, 1.0, 0.9, 0.7])
    found = run(logits, args).tolist()
    assert found[0] == 77 and 0 <= found[1] < vocab and 100 <= found[2] < 300
    assert found[3] == 5 and found[5] >= 9
    assert found == ops.sample(logits.cpu(), *(a.cpu() for a in args)).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-38])
def test_a_row_with_a_nan_gives_minus_one(temperature: float) -> None:
    logits = make_logits(3, LLAMA3)
    logits[1, 100_000] = torch.nan
    found = run(logits, columns(3, temperature=temperature, top_p=0.9))
    assert found[1] == -1 and (found[[0, 2]] >= 0).all()
    if temperature < 1:
        assert found[0] == logits[0].argmax() and found[2] == logits[2].argmax()


@pytest.mark.parametrize(
    "rows,vocab,skipped",
    [(0, 10, 0), (1, 5, 0), (3, 1003, 0), (3, 1000, 0), (3, 1000, 8), (3, 1000, 3), (64, LLAMA3, 0)],
)
def test_penalize(rows: int, vocab: int, skipped: int) -> None:
    """Also of rows inside longer ones, at multiples of 16 bytes and not."""
    logits = make_logits(rows, skipped + vocab)[:, skipped:]
    counts = torch.randint(0, 4, (rows, vocab), dtype=torch.int32, device="cuda")
    counts[torch.rand(rows, vocab, device="cuda") < 0.5] = 0
    in_prompt = torch.rand(rows, vocab, device="cuda") < 0.3
    args = [counts, in_prompt, *(torch.rand(rows, device="cuda") + 0.5 for _ in range(3))]
    on_cpu = logits.cpu().clone()
    ops.penalize(logits, *args)
    ops.penalize(on_cpu, *(a.cpu() for a in args))
    assert_bit_equal(logits.cpu(), on_cpu)


@pytest.mark.parametrize(
    "rows,vocab,num_top", [(1, 5, 5), (3, 1003, 0), (7, 1000, 20), (64, LLAMA3, 20), (2, 300, 256)]
)
def test_top_logprobs(rows: int, vocab: int, num_top: int) -> None:
    logits = make_logits(rows, vocab)
    tokens = torch.randint(0, vocab, (rows,), device="cuda")
    tokens[0] = logits[0].argmax()
    found = ops.top_logprobs(logits, tokens, num_top)
    wide = logits.double().log_softmax(-1)
    chosen = wide.gather(1, tokens[:, None])[:, 0]
    assert_close(found[0], chosen, rtol=1e-6, atol=2e-6)
    assert_bit_equal(found[1], 1 + (logits > logits.gather(1, tokens[:, None])).sum(-1))
    values, ids = wide.topk(num_top, dim=-1)
    assert_close(found[2], values, rtol=1e-6, atol=2e-6)
    assert_bit_equal(found[3], ids)
    for a, b in zip(ops.top_logprobs(logits, tokens, num_top), found, strict=True):
        assert_bit_equal(a, b)


def test_top_logprobs_of_equal_logits_are_the_first_ids() -> None:
    logits = torch.zeros(2, LLAMA3, device="cuda")
    logits[1, 5000] = 1.0
    _, rank, _, ids = ops.top_logprobs(logits, torch.tensor([7, 7], device="cuda"), 20)
    assert rank.tolist() == [1, 2]
    assert ids.tolist() == [list(range(20)), [5000, *range(19)]]


def test_graph_replays_with_new_inputs() -> None:
    logits = make_logits(16, LLAMA3)
    args = columns(16, top_p=0.9)
    run(logits, args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.sample(logits, *args)
        top = ops.top_logprobs(logits, out, 5)
    for _ in range(3):
        logits.copy_(make_logits(16, LLAMA3))
        args[5] += 1
        graph.replay()
        assert_bit_equal(out, run(logits, args))
        for found, want in zip(top, ops.top_logprobs(logits, out, 5), strict=True):
            assert_bit_equal(found, want)


def test_rejects() -> None:
    logits = make_logits(2, 100)
    with pytest.raises(RuntimeError, match="top_k: dtype is Long, want Int"):
        ops.sample(logits, *(a.long() if i == 1 else a for i, a in enumerate(columns(2))))
    with pytest.raises(RuntimeError, match="logits: dtype is BFloat16, want Float"):
        ops.sample(logits.bfloat16(), *columns(2))
    with pytest.raises(RuntimeError, match="N=300"):
        ops.top_logprobs(make_logits(1, 1000), torch.zeros(1, dtype=torch.int64, device="cuda"), 300)


def test_opcheck() -> None:
    logits, library = make_logits(2, 1000), torch.ops.nemotron_fast
    out = torch.empty(2, dtype=torch.int64, device="cuda")
    torch.library.opcheck(library.sample.default, (out, logits, *columns(2)))
