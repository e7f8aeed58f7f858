# SPDX-License-Identifier: Apache-2.0
"""Deltas of a stream onto the terminal, and Ctrl-C that ends an answer instead of the program."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemotron_fast.outputs import Delta, Result

DIM, PLAIN = "\033[2m", "\033[0m"


class Writer:
    """Writes an answer to stdout as it comes.

    On a terminal the reasoning is shown dim before the answer; elsewhere it goes to stderr, so that stdout holds
    the answer alone.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._in_reasoning = False
        self._ends_line = True

    def write(self, delta: Delta) -> None:
        if delta.reasoning:
            self._write_reasoning(delta.reasoning)
        if delta.content:
            if self._in_reasoning:
                self._leave_reasoning()
            self._put(delta.content)

    def finish(self) -> None:
        """End the last line, if it is not ended yet."""
        if self._in_reasoning:
            self._leave_reasoning()
        if not self._ends_line:
            self._put("\n")

    def _write_reasoning(self, text: str) -> None:
        if not self._is_terminal:
            self._in_reasoning = True
            sys.stderr.write(text)
            sys.stderr.flush()
            return
        self._put(text if self._in_reasoning else DIM + text)
        self._in_reasoning = True

    def _leave_reasoning(self) -> None:
        self._in_reasoning = False
        if self._is_terminal:
            self._put(PLAIN + "\n")
        else:
            sys.stderr.write("\n")

    def _put(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._ends_line = text.endswith("\n")


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields `interrupted()`: was Ctrl-C pressed? So the caller can stop between two steps; a second one raises.

    Only in the main thread, where signals arrive.
    """
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def statistics(results: list[Result]) -> str:
    """One line: token counts, time to the first token, tokens per second."""
    prompt = sum(r.usage.prompt_tokens for r in results)
    generated = sum(r.usage.completion_tokens for r in results)
    seconds = max((r.timings.total_s for r in results), default=0.0)
    first = min((r.timings.ttft_s for r in results), default=0.0)
    reasons = ", ".join(sorted({o.finish_reason for r in results for o in r.outputs}))
    return (
        f"{prompt} prompt tokens, {generated} generated in {seconds:.2f} s "
        f"(first after {first:.2f} s, {generated / max(seconds, 1e-9):.1f} tok/s); finished: {reasons}"
    )


def note(text: str) -> None:
    """A remark on stderr, dim on a terminal."""
    print(f"{DIM}{text}{PLAIN}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
