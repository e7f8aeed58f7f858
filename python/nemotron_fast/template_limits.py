# SPDX-License-Identifier: Apache-2.0
"""What a chat template may use: a meter of one rendering, and the size of an operation's result beforehand."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

MAX_INT_BITS = 4096
_MAX_DEPTH = 128  # messages may be nested 64 levels deep
_MAX_JSON_INDENT = 32
_MAX_STRIP_CHARS = 256  # stripping compares each end character with each of these
_MAX_BACKWARD_COMPARES = 1 << 28  # searching from the right takes text times pattern
_MAX_TITLE_CHARS = 1 << 16  # `title` takes the text apart into words
_MAX_ROUND_DIGITS = 100  # `round` computes that power of ten
_WIDTH_CALLS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent"})
_BACKWARD_CALLS = frozenset({"rfind", "rindex", "rsplit", "rpartition"})
_STRIP_CALLS = frozenset({"strip", "lstrip", "rstrip", "trim"})
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_SPACES = "\t\x1f \xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
# A field whose width has five digits, or is itself a value.
_WIDE_PERCENT = re.compile(r"%(?:\([^()]*\))?[^a-zA-Z%]*?(?:\d{5}|\*)")
_WIDE_BRACE = re.compile(r"\{[^{}]*(?:\d{5}|\{)")
_LOOKUP = re.compile(r"\{[^{}:!]*[.\[]")
_WIDTH = re.compile(r"\d{2,4}")

_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
CONTAINERS = (list, tuple, dict, *_VIEWS)
# Bytes that are charged beside what sys.getsizeof says.
_OBJECT_BYTES, _RECORD_BYTES, _LAZY_BYTES, _TUPLE_BYTES = 64, 200, 1024, 256


class LimitError(TemplateError):
    """A template that goes beyond its limits."""


@dataclass(frozen=True)
class TemplateLimits:
    """What one template may use. Beyond it is an error, never a shortened prompt."""

    source_chars: int = 1 << 17
    source_tokens: int = 1 << 14
    """jinja2's, with blanks. The template of v1.5 has 702; compiling takes up to 8 KB for each."""
    value_chars: int = 2 << 20
    """Length of any text, and of any list, that the template makes on the way."""
    total_bytes: int = 64 << 20
    """All that the template makes, also what is soon dropped again."""
    range_items: int = 100_000
    steps: int = 2_000_000
    """Loop turns and macro calls of one rendering."""
    seconds: float = 2.0
    """Of CPU time, so that a busy machine refuses nothing."""

    @property
    def written_chars(self) -> int:
        """Length of the prompt, and of the text that a list or dict becomes when it is written out."""
        return 2 * self.value_chars


class Weight(NamedTuple):
    """Of one value, written out."""

    chars: int
    depth: int = 0
    nodes: int = 1


