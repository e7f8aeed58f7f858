# SPDX-License-Identifier: Apache-2.0
"""Steps that compute prompts for nobody, so that no later step is the first of its size.

The CUDA driver loads a kernel when it is first launched, and waits for the GPU to do so: such a step of Super-49B
beside 16 sequences took 72 instead of 36 ms on an H100. (Kernels of options that few requests have, such as penalties
or log-probabilities, are left to the first of these.)
"""

from __future__ import annotations

from nemotron_fast import _C
from nemotron_fast.batch import Rows
from nemotron_fast.pages import pages_for
from nemotron_fast.reference_attention import MOST_DECODE_QUERIES

# The GEMM has a kernel for each width of its tiles (kTileTokensStep of csrc/host/gemm_schedule.h), and others up to so
# many tokens (kMaxRehearsedTokens of csrc/kernels/linear/gemm_config.cuh).
WIDTH_STEP, REHEARSED_TOKENS = 32, 256

NOWHERE = -1  # a slot; rope_append does not write there


def warm_up_sizes(max_tokens: int) -> list[int]:
    """Ascending numbers of tokens, `max_tokens` the last: steps of these run all kernels of steps of fewer tokens.

    None are below three: a step of one or two may be of decoding sequences alone, whose attention appends KV.
    """
    few = MOST_DECODE_QUERIES  # neither the GEMM nor prefill attention computes these
    first_of: dict[tuple[int, bool], int] = {}
    for size in range(WIDTH_STEP, max_tokens + 1, WIDTH_STEP):
        first_of.setdefault((_C.gemm_tile_tokens(size), size > REHEARSED_TOKENS), size)
    return sorted(size for size in {few, *first_of.values(), max_tokens} if 2 < size <= max_tokens)


def warm_up_rows(num_tokens: int, max_model_len: int, max_num_seqs: int) -> Rows:
    """A step of `num_tokens` tokens 0, or as many as the sequences hold: one of a single token, and prompts of at most
    `max_model_len` >= 2; or a prompt alone where there may be one sequence only.

    They attend to what page 0 holds and write no KV. Logits are computed of as many tokens as sequences may sample,
    none is sampled.
    """
    rows = Rows()
    for count in _prompt_lengths(num_tokens, max_model_len, max_num_seqs):
        rows.sources += range(max_num_seqs + len(rows.token_ids), max_num_seqs + len(rows.token_ids) + count)
        rows.token_ids += [0] * count
        rows.positions += range(count)
        rows.slots += [NOWHERE] * count
        rows.q_start.append(len(rows.token_ids))
        rows.kv_len.append(count)
        rows.pages.append([0] * pages_for(count))
    rows.logit_rows += range(min(len(rows.token_ids), max_num_seqs))
    return rows


def _prompt_lengths(num_tokens: int, max_model_len: int, max_num_seqs: int) -> list[int]:
    """Ascending: the sequences with few tokens come first."""
    if max_num_seqs == 1:
        return [min(num_tokens, max_model_len)]
    whole, rest = divmod(num_tokens - 1, max_model_len)
    longest = [*[max_model_len] * whole, *[rest] * (rest > 0)][: max_num_seqs - 1]
    return sorted([1, *longest])
