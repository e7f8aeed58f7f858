# SPDX-License-Identifier: Apache-2.0
"""How long a sequence may be, and how many pages the KV cache gets."""

from __future__ import annotations

from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CapacityError, RequestError
from nemotron_fast.footprint import kv_bytes_per_token, num_pages_that_fit
from nemotron_fast.pages import PAGE_SIZE, pages_for


def size_cache(
    config: ModelConfig, kv_dtype: str, max_model_len: int | None, max_num_seqs: int, budget: int
) -> tuple[int, int]:
    """(max_model_len, pages): as much as all sequences could use, at most `budget` bytes.

    Raises:
        RequestError: max_model_len is out of the model's range.
        CapacityError: not even one sequence of max_model_len fits.
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
        length = min(length, max(affordable * PAGE_SIZE, 1))
    if affordable < pages_for(length):
        needed = pages_for(length) * PAGE_SIZE * kv_bytes_per_token(config, kv_dtype)
        raise CapacityError(
            f"a context of {length} tokens needs {needed / 1e9:.2f} GB of KV cache, "
            f"{budget / 1e9:.2f} GB are available for it ({affordable * PAGE_SIZE} tokens); "
            "lower max_model_len or use kv_dtype='fp8'"
        )
    return length, min(affordable, pages_for(length) * max_num_seqs)