class Meter:
    """What one rendering has used up so far.

    Every list, tuple and dict that a template makes passes `made`, so none of them is ever too large to be
    written out, compared or hashed, however often it holds the same part. Templates cannot change them: each is
    weighed once.
    """

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._steps = 0
        self._bytes = 0
        self._known: dict[int, tuple[Any, Weight]] = {}  # id -> the object, kept so that its id stays its own
        self._wall_end = time.monotonic() + limits.seconds
        self._cpu_end = time.thread_time() + limits.seconds

    def check_clock(self) -> None:
        """Raises LimitError after the deadline."""
        if time.monotonic() > self._wall_end and time.thread_time() > self._cpu_end:  # the second is slow to ask
            raise LimitError(f"more than {self._limits.seconds} s")

    def step(self) -> None:
        """One loop turn or macro call. Raises LimitError."""
        self._steps += 1
        if self._steps > self._limits.steps:
            raise LimitError(f"more than {self._limits.steps} loop turns and macro calls")
        self.check_clock()

    def charge(self, size: int = _OBJECT_BYTES) -> None:
        """Something of `size` bytes is made. Raises LimitError if all together are beyond `total_bytes`."""
        self._bytes += size
        if self._bytes > self._limits.total_bytes:
            raise LimitError(f"more than {self._limits.total_bytes} bytes of texts and lists")
        self.check_clock()

    def weigh(self, value: Any) -> Weight:
        """Raises LimitError if a list or dict is too long to be written out, or nested too deeply."""
        return self._weigh(value, 0)

    def _weigh(self, value: Any, level: int) -> Weight:
        if isinstance(value, str):
            return Weight(len(value) + 2)
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        if isinstance(value, int):
            return Weight(8 + value.bit_length() // 3)
        if not isinstance(value, CONTAINERS):
            return Weight(64)
        chars, depth, nodes = 2, 0, 1
        for part in _parts(value):
            weight = Weight(len(part) + 2) if isinstance(part, str) else self._weigh(part, level + 1)
            chars, depth, nodes = chars + weight.chars + 2, max(depth, weight.depth), nodes + weight.nodes
            check_size(chars, self._limits.written_chars)
            if level + depth > _MAX_DEPTH:
                raise LimitError(f"lists nested more than {_MAX_DEPTH} levels deep")
        weight = Weight(chars, depth + 1, nodes)
        if not isinstance(value, _VIEWS):
            self._keep(value, weight)
        return weight

    def _keep(self, value: Any, weight: Weight) -> None:
        self.charge(_RECORD_BYTES)
        self._known[id(value)] = (value, weight)

    def made(self, value: Any) -> Any:
        """Charge what an operation has made, and check its size; returns it. Raises LimitError."""
        if isinstance(value, str):
            check_size(len(value), self._limits.value_chars)
            self.charge(sys.getsizeof(value))
        elif isinstance(value, list | tuple | dict):
            if id(value) not in self._known:
                check_size(len(value), self._limits.value_chars)
                self.charge(sys.getsizeof(value) + sum(_TUPLE_BYTES for part in value if isinstance(part, tuple)))
                self.weigh(value)
        elif isinstance(value, int):
            if value.bit_length() > MAX_INT_BITS:
                raise LimitError(f"an integer of {value.bit_length()} bits, at most {MAX_INT_BITS}")
            self.charge()
        else:
            self.charge(_LAZY_BYTES)
        return value

    def made_lazily(self, value: Iterator[Any], source: Any) -> None:
        """As `made`, for an iterator over `source`: chains of them have an end, too."""
        depth = self.weigh(source).depth + 1 if isinstance(source, Iterator) else 1
        if depth > _MAX_DEPTH:
            raise LimitError(f"more than {_MAX_DEPTH} filters on top of each other")
        self.charge(_LAZY_BYTES)
        self._keep(value, Weight(64, depth))


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        yield from value
        value = value.values()
    yield from value


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
        if bits > MAX_INT_BITS:
            raise LimitError(f"an integer of {bits} bits, at most {MAX_INT_BITS}")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 1


def check_call(name: str, inputs: Sequence[Any], limit: int, length: Callable[[Any], int] = _length) -> None:
    """Raises LimitError if the method or filter `name` would make far more than the size of its inputs, or take
    far longer than reading them.

    `inputs` begins with the value that the method or filter is applied to; `length` is that of a value as text.
    """
    texts = [x for x in inputs if isinstance(x, str)]
    text = texts[0] if texts else ""
    if name in _WIDTH_CALLS:
        widths = [len(x) if isinstance(x, str) else abs(x) for x in inputs[1:] if isinstance(x, str | int)]
        places = 1 + sum(map(text.count, "\t" + _LINE_ENDS))
        check_size(len(text) + places * max(widths, default=0), limit)
    elif name in ("format", "percent"):
        if _WIDE_PERCENT.search(text) or _WIDE_BRACE.search(text):
            raise LimitError(f"a format with a wide or computed field width: {text:.40}")
        if name == "format" and _LOOKUP.search(text):
            raise SecurityError(f"a format that looks into its values: {text:.40}")
        if fields := text.count("%") + text.count("{"):
            width = max((int(number[0]) for number in _WIDTH.finditer(text)), default=0)
            check_size(len(text) + fields * max(width, *map(length, inputs[1:]), 0), limit)
    elif name == "replace" and len(inputs) >= 3:
        whole, old, new = (str(x) for x in inputs[:3])
        check_size(len(whole) + whole.count(old) * len(new), limit)
    elif name == "join":
        items = [x for x in inputs if isinstance(x, list | tuple)]
        for values in items or [text]:
            separator = max((len(x) for x in texts if x is not values), default=0)
            check_size(sum(length(v) + separator for v in values), limit)
    elif name in _STRIP_CALLS and len(texts) > 1:
        check_size(len(texts[1]), _MAX_STRIP_CHARS)
    elif name in _BACKWARD_CALLS and len(texts) > 1:
        check_size(len(text) * len(texts[1]), _MAX_BACKWARD_COMPARES)
    elif name == "title":
        check_size(len(text), _MAX_TITLE_CHARS)
    elif name == "round":
        check_size(max((abs(x) for x in inputs[1:] if isinstance(x, int)), default=0), _MAX_ROUND_DIGITS)
    elif name == "sum" and any(isinstance(x, list | tuple) for x in inputs[1:]):
        raise LimitError("a sum of lists, want one of numbers")


def count_pieces(name: str, inputs: Sequence[Any]) -> int:
    """How many new texts the method or filter `name` takes its first input apart into, at most."""
    text = inputs[0] if inputs else None
    if not isinstance(text, str):
        return 0
    if name in ("list", "sort"):
        return len(text)
    if name == "splitlines":
        return 1 + sum(map(text.count, _LINE_ENDS))
    if name in ("split", "rsplit"):
        between = [x for x in inputs[1:] if isinstance(x, str)] or _LINE_ENDS + _SPACES
        most = [x for x in inputs[1:] if isinstance(x, int) and x >= 0]
        return 1 + min([sum(map(text.count, between)), *most])
    return 0


def check_json_layout(indent: Any, separators: Any) -> int:
    """The characters per level and value. Raises LimitError if indent or separators would blow JSON up."""
    total = 0
    for value in (indent, *(separators or ())):
        size = len(value) if isinstance(value, str) else abs(value or 0)
        if size > _MAX_JSON_INDENT:
            raise LimitError(f"a JSON indent or separator of {size}, at most {_MAX_JSON_INDENT}")
        total += size
    return total
