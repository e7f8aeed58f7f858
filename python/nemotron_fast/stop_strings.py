# SPDX-License-Identifier: Apache-2.0
"""Ends a streamed text at the first stop string, wherever the borders between the pieces are."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one text. The first stop string to be complete wins; of several that end with the same
    character, the longest. How the text is cut into pieces makes no difference."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`include`: the visible text ends with the stop string instead of before it.

        Raises:
            ValueError: a stop string is empty or not a string.
        """
        if isinstance(stops, str):
            raise ValueError(f"stop is the string {stops!r:.40}, want a list of strings")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop has the entry {stop!r:.40}, want strings of at least one character")
        self._stops = tuple(dict.fromkeys(stops))
        self._include = include
        self._tail = ""  # end of the text so far that may begin a stop string
        self._matched: str | None = None

    def push(self, delta: str) -> tuple[str, str | None]:
        """Add text; returns what can be shown now, and the stop string once one is complete.

        After a match nothing is shown any more and the same stop string is returned.
        """
        if self._matched is not None:
            return "", self._matched
        text = self._tail + delta
        shown = len(self._tail) if self._include else 0  # with `include`, the tail was shown already
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start, self._matched = min(found)
            self._tail = ""
            return text[shown : end if self._include else start], self._matched
        hold = max((partial_match(text, stop) for stop in self._stops), default=0)
        self._tail = text[len(text) - hold :]
        return text[shown:] if self._include else text[: len(text) - hold], None

    def flush(self) -> str:
        """The text is complete without a stop string: returns what was held back."""
        held = "" if self._include else self._tail
        self._tail = ""
        return held


def partial_match(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
