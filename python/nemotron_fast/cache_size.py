# SPDX-License-Identifier: Apache-2.0
"""How long a sequence may be, and how many pages the KV cache gets."""

from __future__ import annotations

from nemotron_fast.config import ModelConfig
from nemotron_fast.dtypes import FP8
from nemotron_fast.errors import CapacityError, RequestError
from nemotron_fast.footprint import kv_bytes_per_token, num_pages_that_fit
from nemotron_fast.pages import PAGE_SIZE, pages_for


def size_cache(
    config: ModelConfig, kv_dtype: str, max_model_len: int | None, max_num_seqs: int, budget: int
) -> tuple[int, int]:
    """(max_model_len, pages): as much as all sequences could use, at most `budget` bytes.

    Raises:
        RequestError: max_model_len is out of the model's range.
        CapacityError: not even one sequence of max_model_len fits; it says what would.
    """
    length = config.max_position if max_model_len is None else max_model_len
    if not 2 <= length <= config.max_position:  # of a prompt and a new token
        raise RequestError(
            f"max_model_len={length}, want 2..{config.max_position} (the model's max_position_embeddings)"
        )
    affordable = num_pages_that_fit(config, budget, kv_dtype, PAGE_SIZE)
    if affordable is None:  # no attention anywhere: pages take no memory
        return length, pages_for(length) * max_num_seqs
    if max_model_len is None:
        length = min(length, max(affordable * PAGE_SIZE, 2))
    if affordable < pages_for(length):
        needed = pages_for(length) * PAGE_SIZE * kv_bytes_per_token(config, kv_dtype)
        raise CapacityError(
            f"a context of {length} tokens needs {needed / 1e9:.2f} GB of KV cache, "
            f"{budget / 1e9:.2f} GB are available; would fit: {_what_fits(affordable, kv_dtype, max_num_seqs)}"
        )
    return length, min(affordable, pages_for(length) * max_num_seqs)


def _what_fits(num_pages: int, kv_dtype: str, max_num_seqs: int) -> str:
    fitting = []
    if num_pages:
        fitting.append(f"max_model_len up to {num_pages * PAGE_SIZE} for one sequence at a time")
    if max_num_seqs > 1 and (each := num_pages // max_num_seqs):
        fitting.append(f"{each * PAGE_SIZE} for {max_num_seqs} at a time")
    if kv_dtype != FP8:
        fitting.append("more with kv_dtype='fp8'")
    return ", ".join(fitting) or "nothing; free some memory"
