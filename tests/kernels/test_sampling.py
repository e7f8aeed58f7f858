# SPDX-License-Identifier: Apache-2.0
"""sample, penalize and top_logprobs: exact sets of allowed tokens, and the distribution itself."""

import math

import pytest
import torch

from nemotron_fast import ops


def sample(logits, n=1, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    """`n` draws from one row of logits, as a list; draw i uses step i."""
    rows = torch.tensor([logits], dtype=torch.float32).expand(n, -1).contiguous()

    def column(value, dtype=torch.float32):
        return torch.full((n,), value, dtype=dtype)

    return ops.sample(
        rows,
        column(temperature),
        column(top_k, torch.int32),
        column(top_p),
        column(min_p),
        column(seed, torch.int64),
        torch.arange(n),
    ).tolist()


LOGITS = [math.log(p) for p in (0.1, 0.4, 0.05, 0.25, 0.2)]


def test_greedy_takes_the_first_of_the_largest():
    assert sample([1.0, 3.0, 3.0, 2.0], temperature=0.0) == [1]


@pytest.mark.parametrize(
    "options,allowed",
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.7}, {1, 3, 4}),
        ({"top_p": 1e-6}, {1}),
        ({"top_k": 3, "top_p": 0.6}, {1, 3}),  # 0.4 and 0.25 of 0.85 sum to 0.76
        ({"min_p": 0.5}, {1, 3, 4}),
        ({"min_p": 1.0}, {1}),
    ],
)
def test_sample_draws_exactly_the_allowed_tokens(options, allowed):
    assert set(sample(LOGITS, 400, **options)) == allowed


def test_a_tiny_temperature_is_greedy():
    assert sample([5.0, 7.0, 6.0], 20, temperature=1e-38) == [1] * 20


def test_a_row_with_a_nan_gives_minus_one():
    logits = torch.tensor([[1.0, math.nan, 2.0], [1.0, 3.0, 2.0]])
    ones, zeros = torch.ones(2), torch.zeros(2)
    for temperature in (zeros, ones):
        got = ops.sample(logits, temperature, zeros.int(), ones, ones, zeros.long(), zeros.long())
        assert got.tolist() == [-1, 1]


def test_a_dropped_token_is_never_drawn_however_the_noise_falls():
    """Seed 413 gives token 99,913 the largest noise value there is, which rounds to a uniform of 1."""
    logits = torch.zeros(1, 128_256)
    logits[0, 5] = 50.0
    ones, zeros = torch.ones(1), torch.zeros(1)
    got = ops.sample(logits, ones, zeros.int(), torch.tensor([0.5]), zeros, torch.tensor([413]), zeros.long())
    assert got.tolist() == [5]


def test_equal_logits_are_kept_together():
    assert set(sample([0.0, 1.0, 1.0, 1.0], 200, top_k=2)) == {1, 2, 3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_follows_the_distribution(temperature):
    n = 20_000
    weights = torch.tensor(LOGITS).double().div(temperature).softmax(0)
    counts = torch.bincount(torch.tensor(sample(LOGITS, n, temperature=temperature, seed=7)), minlength=5)
    sigma = (weights * (1 - weights) / n).sqrt()
    assert ((counts / n - weights).abs() < 5 * sigma).all(), (counts / n, weights)


def test_a_draw_depends_on_seed_and_step_only():
    first, again, other = (sample(LOGITS, 50, seed=s) for s in (3, 3, 4))
    assert first == again != other
    alone = sample(LOGITS, 1, seed=3)
    assert alone[0] == first[0]


def test_rows_have_their_own_options():
    logits = torch.tensor([LOGITS] * 3)
    got = ops.sample(
        logits,
        torch.tensor([0.0, 1.0, 5.0]),
        torch.tensor([0, 1, 0], dtype=torch.int32),
        torch.ones(3),
        torch.tensor([0.0, 0.0, 1.0]),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.int64),
    )
    assert got.tolist() == [1, 1, 1]


def test_penalize():
    logits = torch.tensor([[2.0, -2.0, 4.0, 1.0]])
    counts = torch.tensor([[0, 1, 3, 0]], dtype=torch.int32)
    in_prompt = torch.tensor([[True, False, False, False]])
    ops.penalize(logits, counts, in_prompt, torch.tensor([0.5]), torch.tensor([0.25]), torch.tensor([2.0]))
    assert logits.tolist() == [[1.0, -4.0 - 0.25 - 0.5, 2.0 - 0.75 - 0.5, 1.0]]


def test_top_logprobs():
    logits = torch.tensor([LOGITS, [0.0] * 5])
    chosen, rank, values, ids = ops.top_logprobs(logits, torch.tensor([4, 2]), 3)
    assert chosen.tolist() == pytest.approx([math.log(0.2), math.log(0.2)], abs=1e-6)
    assert rank.tolist() == [3, 1]
    assert ids[0].tolist() == [1, 3, 4]
    assert values[0].exp().tolist() == pytest.approx([0.4, 0.25, 0.2], abs=1e-6)
