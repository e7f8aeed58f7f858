# SPDX-License-Identifier: Apache-2.0
"""What a chat template may use, and the size of an operation's result before it is computed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

_MAX_INT_BITS = 4096
_MAX_JSON_INDENT = 32
_WIDTH_CALLS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice"})
# A field whose width has five digits, or is itself a value.
_WIDE_PERCENT = re.compile(r"%(?:\([^()]*\))?[^a-zA-Z%]*?(?:\d{5}|\*)")
_WIDE_BRACE = re.compile(r"\{[^{}]*(?:\d{5}|\{)")


class LimitError(TemplateError):
    """A template that goes beyond its limits."""


@dataclass(frozen=True)
class TemplateLimits:
    """What one template may use. Beyond it is an error, never a shortened prompt."""

    source_chars: int = 1 << 20
    value_chars: int = 16 << 20
    """Length of the output, and of any text or list that the template makes on the way."""
    range_items: int = 100_000
    steps: int = 2_000_000
    """Loop turns and macro calls of one rendering."""
    seconds: float = 10.0


class Meter:
    """What one rendering has used up so far."""

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._steps = 0
        self._deadline = time.monotonic() + limits.seconds

    def step(self) -> None:
        """One loop turn or macro call. Raises LimitError."""
        self._steps += 1
        if self._steps > self._limits.steps:
            raise LimitError(f"more than {self._limits.steps} loop turns and macro calls")
        if self._steps % 64 == 0 and time.monotonic() > self._deadline:
            raise LimitError(f"more than {self._limits.seconds} s")


def check_size(size: int, limit: int) -> None:
    """Raises LimitError if a text or list of `size` items is beyond `limit`."""
    if size > limit:
        raise LimitError(f"a text or list of {size} items, at most {limit}")


def join_within(pieces: Iterable[str], limit: int) -> str:
    """The pieces as one text. Raises LimitError as soon as they are too long together."""
    kept: list[str] = []
    total = 0
    for piece in pieces:
        total += len(piece)
        check_size(total, limit)
        kept.append(piece)
    return "".join(kept)


def check_operands(operator: str, left: Any, right: Any, limit: int) -> None:
    """Raises LimitError if `left operator right` would be too large."""
    a, b = (len(x) if isinstance(x, str | list | tuple) else x for x in (left, right))
    if not (isinstance(a, int) and isinstance(b, int)):
        return
    sequences = (a is not left) + (b is not right)
    if operator == "+" and sequences:
        check_size(a + b, limit)
    elif operator == "*" and sequences:
        check_size(a * b, limit)
    elif operator in ("*", "**"):
        bits = a.bit_length() + b.bit_length() if operator == "*" else a.bit_length() * abs(b)
        if bits > _MAX_INT_BITS:
            raise LimitError(f"an integer of {bits} bits, at most {_MAX_INT_BITS}")


def check_call(name: str, inputs: Sequence[Any], limit: int) -> None:
    """Raises LimitError if the method or filter `name` would make far more than the size of its inputs.

    `inputs` begins with the value that the method or filter is applied to.
    """
    texts = [x for x in inputs if isinstance(x, str)]
    text = texts[0] if texts else ""
    if name in _WIDTH_CALLS:
        widths = [len(x) if isinstance(x, str) else abs(x) for x in inputs[1:] if isinstance(x, str | int)]
        places = 1 + text.count("\n") + text.count("\t")
        check_size(len(text) + places * max(widths, default=0), limit)
    elif name in ("format", "format_map"):
        if _WIDE_PERCENT.search(text) or _WIDE_BRACE.search(text):
            raise LimitError(f"a format with a wide or computed field width: {text:.40}")
        longest = max((len(x) for x in texts[1:]), default=0)
        check_size(len(text) + (text.count("%") + text.count("{")) * longest, limit)
    elif name == "replace" and len(texts) == 3:
        check_size(len(text) + text.count(texts[1]) * len(texts[2]), limit)
    elif name == "join":
        items = [x for x in inputs if isinstance(x, list | tuple)]
        for values in items or [text]:
            separator = max((len(x) for x in texts if x is not values), default=0)
            check_size(sum((len(v) if isinstance(v, str) else 1) + separator for v in values), limit)


def check_json_layout(indent: Any, separators: Any) -> None:
    """Raises LimitError if JSON would be blown up by its indent or separators."""
    for value in (indent, *(separators or ())):
        size = len(value) if isinstance(value, str) else abs(value or 0)
        if size > _MAX_JSON_INDENT:
            raise LimitError(f"a JSON indent or separator of {size}, at most {_MAX_JSON_INDENT}")
