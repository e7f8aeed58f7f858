# SPDX-License-Identifier: Apache-2.0
"""The scheduler's rules, one by one; test_scheduler_fuzz.py has them all at once."""

from dataclasses import dataclass

import pytest

from nemotron_fast.errors import CapacityError
from nemotron_fast.request import Request
from nemotron_fast.sampling_params import NEUTRAL, SamplingParams
from nemotron_fast.scheduler import Chunk, Scheduler


def make_request(
    number: int, prompt: int | list[int], max_tokens: int, stop_ids: frozenset[int] = frozenset({9}), **options
) -> Request:
    """`prompt`: its tokens, or a number of tokens that no other request has."""
    tokens = [1000 + number] * prompt if isinstance(prompt, int) else prompt
    params = SamplingParams(**NEUTRAL | options)
    return Request(number, tokens, params, seed=0, max_tokens=max_tokens, stop_ids=stop_ids)


def make_scheduler(num_pages: int, *requests: Request, **options) -> Scheduler:
    scheduler = Scheduler(num_pages, **{"max_num_seqs": 4, "max_batched_tokens": 32} | options)
    for request in requests:
        scheduler.add(request)
    return scheduler


def finish_step(scheduler: Scheduler, chunks: list[Chunk]) -> list[Request]:
    """The step's tokens arrive, all of them 2; the requests that took one."""
    done = [c.request for c in chunks if c.samples and scheduler.receive(c.request, 2)]
    scheduler.check()
    return done


def run_step(scheduler: Scheduler) -> list[Request]:
    return finish_step(scheduler, scheduler.next())


