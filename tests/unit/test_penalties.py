# SPDX-License-Identifier: Apache-2.0
"""The counts on the device are those of each request's tokens, whoever comes, goes, or is preempted."""

import random

import torch

from nemotron_fast import reference_sampling
from nemotron_fast.penalties import Penalties
from nemotron_fast.request import Request, Status
from nemotron_fast.sampling_params import NEUTRAL, SamplingParams

VOCAB, SEATS = 20, 3


def make_request(number: int, rng: random.Random) -> Request:
    options = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5} if number % 4 else {}
    prompt = [rng.randrange(VOCAB) for _ in range(5)]
    params = SamplingParams(**NEUTRAL | options)
    request = Request(number, prompt, params, seed=0, max_tokens=99, stop_ids=frozenset())
    request.status = Status.RUNNING
    return request


def expected(logits_SV: torch.Tensor, requests: list[Request]) -> torch.Tensor:
    """Each row penalised by itself."""
    rows = []
    for row_V, request in zip(logits_SV.clone(), requests, strict=True):
        if request.params.has_penalties:
            counts = torch.bincount(torch.tensor(request.output, dtype=torch.int64), minlength=VOCAB).int()
            in_prompt = torch.zeros(VOCAB, dtype=torch.bool)
            in_prompt[request.prompt] = True
            p = request.params
            values = (torch.tensor([v]) for v in (p.presence_penalty, p.frequency_penalty, p.repetition_penalty))
            reference_sampling.penalize(row_V[None], counts[None], in_prompt[None], *values)
        rows.append(row_V)
    return torch.stack(rows)


def test_random_comings_and_goings():
    rng = random.Random(0)
    penalties = Penalties(SEATS, VOCAB, torch.device("cpu"))
    running = [make_request(n, rng) for n in range(SEATS + 2)]  # more than have seats: they take turns
    waiting: list[Request] = []
    for number in range(len(running), 300):
        if rng.random() < 0.3:
            gone = running.pop(rng.randrange(len(running)))
            gone.status = rng.choice([Status.WAITING, Status.FINISHED])  # preempted or done
            waiting += [gone] * (gone.status is Status.WAITING)
            back = waiting.pop(rng.randrange(len(waiting))) if waiting and rng.random() < 0.6 else None
            running.append(back or make_request(number, rng))
            running[-1].status = Status.RUNNING
        step = rng.sample(running, rng.randint(1, SEATS))
        for request in step:
            request.in_flight = 1
        logits_SV = torch.randn(len(step), VOCAB)
        want = expected(logits_SV, step)
        penalties.apply(logits_SV, step)
        torch.testing.assert_close(logits_SV, want)
        tokens = torch.tensor([rng.randrange(VOCAB) for _ in step])
        penalties.count(tokens, step)
        for request, token in zip(step, tokens.tolist(), strict=True):
            request.in_flight = 0
            request.append(token)
