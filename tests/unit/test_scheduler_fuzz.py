# SPDX-License-Identifier: Apache-2.0
"""10,000 random schedules on a made-up device: arrivals, aborts, stop tokens, shared prompts, pools too small.

The device keeps in each slot of the KV cache a digest of the tokens up to there and samples the digest of the whole
sequence, so that one wrong page, token or order changes an output. Pages are of 4 tokens here.
"""

import random
from dataclasses import dataclass, field

import pytest

from nemotron_fast import pages, scheduler, turns
from nemotron_fast.request import Request
from nemotron_fast.sampling_params import NEUTRAL, SamplingParams
from nemotron_fast.scheduler import Chunk, Scheduler

PAGE = 4
VOCAB = 50
STOP = 7
PARAMS = SamplingParams(**NEUTRAL)
PARAMS_PROMPT = SamplingParams(**NEUTRAL, prompt_logprobs=0)


def digest(before: int, token: int) -> int:
    return hash((before, token))


def alone(request: Request) -> list[int]:
    """What the request generates with a device of its own."""
    state = 0
    for token in request.prompt:
        state = digest(state, token)
    output: list[int] = []
    while len(output) < request.max_tokens and request.stop_ids.isdisjoint(output):
        output.append(state % VOCAB)
        state = digest(state, output[-1])
    return output


@dataclass
class Device:
    kv: dict[int, int] = field(default_factory=dict)  # slot -> digest
    sampled: dict[int, int] = field(default_factory=dict)  # of the last step: request -> token

    def launch(self, chunks: list[Chunk]) -> dict[int, int]:
        """Append the KV of all chunks, then let each read its own; the sampled tokens by request.

        In steps of one token each, none may need the KV of another's: it is not there yet.
        """
        decodes = all(c.stop - c.start == 1 for c in chunks)
        read = [self.read(c.request, c.start) if decodes and c.start else 0 for c in chunks]
        for chunk, state in zip(chunks, read, strict=True):
            request = chunk.request
            if chunk.start and not decodes:
                state = self.read(request, chunk.start)
            for position in range(chunk.start, chunk.stop):
                if position < request.num_tokens:
                    (token,) = request.tokens(position, position + 1)
                else:
                    token = self.sampled[request.id]
                state = digest(state, token)
                self.kv[request.pages[position // PAGE] * PAGE + position % PAGE] = state
        self.sampled = {c.request.id: self.read(c.request, c.stop) % VOCAB for c in chunks if c.samples}
        return self.sampled

    def read(self, request: Request, stop: int) -> int:
        """The digest of the first `stop` tokens; each page before must lead to the next."""
        state = 0
        for position in range(min(stop, request.num_tokens)):
            (token,) = request.tokens(position, position + 1)
            state = digest(state, token)
            found = self.kv[request.pages[position // PAGE] * PAGE + position % PAGE]
            assert found == state, f"request {request.id} reads foreign KV at {position}"
        return self.kv[request.pages[(stop - 1) // PAGE] * PAGE + (stop - 1) % PAGE]


def random_requests(rng: random.Random, num_pages: int) -> list[Request]:
    vocab = rng.choice([2, VOCAB])  # 2: pages of equal tokens behind different beginnings
    base = [rng.randrange(vocab) for _ in range(num_pages * PAGE)]
    alike = rng.randint(1, num_pages * PAGE // 2) if rng.random() < 0.3 else None  # they all generate so many tokens
    requests = []
    for number in range(rng.randint(1, 9)):
        total = rng.randint(alike + 1 if alike else 2, num_pages * PAGE)
        prompt_len = total - alike if alike else rng.randint(1, total - 1)
        shared = rng.choice([0, prompt_len // 2, prompt_len])
        prompt = base[:shared] + [rng.randrange(vocab) for _ in range(prompt_len - shared)]
        params = rng.choice([PARAMS] * 9 + [PARAMS_PROMPT])
        stop_ids = frozenset({STOP} if rng.random() < 0.8 and not alike else ())
        requests.append(Request(number, prompt, params, seed=0, max_tokens=total - prompt_len, stop_ids=stop_ids))
    return requests


def equal_requests(rng: random.Random, num_pages: int) -> list[Request]:
    """They generate equally many tokens and share hardly anything; mostly several fit at a time, but not all."""
    length = rng.randint(1, num_pages * PAGE // 3)
    requests = []
    for number in range(rng.randint(3, 14)):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 2 * PAGE))]
        request = Request(number, prompt, PARAMS, seed=0, max_tokens=length, stop_ids=frozenset())
        requests.append(request)
    return requests


def run_schedule(rng: random.Random) -> None:
    equal = rng.random() < 0.2
    num_pages = rng.randint(6, 40) if equal else rng.randint(2, 14)
    budget = rng.choice([1, 3, 8, 64])
    plan = Scheduler(
        num_pages,
        max_num_seqs=rng.randint(1, 6),
        max_batched_tokens=budget,
        max_mixed_tokens=None if equal else rng.choice([None, 1, 6]),
        prefix_caching=rng.random() < 0.8,
    )
    requests = equal_requests(rng, num_pages) if equal else random_requests(rng, num_pages)
    arrivals = 0.99 if equal else 0.3
    pending, device, overlap = list(requests), Device(), rng.random() < 0.7
    in_flight: tuple[list[Chunk], dict[int, int]] | None = None
    for _ in range(100 + 8 * sum(len(r.prompt) + r.max_tokens for r in requests)):
        while pending and rng.random() < arrivals:
            plan.add(pending.pop())
        live = [*plan.running, *plan.waiting]
        if live and rng.random() < 0.01:
            victim = rng.choice(live)
            victim.finish("abort")
            plan.remove(victim)
        chunks = plan.next()
        check_plan(plan, chunks, in_flight is not None)
        launched = (chunks, device.launch(chunks)) if chunks else None
        done, in_flight = (in_flight, launched) if overlap else (launched, None)
        for chunk in done[0] if done else ():
            if chunk.samples:
                plan.receive(chunk.request, done[1][chunk.request.id])
        plan.check()
        if not pending and not plan.has_work and in_flight is None:
            break
    assert all(r.is_finished for r in requests), "a request starved"
    for request in requests:
        want = alone(request)
        assert request.output == (want[: len(request.output)] if request.finish_reason == "abort" else want)
    assert plan.pages.num_held == 0 and plan.pages.num_free + plan.pages.num_cached == num_pages


def check_plan(plan: Scheduler, chunks: list[Chunk], in_flight: bool) -> None:
    assert chunks or in_flight or not plan.has_work, "a step without progress while there is work"
    assert sum(c.stop - c.start for c in chunks) <= plan.max_batched_tokens
    assert len({c.request.id for c in chunks}) == len(chunks) <= plan.max_num_seqs
    for chunk in chunks:
        assert chunk.start < chunk.stop <= len(chunk.request.pages) * PAGE


@pytest.mark.parametrize("seed", range(10))
def test_random_schedules(seed, monkeypatch):
    for module in (pages, scheduler, turns):
        monkeypatch.setattr(module, "PAGE_SIZE", PAGE)
    rng = random.Random(seed)
    for _ in range(1000):
        run_schedule(rng)
