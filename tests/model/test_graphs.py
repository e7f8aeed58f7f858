# SPDX-License-Identifier: Apache-2.0
"""The fixed buffers of the decode graphs compute what a batch built for the occasion does."""

import oracle
import pytest
import torch
from test_forward import make_engine

from nemotron_fast import SamplingParams
from nemotron_fast.batch import build_batch
from nemotron_fast.graphs import DecodeBatch, padded_sizes
from nemotron_fast.sampling_params import NEUTRAL


def test_padded_sizes():
    assert padded_sizes(1) == [1]
    assert padded_sizes(5) == [1, 2, 4, 5]
    sizes = padded_sizes(300)
    assert sizes[-1] == 300 and sizes == sorted(set(sizes)) and {1, 8, 64, 128, 256} <= set(sizes)


@pytest.mark.parametrize("size", [3, 4, 7])
def test_padded_rows_change_nothing(size, tmp_path):
    oracle.random_checkpoint(0, tmp_path, blocks=[(2, 256), ("linear", None), (1, 256)])
    engine = make_engine(tmp_path, num_pages=12)
    scratch = 11
    engine.scheduler.pages.allocate(12)  # of which the scratch page is never given to a request
    engine.scheduler.pages.release(list(range(11)))
    params = SamplingParams(**NEUTRAL | {"temperature": 0.0}, max_tokens=9, ignore_eos=True)
    for length in (3, 70, 64):
        engine.add_request(list(range(length)), params)
    while not engine.scheduler.running or any(r.num_computed < len(r.prompt) for r in engine.scheduler.running):
        engine.step()
    static = DecodeBatch(8, max_pages=5, scratch_page=scratch, device=engine.device)
    with torch.inference_mode():
        for _ in range(3):
            chunks = engine.scheduler.next()
            want = engine.model.forward(build_batch(chunks, engine.device), engine.cache)
            static.load(chunks, size)
            got = engine.model.forward(static.buffers(size), engine.cache)
            assert got.shape[0] == size
            torch.testing.assert_close(got[:3], want, rtol=1e-5, atol=1e-5)
            for chunk in chunks:
                chunk.request.append(5)
            engine.scheduler.commit(chunks)
