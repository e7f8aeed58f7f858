# SPDX-License-Identifier: Apache-2.0
"""How much of a prompt a step computes while others decode."""

from test_scheduler import finish_step, make_request, make_scheduler, run_step, spans


def chunks_beside_decoding(prompt: int, **options) -> list[int]:
    """How many of a long prompt's tokens each step computes while another request decodes."""
    scheduler = make_scheduler(2200, make_request(0, 3, 4000), max_batched_tokens=2048, **options)
    run_step(scheduler)
    scheduler.add(long := make_request(1, prompt, 1))
    sizes = []
    while not long.is_finished:
        chunks = scheduler.next()
        sizes += [c.stop - c.start for c in chunks if c.request is long]
        finish_step(scheduler, chunks)
    return sizes


def test_steps_get_no_longer_with_a_prompt():
    """A token's attention takes as long as its linears at 16,384: one at P counts (1 + P / 16384)."""
    sizes = chunks_beside_decoding(131072, max_mixed_tokens=225)
    assert sum(sizes) == 131072 and sizes[:73] == [224] * 73
    start = 0
    for size in sizes[:-1]:
        assert size * (1 + start / 16384) <= 2 * 224 or size == 64
        assert (size + 1) * (1 + start / 16384) > 2 * 224 or size == 224
        start += size
    assert sizes[-2] == 64, "it makes some progress"
    assert set(chunks_beside_decoding(100000)[:-1]) == {2047}, "where only throughput counts"


def test_a_prompt_leaves_the_rest_of_a_step_to_the_next():
    scheduler = make_scheduler(800, make_request(0, 3, 4000), max_batched_tokens=2048, max_mixed_tokens=225)
    shared = [5] * 49152
    scheduler.add(first := make_request(1, [*shared, 6], 1))
    while not first.is_finished:
        run_step(scheduler)
    scheduler.add(make_request(2, [*shared, *[7] * 30], 1))  # behind a cached beginning
    scheduler.add(make_request(3, 500, 1))
    assert spans(scheduler.next())[1:] == [(2, 49152, 49182), (3, 0, 224 - 2 * 30)]