def run(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        run_step(scheduler)
    assert scheduler.pages.num_held == 0


def spans(chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    return [(c.request.id, c.start, c.stop) for c in chunks]


def test_a_long_prompt_runs_in_chunks_beside_decoding():
    short, long = make_request(0, 3, 20), make_request(1, 100, 2)
    scheduler = make_scheduler(100, short, long)
    steps = 0
    while not long.is_finished:
        assert short in run_step(scheduler) or short.is_finished, "decoding stalled behind the long prompt"
        steps += 1
    assert steps == 5  # 29 + 31 + 31 + 9 prompt tokens, then one more token


def test_prompts_are_held_back_while_others_decode():
    scheduler = make_scheduler(200, make_request(0, 3, 9), max_batched_tokens=2048, max_mixed_tokens=256)
    run_step(scheduler)
    scheduler.add(make_request(1, 6000, 1))
    assert spans(scheduler.next()) == [(0, 3, 4), (1, 0, 255)]
    crowd = make_scheduler(900, *(make_request(n, 2, 9) for n in range(300)), max_num_seqs=999, max_batched_tokens=2048)
    crowd.max_mixed_tokens = 256
    run_step(crowd)
    crowd.add(make_request(999, 500, 1))
    assert spans(crowd.next())[-1] == (999, 0, 64), "many decode, yet a prompt makes some progress"


def test_a_request_larger_than_the_pool_is_refused():
    scheduler = make_scheduler(2)
    with pytest.raises(CapacityError, match="may need 129 tokens.*holds 128"):
        scheduler.add(make_request(0, 100, 29))
    assert not scheduler.has_work


def test_the_youngest_gives_way_when_pages_run_out():
    old, young = make_request(0, 60, 20), make_request(1, 60, 20)
    scheduler = make_scheduler(2, old, young, max_batched_tokens=200)
    while not old.is_finished:
        run_step(scheduler)
    assert not young.is_finished and 0 < len(young.output) < 20 and scheduler.num_preempted == 1
    run(scheduler)
    assert len(young.output) == 20


def test_a_step_is_planned_while_the_one_before_is_in_flight():
    first, second = make_request(0, 5, 3), make_request(1, 5, 9)
    scheduler = make_scheduler(8, first, second)
    in_flight = scheduler.next()
    for _ in range(2):
        ahead = scheduler.next()
        assert [c.start for c in ahead] == [c.stop for c in in_flight] and all(c.samples for c in ahead)
        finish_step(scheduler, in_flight)
        in_flight = ahead
    ahead = scheduler.next()
    assert [c.request for c in ahead] == [second], "the first request's last token is in flight"
    finish_step(scheduler, in_flight)
    assert first.is_finished and len(first.output) == 3


def test_a_token_that_comes_after_the_end_is_dropped():
    request = make_request(0, 5, 9)
    scheduler = make_scheduler(8, request)
    in_flight, ahead = scheduler.next(), scheduler.next()
    assert scheduler.receive(in_flight[0].request, 9)  # a stop token
    assert request.finish_reason == "stop" and not scheduler.has_work and scheduler.pages.num_held == 0
    assert not scheduler.receive(ahead[0].request, 2) and request.output == [9]


def test_admission_waits_for_room_that_will_surely_be_needed():
    old, young = (make_request(n, 60, 20, stop_ids=frozenset()) for n in range(2))
    scheduler = make_scheduler(3, old, young, max_batched_tokens=200)
    run_step(scheduler)
    assert scheduler.running == [old], "both would need two pages in the end"
    run(scheduler)
    assert scheduler.num_preempted == 0 and len(old.output) == len(young.output) == 20


def test_room_counts_until_the_others_end():
    old, young = make_request(0, 60, 2, stop_ids=frozenset()), make_request(1, 60, 20, stop_ids=frozenset())
    scheduler = make_scheduler(3, old, young, max_batched_tokens=200)
    run_step(scheduler)
    assert scheduler.running == [old, young], "the old one has ended before the young one grows"
    run(scheduler)
    assert scheduler.num_preempted == 0


def test_admission_learns_how_long_outputs_get():
    scheduler = make_scheduler(3, max_batched_tokens=200)
    for number in range(40):
        scheduler.add(make_request(number, 60, 20))
        run(scheduler)
    assert 18 < scheduler.output_lengths.mean < 20
    scheduler.add(make_request(100, 60, 20))
    scheduler.add(make_request(101, 60, 20))
    run_step(scheduler)
    assert len(scheduler.running) == 1, "outputs have been 20 tokens long"


def test_short_outputs_do_not_make_long_limits_expected():
    scheduler = make_scheduler(100, max_batched_tokens=200, max_num_seqs=8)
    for number in range(40):
        scheduler.add(make_request(number, 60, 2))
        run(scheduler)
    for number in range(100, 108):
        scheduler.add(make_request(number, 60, 3000))
    for _ in range(3):  # of 200 tokens each
        run_step(scheduler)
    assert len(scheduler.running) == 8


def most_running(scheduler: Scheduler) -> int:
    most = 0
    while scheduler.has_work:
        run_step(scheduler)
        most = max(most, len(scheduler.running))
    waves = scheduler.waves
    assert not waves.lengths and not waves.final_pages and not waves.prompt_pages
    return most


def alike(count: int, *, num_pages: int, length=60, stop_ids=frozenset(), odd_length=0, params=None, **sizes):
    """A scheduler with requests of 60 tokens that generate `length`."""
    requests = [make_request(n, 60, length, stop_ids, **params or {}) for n in range(count)]
    requests[-1].max_tokens += odd_length
    return make_scheduler(num_pages, *requests, **{"max_num_seqs": 99, "max_batched_tokens": 2048} | sizes)


@pytest.mark.parametrize(
    ("count", "most"),
    [(11, 11), (16, 8), (15, 8), (22, 11), (38, 11)],  # 11 fit to their ends; beside 5 of them not even 11 prompts
)
def test_requests_of_one_length_run_in_level_waves(count, most):
    scheduler = alike(count, num_pages=22)
    assert most_running(scheduler) == most and scheduler.num_preempted == 0


def test_turns_that_gain_little_are_waves():
    scheduler = alike(18, num_pages=100, length=580)  # 10 fit; beside 8, one more page for each of those: 64 steps less
    assert most_running(scheduler) == 9
    scheduler = alike(15, num_pages=99, length=64, max_num_seqs=8)  # beside 7, one row for 8: 8 steps less
    assert most_running(scheduler) == 8


def test_more_than_two_waves_begin_with_full_ones():
    scheduler = alike(20, num_pages=99, max_num_seqs=8, length=1)
    in_flight = scheduler.next()
    assert len(in_flight) == 8 and not scheduler.next(), "no more than a step holds have pages"


def test_waves_are_not_level_where_prompts_start_far_apart():
    requests = [make_request(n, 250, 16, frozenset()) for n in range(9)]  # 5 pages: 6 fit
    scheduler = make_scheduler(30, *requests, max_num_seqs=99, max_batched_tokens=100)
    assert most_running(scheduler) > 5


def test_waves_are_of_requests_that_surely_generate_equally_many():
    unsure = [
        alike(16, num_pages=22, odd_length=1),
        alike(16, num_pages=22, stop_ids=frozenset({9})),
        alike(16, num_pages=22, params={"stop": ("x",)}),
    ]
    for full in (*unsure, alike(16, num_pages=22, max_mixed_tokens=2048)):
        assert most_running(full) >= 9


@dataclass
class Turns:
    """What became of requests that take turns."""

    rows: list[int]  # of each step
    num_gaps: int = 0  # steps without the oldest request
    spread: int = 0  # between those behind, in tokens, when the oldest ended


def run_turns(scheduler: Scheduler, length: int) -> Turns:
    requests = list(scheduler.waiting)
    turns = Turns([])
    while scheduler.has_work:
        chunks = scheduler.next()
        turns.rows.append(len(chunks))
        if not requests[0].is_finished:
            turns.num_gaps += all(c.request is not requests[0] for c in chunks)
            behind = [len(r.output) for r in requests if len(r.output) < len(requests[0].output)]
            turns.spread = max(behind, default=0) - min(behind, default=0)
        finish_step(scheduler, chunks)
    assert scheduler.num_preempted == 0 and all(len(r.output) == length for r in requests)
    return turns


@pytest.mark.parametrize(
    ("count", "num_pages", "max_num_seqs", "length", "num_steps"),
    [
        # 10 fit to their ends. Beside 4 of them there are 6 pages for each of the 10 others: 384 tokens.
        pytest.param(14, 100, 99, 580, 580 + 580 - (384 - 60), id="pages"),
        pytest.param(9, 99, 8, 64, 9 * 64 // 8, id="rows"),
        pytest.param(12, 99, 8, 64, 12 * 64 // 8, id="half as many again"),
        pytest.param(20, 99, 8, 64, 20 * 64 // 8, id="after a full wave"),
    ],
)
def test_more_than_fit_take_turns(count, num_pages, max_num_seqs, length, num_steps):
    turns = run_turns(alike(count, num_pages=num_pages, max_num_seqs=max_num_seqs, length=length), length)
    assert num_steps <= len(turns.rows) <= num_steps + 4, turns
    assert max(turns.rows) <= max_num_seqs and turns.num_gaps == 0 and turns.spread <= 1


def test_turns_are_level():
    turns = run_turns(alike(14, num_pages=100, length=580), 580)
    assert set(turns.rows[2:500]) <= {9, 10}, "4 that are ahead, and 10 * 324 tokens in 580 steps"


@pytest.mark.parametrize(
    ("count", "prompts", "num_pages", "max_num_seqs", "num_steps"),
    [
        pytest.param(9, [134, 78], 43, 99, 223, id="pages run out"),
        pytest.param(9, [101, 14, 103], 37, 8, 385, id="prompts wait for pages"),
    ],
)
def test_turns_of_unequal_prompts(count, prompts, num_pages, max_num_seqs, num_steps):
    requests = [make_request(n, prompts[n % len(prompts)], 200, frozenset()) for n in range(count)]
    scheduler = make_scheduler(num_pages, *requests, max_num_seqs=max_num_seqs, max_batched_tokens=64)
    assert len(run_turns(scheduler, 200).rows) == num_steps < 2 * 200 + 9


def test_turns_end_where_lengths_differ():
    scheduler = alike(12, num_pages=99, max_num_seqs=8)
    while scheduler.waiting:
        run_step(scheduler)
    scheduler.add(make_request(99, 60, 61, frozenset()))
    while scheduler.has_work:
        chunks = scheduler.next()
        assert len(chunks) <= 8
        finish_step(scheduler, chunks)


def test_those_that_share_a_beginning_take_no_turns():
    requests = [make_request(n, [*range(64), n], 575, frozenset()) for n in range(10)]
    scheduler = make_scheduler(1 + 10 * 9, *requests, max_num_seqs=99, max_batched_tokens=800)  # one page is shared
    assert len(run_turns(scheduler, 575).rows) == 575


def test_turns_hold_up_no_prompt():
    scheduler = alike(12, num_pages=99, max_num_seqs=8, max_batched_tokens=80)
    while scheduler.waiting:
        chunks = scheduler.next()
        assert len(chunks) <= 8 and sum(c.stop - c.start for c in chunks) >= 60
        finish_step(scheduler, chunks)
    assert max(len(r.output) for r in scheduler.running) < 14
    run(scheduler)


def test_waves_are_not_awaited_by_those_that_come_later():
    scheduler = make_scheduler(22, *(make_request(n, 60, 60, frozenset()) for n in range(4)), max_num_seqs=99)
    for n in range(4, 16):
        for _ in range(5):
            run_step(scheduler)
        scheduler.add(make_request(n, 60, 60, frozenset()))
    assert most_running(scheduler) > 8


def test_a_shared_beginning_is_counted_once():
    prompt = [5] * 640
    first = make_request(0, [*prompt, 1], 20, stop_ids=frozenset())
    scheduler = make_scheduler(14, first, max_batched_tokens=2000)
    run_step(scheduler)
    for number in range(1, 4):
        scheduler.add(make_request(number, [*prompt, number + 1], 20, stop_ids=frozenset()))
    run_step(scheduler)
    assert len(scheduler.running) == 4, "10 pages for all and one for each"
    run(scheduler)


def test_a_preempted_request_waits_for_its_token_in_flight():
    old, young = make_request(0, 63, 20), make_request(1, 60, 20)
    scheduler = make_scheduler(2, old, young, max_batched_tokens=200)
    in_flight = scheduler.next()
    assert [c.request for c in scheduler.next()] == [old, young]
    ahead = scheduler.next()  # the old one's page 1 was the young one's page 0
    assert [c.request for c in ahead] == [old] and scheduler.waiting[0] is young and not young.pages
    finish_step(scheduler, in_flight)
    assert young.output == [2] and young.in_flight == 1


def test_a_prompt_starts_from_the_pages_of_an_equal_beginning():
    base = list(range(150))
    scheduler = make_scheduler(20, make_request(0, base, 3), max_batched_tokens=500)
    run(scheduler)
    assert scheduler.pages.num_cached == 2
    same, other = make_request(1, base, 3), make_request(2, [*base[:70], 7, 7, *base[72:]], 3)
    scheduler.add(same)
    scheduler.add(other)
    assert spans(scheduler.next()) == [(1, 128, 150), (2, 64, 150)]
    assert same.num_cached == 128 and same.pages[0] == other.pages[0] and same.pages[1] != other.pages[1]
    assert (scheduler.num_looked_up, scheduler.num_found) == (450, 192)


def test_a_prompt_that_is_cached_whole_computes_its_last_page():
    prompt = list(range(128))
    scheduler = make_scheduler(20, make_request(0, prompt, 2), max_batched_tokens=500)
    run(scheduler)
    scheduler.add(make_request(1, prompt, 2))
    assert spans(scheduler.next()) == [(1, 64, 128)]


def test_requests_of_one_step_share_a_prompt():
    scheduler = make_scheduler(20, *(make_request(n, list(range(130)), 2) for n in range(3)), max_batched_tokens=500)
    assert spans(scheduler.next()) == [(0, 0, 130), (1, 128, 130), (2, 128, 130)]
    assert scheduler.pages.num_held == 2 + 3
    scheduler.check()


def test_prompt_logprobs_need_the_whole_prompt():
    prompt = list(range(100))
    scheduler = make_scheduler(20, make_request(0, prompt, 2), max_batched_tokens=500)
    run(scheduler)
    scheduler.add(make_request(1, prompt, 2, prompt_logprobs=0))
    assert spans(scheduler.next()) == [(1, 0, 100)]


def test_caching_can_be_off():
    scheduler = make_scheduler(20, make_request(0, [1] * 100, 2), max_batched_tokens=500, prefix_caching=False)
    run(scheduler)
    assert scheduler.pages.num_cached == 0 and scheduler.pages.num_free == 20


def test_a_preempted_request_takes_its_pages_back():
    old, young = make_request(0, 60, 20), make_request(1, 70, 20)
    scheduler = make_scheduler(3, old, young, max_batched_tokens=200)
    while old.num_tokens < 65:
        run_step(scheduler)
    run_step(scheduler)  # the old one's second page is the young one's partial second page
    assert young in scheduler.waiting and scheduler.pages.num_cached == 1
    while not old.is_finished:
        run_step(scheduler)
    chunks = scheduler.next()
    assert [(c.request, c.start) for c in chunks] == [(young, 64)]
