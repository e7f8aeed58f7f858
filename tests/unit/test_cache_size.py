# SPDX-License-Identifier: Apache-2.0
"""How much KV cache a model gets, and what it says where that is too little."""

from pathlib import Path

import pytest

from nemotron_fast.cache_size import size_cache
from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CapacityError, RequestError

SUPER = ModelConfig.from_path(Path(__file__).parent.parent / "configs" / "super-49b-v1.json")
TOKEN = 100_352  # bytes in FP8
PAGE = 64 * TOKEN


def test_as_much_as_the_sequences_could_use_or_as_there_is():
    assert size_cache(SUPER, "fp8", 1000, 3, 100 * PAGE) == (1000, 3 * 16)
    assert size_cache(SUPER, "fp8", 1000, 8, 100 * PAGE + 1) == (1000, 100)
    assert size_cache(SUPER, "bfloat16", 1000, 8, 100 * PAGE) == (1000, 50)
    assert size_cache(SUPER, "fp8", None, 8, 100 * PAGE) == (6400, 100)
    assert size_cache(SUPER, "fp8", None, 1, 5000 * PAGE) == (131072, 2048)


@pytest.mark.parametrize(
    ("kv_dtype", "pages", "seqs", "fits"),
    [
        ("fp8", 15, 4, "max_model_len up to 960 for one sequence at a time, 192 for 4 at a time"),
        ("fp8", 15, 16, "max_model_len up to 960 for one sequence at a time"),
        ("fp8", 15, 1, "max_model_len up to 960 for one sequence at a time"),
        ("bfloat16", 15, 2, "max_model_len up to 960 for one sequence at a time, 448 for 2 at a time, more with"),
        ("fp8", 0, 2, "nothing; free some memory"),
    ],
)
def test_what_would_fit(kv_dtype, pages, seqs, fits):
    width = 1 if kv_dtype == "fp8" else 2
    budget = width * (pages * PAGE + PAGE - 1)
    with pytest.raises(CapacityError) as error:
        size_cache(SUPER, kv_dtype, 1000, seqs, budget)
    numbers, found = str(error.value).split("would fit: ")
    assert f"needs {width * 16 * PAGE / 1e9:.2f} GB of KV cache, {budget / 1e9:.2f} GB are available" in numbers
    assert found.startswith(fits) and found.endswith("kv_dtype='fp8'") == (kv_dtype != "fp8")
    if pages:
        assert size_cache(SUPER, kv_dtype, 64 * pages, seqs, budget) == (64 * pages, pages)


@pytest.mark.parametrize("length", [0, 1, 131073])
def test_lengths_out_of_range(length):
    with pytest.raises(RequestError, match=rf"max_model_len={length}, want 2\.\.131072"):
        size_cache(SUPER, "fp8", length, 1, 1 << 40)
