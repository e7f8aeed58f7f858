# SPDX-License-Identifier: Apache-2.0
"""Which steps of prompts a warm-up computes."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from nemotron_fast import _C
from nemotron_fast.prompt_warm_up import NOWHERE, REHEARSED_TOKENS, WIDTH_STEP, warm_up_rows, warm_up_sizes
from nemotron_fast.reference_attention import MOST_DECODE_QUERIES

CSRC = Path(__file__).parents[2] / "csrc"


def test_what_tells_the_kernels_apart_is_what_the_headers_say():
    assert re.search(rf"kTileTokensStep = {WIDTH_STEP};", (CSRC / "host/gemm_schedule.h").read_text())
    config = (CSRC / "kernels/linear/gemm_config.cuh").read_text()
    assert re.search(rf"kMaxRehearsedTokens = {REHEARSED_TOKENS};", config)


@pytest.mark.parametrize("max_tokens", [3, 31, 32, 64, 256, 288, 500, 2048, 16384])
def test_sizes_need_every_kernel_that_a_step_may_need(max_tokens):
    sizes = warm_up_sizes(max_tokens)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_tokens and len(sizes) < 20
    assert (MOST_DECODE_QUERIES in sizes) == (max_tokens >= MOST_DECODE_QUERIES)

    def gemms(sizes):  # up to 16 tokens there is none
        return {(_C.gemm_tile_tokens(tokens), tokens > REHEARSED_TOKENS) for tokens in sizes if tokens > 16}

    assert gemms(sizes) == gemms(range(max_tokens + 1))


def test_no_size_may_be_a_step_that_decodes():
    assert warm_up_sizes(1) == warm_up_sizes(2) == []


@pytest.mark.parametrize("max_num_seqs", [1, 2, 16])
@pytest.mark.parametrize("max_model_len", [2, 9, 16, 128, 1024, 4096])
@pytest.mark.parametrize("num_tokens", [3, 8, 32, 96, 2048])
def test_rows_are_prompts_that_write_nothing(num_tokens, max_model_len, max_num_seqs):
    rows = warm_up_rows(num_tokens, max_model_len, max_num_seqs)
    counts = [end - begin for begin, end in pairwise(rows.q_start)]
    assert not rows.decodes and not rows.sampled
    assert rows.kv_len == counts == sorted(counts)  # those with few tokens first
    assert rows.num_few == sum(c for c in counts if c <= MOST_DECODE_QUERIES)
    assert len(counts) <= max_num_seqs and max(counts) <= max_model_len
    assert sum(counts) == num_tokens or len(counts) == max_num_seqs
    assert max_num_seqs == 1 or counts[0] == 1
    assert rows.positions == [p for count in counts for p in range(count)]
    assert set(rows.slots) == {NOWHERE} and len(rows.slots) == len(rows.token_ids) == len(rows.positions)
    assert rows.sources == [max_num_seqs + row for row in range(sum(counts))]
    assert [len(pages) for pages in rows.pages] == [-(-count // 64) for count in counts]
    assert rows.logit_rows == list(range(min(sum(counts), max_num_seqs)))
