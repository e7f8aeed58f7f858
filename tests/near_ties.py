# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of two backends, which round differently."""

import math

NEAR_TIE = 0.15  # nats: what BF16 rounding can move the difference of two log-probabilities by


def assert_same_but_for_near_ties(found, want) -> None:
    """Equal tokens up to a first difference, where each side's token is nearly the other's best."""
    for mine, theirs in zip(found.logprobs, want.logprobs, strict=True):
        if mine.token_id != theirs.token_id:
            for entry, other in ((mine, theirs), (theirs, mine)):
                alternatives = dict(entry.top)
                assert entry.logprob - alternatives.get(other.token_id, -math.inf) <= NEAR_TIE, (mine, theirs)
            return
