# SPDX-License-Identifier: Apache-2.0
"""How many tokens of prompts a step computes."""

from __future__ import annotations

MIN_PROMPT_TOKENS = 64  # of a step, however many others decode

# About where the attention of a prompt's token takes as long as its linears. Super-49B in FP8 on an H100: steps of 16
# sequences take 17.3 ms, beside 206 tokens at a time of a prompt of 32,768 the median is 32.5 and the end 41. On a
# straight line through these the beginning takes 24, and both are even at some 13,000.
EVEN_POSITION = 16384


class PromptBudget:
    """Args:
    tokens: of a step, while they are at the beginning of their sequences.
    bounds_time: count tokens beyond EVEN_POSITION for more, so that they make a step about as much longer as twice as
        many at the beginning; down to MIN_PROMPT_TOKENS.
    """

    def __init__(self, tokens: int, *, bounds_time: bool) -> None:
        self._left = tokens
        self._bounds_time = bounds_time

    def __bool__(self) -> bool:
        return self._left > 0

    def fits(self, start: int, wanted: int) -> int:
        """How many of `wanted` tokens from position `start` on the step has room for."""
        return min(wanted, max(int(self._left / self._weight(start)), min(self._left, MIN_PROMPT_TOKENS)))

    def spend(self, start: int, count: int) -> None:
        """The step computes as many."""
        self._left = max(int(self._left - count * self._weight(start)), 0)

    def _weight(self, start: int) -> float:
        return max(1.0, (1 + start / EVEN_POSITION) / 2) if self._bounds_time else 1.0
