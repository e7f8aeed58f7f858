# SPDX-License-Identifier: Apache-2.0
"""Padded decode steps, steps launched before the last tokens are known: the tokens are those of the plain engine."""

import random

import oracle
import pytest
import torch
from test_forward import make_engine, run

from nemotron_fast import SamplingParams
from nemotron_fast.errors import RequestError
from nemotron_fast.graphs import padded_size, padded_sizes
from nemotron_fast.sampling_params import NEUTRAL

MODES = {
    "padded": {"padded_decode": True},
    "overlapped": {"overlap": True},
    "both": {"padded_decode": True, "overlap": True},
}
KINDS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "seed": 11, "top_k": 20},
    "ends early": {"temperature": 1.0, "seed": 4, "stop_token_ids": tuple(range(0, 256, 7))},
    "min_tokens and bias": {
        "seed": 5,
        "min_tokens": 6,
        "stop_token_ids": tuple(range(0, 192, 3)),
        "logit_bias": {9: 5},
    },
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.4, "presence_penalty": 0.5},
    "logprobs": {"temperature": 0.7, "seed": 2, "logprobs": 3, "prompt_logprobs": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    oracle.random_checkpoint(0, path, blocks=[(2, 256), ("linear", None), (1, 256)])
    return path


def params_of(kind: str, max_tokens: int) -> SamplingParams:
    options = {"max_tokens": max_tokens, "ignore_eos": True} | KINDS[kind]
    return SamplingParams(**NEUTRAL | options)


def assert_same(found, want) -> None:
    """Log-probabilities but for what a CPU's matrix product owes to the number of rows."""
    for mine, theirs in zip(found, want, strict=True):
        assert (mine.output, mine.finish_reason, mine.stop_reason) == (
            theirs.output,
            theirs.finish_reason,
            theirs.stop_reason,
        )
        values = [[e.logprob for e in (*r.prompt_logprobs[1:], *r.logprobs)] for r in (mine, theirs)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_padded_sizes():
    assert padded_sizes(1) == [1]
    assert padded_sizes(5) == [1, 2, 4, 5]
    sizes = padded_sizes(300)
    assert sizes[-1] == 300 and sizes == sorted(set(sizes)) and {1, 8, 64, 128, 256} <= set(sizes)
    assert [padded_size(sizes, n) for n in (1, 3, 4, 9, 257, 300)] == [1, 4, 4, 16, 300, 300]
    assert [padded_size(sizes, n) for n in (57, 65, 97, 195, 225)] == [64, 80, 112, 208, 240]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_the_plain_engine(mode, kind, folder):
    prompts = [[(7 * i + n) % 256 for i in range(n)] for n in (3, 70, 64, 1, 33)]
    want = run(make_engine(folder), prompts, params_of(kind, 12))
    engine = make_engine(folder, **MODES[mode])
    assert_same(run(engine, prompts, params_of(kind, 12)), want)
    assert not engine.has_work


@pytest.mark.parametrize("seed", range(6))
def test_mixed_requests_with_preemption_and_arrivals(seed, folder):
    """All kinds at once, shared prompts, a pool too small for them, arrivals in between: each equals its run alone."""
    rng = random.Random(seed)
    base = [rng.randrange(256) for _ in range(70)]
    plans = [
        (
            base * rng.randint(0, 1) + [rng.randrange(256) for _ in range(rng.randint(1, 60))],
            params_of(rng.choice([*KINDS]), rng.randint(6, 40)),
        )
        for _ in range(8)
    ]
    alone = make_engine(folder)
    want = [run(alone, [prompt], params)[0] for prompt, params in plans]
    mode = MODES[rng.choice([*MODES])]
    engine = make_engine(folder, num_pages=rng.choice([4, 6]), max_num_seqs=5, max_batched_tokens=48, **mode)
    requests = []
    while len(requests) < len(plans) or engine.has_work:
        if len(requests) < len(plans) and rng.random() < 0.3:
            requests.append(engine.add_request(*plans[len(requests)]))
        engine.step()
    assert_same(requests, want)
    engine.scheduler.check()
    assert engine.scheduler.pages.num_held == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["seeded", "penalties", "logprobs"])
def test_requests_that_take_turns(kind, mode, folder):
    """Seven that generate equally many tokens, of which a step holds four."""
    prompts = [[(7 * i + n) % 256 for i in range(n)] for n in (3, 70, 64, 1, 33, 20, 9)]
    params = params_of(kind, 30)
    want = run(make_engine(folder), prompts, params)
    engine = make_engine(folder, max_num_seqs=4, **MODES[mode])
    requests, steps = [engine.add_request(prompt, params) for prompt in prompts], 0
    while engine.has_work:
        engine.step()
        steps += 1
        assert steps != 10 or len(engine.scheduler.running) == 7
    assert_same(requests, want)


def test_warm_up_changes_nothing(folder):
    prompts = [[5] * 30, [6] * 3]
    want = run(make_engine(folder), prompts, params_of("greedy", 12))
    engine = make_engine(folder, padded_decode=True, overlap=True, max_num_seqs=5)
    for _ in range(2):
        caches = [cache.view(torch.uint8) for cache in (*engine.cache.keys, *engine.cache.values)]
        kept = [cache.clone() for cache in caches]
        engine.warm_up()
        assert all(map(torch.equal, kept, caches))
        assert_same(run(engine, prompts, params_of("greedy", 12)), want)
    engine.add_request([1], params_of("greedy", 2))
    with pytest.raises(RequestError, match="while requests are running"):
        engine.warm_up()


def test_an_abort_discards_the_token_in_flight(folder):
    engine = make_engine(folder, overlap=True)
    stays, goes = (engine.add_request([n] * 5, params_of("greedy", 20)) for n in (1, 2))
    want = run(make_engine(folder), [[1] * 5], params_of("greedy", 20))[0].output
    for _ in range(4):
        engine.step()
    known = len(goes.output)
    engine.abort(goes)
    while engine.has_work:
        assert goes not in engine.step()
    assert len(goes.output) == known and goes.finish_reason == "abort" and stays.output == want


@pytest.mark.parametrize("more", [{}, {"logprobs": 1, "max_thinking_tokens": 4}], ids=["plain", "logprobs"])
def test_a_forced_token_replaces_the_one_in_flight(more, folder):
    params = SamplingParams(**NEUTRAL | {"temperature": 0.0, "ignore_eos": True, "max_tokens": 12} | more)
    results = []
    for overlap in (False, True):
        engine = make_engine(folder, overlap=overlap)
        request = engine.add_request([3, 4, 5], params)
        while engine.has_work:
            if engine.step() and len(request.output) == 4:
                request.forced.extend([77, 78, 79])
        results.append(request)
    assert_same(results[:1], results[1:])
    assert results[0].output[4:7] == [77, 78, 79]
    assert [e.token_id for e in results[1].logprobs] == (results[1].output if more else [])
    assert all(e.logprob < e.top[0][1] for e in results[1].logprobs[4:7])
