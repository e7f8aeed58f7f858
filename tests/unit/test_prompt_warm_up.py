# SPDX-License-Identifier: Apache-2.0
"""Which steps of prompts a warm-up computes."""

from itertools import pairwise

import pytest

from nemotron_fast import _C
from nemotron_fast.prompt_warm_up import NOWHERE, warm_up_rows, warm_up_sizes
from nemotron_fast.reference_attention import MOST_DECODE_QUERIES


def test_the_widths_of_tiles_are_those_of_the_kernels():
    assert [_C.gemm_tile_tokens(tokens) for tokens in (1, 33, 65, 128, 129, 256, 257, 2048)] == [
        *(32, 64, 96, 128, 160, 256, 96, 256)
    ]


@pytest.mark.parametrize("max_tokens", [3, 31, 32, 64, 256, 288, 500, 2048, 16384])
def test_sizes_need_every_kernel_that_a_step_may_need(max_tokens):
    sizes = warm_up_sizes(max_tokens)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_tokens and len(sizes) < 20
    kernels = {(_C.gemm_tile_tokens(tokens), tokens > 256) for tokens in range(1, max_tokens + 1)}
    assert {(_C.gemm_tile_tokens(tokens), tokens > 256) for tokens in sizes} == kernels


def test_no_size_may_be_a_step_that_decodes():
    assert warm_up_sizes(1) == warm_up_sizes(2) == []


@pytest.mark.parametrize("max_num_seqs", [1, 2, 16])
@pytest.mark.parametrize("max_model_len", [2, 9, 100, 4096])
@pytest.mark.parametrize("num_tokens", [3, 32, 96, 2048])
def test_rows_are_prompts_that_write_nothing(num_tokens, max_model_len, max_num_seqs):
    rows = warm_up_rows(num_tokens, max_model_len, max_num_seqs)
    counts = [end - begin for begin, end in pairwise(rows.q_start)]
    assert not rows.decodes and not rows.sampled and rows.logit_rows == [sum(counts) - 1]
    assert rows.kv_len == counts == sorted(counts)  # those with few tokens first
    assert rows.num_few == sum(c for c in counts if c <= MOST_DECODE_QUERIES)
    assert len(counts) <= max_num_seqs and max(counts) <= max_model_len
    assert sum(counts) == num_tokens or len(counts) == max_num_seqs
    assert max_num_seqs == 1 or num_tokens > max_num_seqs * max_model_len or counts[0] == 1
    assert rows.positions == [p for count in counts for p in range(count)]
    assert set(rows.slots) == {NOWHERE} and len(rows.slots) == len(rows.token_ids) == len(rows.positions)
    assert rows.sources == [max_num_seqs + row for row in range(sum(counts))]
    assert [len(pages) for pages in rows.pages] == [-(-count // 64) for count in counts]
