# SPDX-License-Identifier: Apache-2.0
"""gather_rows: where each sequence of a step is."""

from nemotron_fast.batch import gather_rows
from nemotron_fast.request import Request
from nemotron_fast.sampling_params import NEUTRAL, SamplingParams
from nemotron_fast.scheduler import Chunk


def make_chunk(number: int, count: int, *, start: int = 0, samples: bool = True, **options: int) -> Chunk:
    """The tokens number * 100 + position of a request of its own, on pages number * 10 and following."""
    params = SamplingParams(**NEUTRAL | options)
    prompt = [number * 100 + position for position in range(start + count)]
    request = Request(number, prompt, params, seed=0, max_tokens=1, stop_ids=frozenset())
    request.pages = [number * 10 + i for i in range(-(-len(prompt) // 64))]
    return Chunk(request, start, start + count, samples)


def test_chunks_of_few_tokens_come_first_in_the_order_that_they_had():
    chunks = [make_chunk(1, 20), make_chunk(2, 1), make_chunk(3, 8, start=60), make_chunk(4, 9, samples=False)]
    rows = gather_rows(chunks, num_seqs=4)
    assert [request.id for request in rows.sampled] == [2, 3, 1]
    assert rows.q_start == [0, 1, 9, 29, 38] and rows.num_few == 9 and not rows.decodes
    assert rows.kv_len == [1, 68, 20, 9]
    assert rows.pages == [[20], [30, 31], [10], [40]]
    assert rows.token_ids == [200, *range(360, 368), *range(100, 120), *range(400, 409)]
    assert rows.positions == [0, *range(60, 68), *range(20), *range(9)]
    assert rows.slots[:9] == [20 * 64, *(30 * 64 + p for p in range(60, 64)), *(31 * 64 + p for p in range(4))]
    assert rows.logit_rows == [0, 8, 28]
    assert rows.sources == [4 + row for row in range(38)]


def test_rows_of_prompt_logprobs_are_those_of_their_chunk():
    rows = gather_rows([make_chunk(1, 12, prompt_logprobs=0), make_chunk(2, 3, prompt_logprobs=0)], num_seqs=2)
    assert [(r.request.id, r.position, r.row, r.count) for r in rows.prompt_rows] == [(2, 1, 2, 2), (1, 1, 4, 11)]
    assert rows.logit_rows == [2, 14, 0, 1, *range(3, 14)]


def test_a_step_that_decodes_has_few_tokens_alone():
    rows = gather_rows([make_chunk(1, 1), make_chunk(2, 1, start=70)], num_seqs=2)
    assert rows.decodes and rows.num_few == 2
