# SPDX-License-Identifier: Apache-2.0
"""The split over tensor-parallel ranks: every element of every checkpoint tensor has an owner."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CapacityError
from nemotron_fast.sharding import checkpoint_shapes, head_spans, param_plan, split_span

CONFIGS = Path(__file__).parent.parent / "configs"


@given(st.integers(0, 5000), st.integers(1, 16), st.sampled_from([1, 16, 64]))
def test_split_span_partitions_evenly(total, size, multiple):
    spans = [split_span(total, rank, size, multiple) for rank in range(size)]
    assert spans[0].start == 0 and spans[-1].stop == total
    assert all(a.stop == b.start for a, b in pairwise(spans))
    assert all(s.start % multiple == 0 or s.start == total for s in spans)
    units = [-(-len(s) // multiple) for s in spans]
    assert max(units) - min(units) <= 1


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]))
def test_every_query_head_finds_its_kv_head_on_its_rank(num_kv, group, size):
    heads = num_kv * group
    if heads % size:
        with pytest.raises(CapacityError, match=f"tensor_parallel_size={size}"):
            head_spans(heads, num_kv, 0, size)
        return
    for rank in range(size):
        q, kv = head_spans(heads, num_kv, rank, size)
        local_group = len(q) // len(kv)
        assert len(q) == local_group * len(kv)
        for i in range(len(q)):
            assert kv.start + i // local_group == (q.start + i) // group


@pytest.mark.parametrize("name", ["super-49b-v1", "ultra-253b-v1", "mini-all-blocks"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_together_hold_every_tensor(name, size):
    config = ModelConfig.from_hf(json.loads((CONFIGS / f"{name}.json").read_text()))
    covered = defaultdict(set)
    for rank in range(size):
        for param in param_plan(config, rank, size):
            for piece in param.pieces:
                cols = piece.cols or range(0, 1)
                covered[piece.tensor].add((piece.rows.start, piece.rows.stop, cols.start, cols.stop))
    for tensor, shape in checkpoint_shapes(config).items():
        full = shape[0] * (shape[1] if len(shape) == 2 else 1)
        area = sum((r1 - r0) * (c1 - c0) for r0, r1, c0, c1 in covered[tensor])  # replicas count once: a set
        assert area == full, tensor


def test_widths_are_split_in_tiles_where_an_even_split_would_not_be():
    assert [len(split_span(2816, rank, 8)) for rank in range(8)] == [384, 384, 384, 384, 320, 320, 320, 320]
