# SPDX-License-Identifier: Apache-2.0
"""Scheduler and pages, driven by a model that answers with made-up tokens."""

import random

import pytest

from nemotron_fast.errors import CapacityError
from nemotron_fast.pages import PAGE_SIZE, PageAllocator, pages_for
from nemotron_fast.request import Request
from nemotron_fast.sampling_params import NEUTRAL, SamplingParams
from nemotron_fast.scheduler import Scheduler


def make_request(number: int, prompt_len: int, max_tokens: int) -> Request:
    params = SamplingParams(**NEUTRAL)
    return Request(number, [1] * prompt_len, params, seed=0, max_tokens=max_tokens, stop_ids=frozenset())


def run_step(scheduler: Scheduler) -> list[Request]:
    """One step; checks what must hold in every step."""
    chunks = scheduler.next()
    assert bool(chunks) == scheduler.has_work, "a step without progress while there is work"
    assert sum(c.stop - c.start for c in chunks) <= scheduler.max_batched_tokens
    assert len({id(c.request) for c in chunks}) == len(chunks) <= scheduler.max_num_seqs
    pages = [p for c in chunks for p in c.request.pages]
    assert len(set(pages)) == len(pages), "two requests share a page"
    for chunk in chunks:
        assert chunk.start < chunk.stop == chunk.request.num_computed <= chunk.request.num_tokens
        assert chunk.stop <= len(chunk.request.pages) * PAGE_SIZE
    sampled = [c.request for c in chunks if c.samples]
    for request in sampled:
        scheduler.receive(request, 2)
    scheduler.pages.check()
    return sampled


def test_page_allocator_gives_all_or_nothing():
    pages = PageAllocator(3)
    assert pages.allocate(4) is None and pages.num_free == 3
    first = pages.allocate(2)
    assert pages.allocate(2) is None
    pages.release(first)
    pages.check()
    with pytest.raises(AssertionError, match="not held"):
        pages.release([first[0]])


def test_a_long_prompt_runs_in_chunks_beside_decoding():
    scheduler = Scheduler(100, max_num_seqs=4, max_batched_tokens=32)
    short, long = make_request(0, 3, 20), make_request(1, 100, 2)
    scheduler.add(short)
    scheduler.add(long)
    steps = 0
    while not long.is_finished:
        assert short in run_step(scheduler) or short.is_finished, "decoding stalled behind the long prompt"
        steps += 1
    assert steps == 5  # 29 + 31 + 31 + 9 prompt tokens, then one more token


def test_a_request_larger_than_the_pool_is_refused():
    scheduler = Scheduler(2, max_num_seqs=4, max_batched_tokens=32)
    with pytest.raises(CapacityError, match="may need 129 tokens.*holds 128"):
        scheduler.add(make_request(0, 100, 29))
    assert not scheduler.has_work


def test_the_youngest_gives_way_when_pages_run_out():
    scheduler = Scheduler(2, max_num_seqs=4, max_batched_tokens=200)
    old, young = make_request(0, 60, 20), make_request(1, 60, 20)
    scheduler.add(old)
    scheduler.add(young)
    while not old.is_finished:
        run_step(scheduler)
    assert not young.is_finished and 0 < len(young.output) < 20
    while not young.is_finished:
        run_step(scheduler)
    assert len(young.output) == 20
    assert scheduler.pages.num_free == 2


@pytest.mark.parametrize("seed", range(200))
def test_random_schedules_finish_and_leak_nothing(seed):
    rng = random.Random(seed)
    num_pages = rng.randint(3, 12)
    scheduler = Scheduler(num_pages, max_num_seqs=rng.randint(1, 6), max_batched_tokens=rng.choice([1, 7, 64, 300]))
    requests = []
    for number in range(rng.randint(1, 12)):
        total = rng.randint(2, num_pages * PAGE_SIZE)
        prompt_len = rng.randint(max(1, total - 90), total - 1)
        requests.append(make_request(number, prompt_len, total - prompt_len))
    pending = list(requests)
    for _ in range(20_000):
        if pending and rng.random() < 0.2:
            scheduler.add(pending.pop())
        running = [r for r in (*scheduler.running, *scheduler.waiting)]
        if running and rng.random() < 0.005:
            victim = rng.choice(running)
            victim.finish("abort")
            scheduler.remove(victim)
        if scheduler.has_work:
            run_step(scheduler)
        elif not pending:
            break
    assert all(r.is_finished for r in requests)
    assert all(len(r.output) == r.max_tokens for r in requests if r.finish_reason == "length")
    assert scheduler.pages.num_free == num_pages and pages_for(1) == 1
