# SPDX-License-Identifier: Apache-2.0
"""The patterns by which a quantisation config names modules: read, checked and matched.

They come from a checkpoint, so an expression that could make the matcher backtrack for long is refused.
Sources: Model-Optimizer matches `exclude_modules` with `fnmatch`; compressed-tensors `utils/match.py`.
"""

from __future__ import annotations

import re
from fnmatch import translate
from functools import lru_cache
from typing import Any

from nemotron_fast.errors import Problems

MAX_PATTERNS, MAX_PATTERN_LENGTH = 1 << 16, 256
MAX_REPEATS = 4  # repeats, and groups, of one `re:` pattern: keeps backtracking short on names this short


def read_patterns(value: Any, where: str, problems: Problems) -> tuple[str, ...]:
    """The list of patterns `value`; what is wrong with it goes to `problems`, named by `where`."""
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        problems.add(f"{where} is {type(value).__name__}, want a list of names")
        return ()
    problems.require(len(value) <= MAX_PATTERNS, f"{where} has more than {MAX_PATTERNS} names")
    for pattern in value:
        fault = f"is longer than {MAX_PATTERN_LENGTH}" if len(pattern) > MAX_PATTERN_LENGTH else None
        if pattern.startswith("re:"):
            fault = fault or _regex_fault(pattern[3:])
        problems.require(fault is None, f"{where}: pattern {pattern[:80]!r} {fault}")
    return tuple(value)


def _regex_fault(source: str) -> str | None:
    """Why an expression is refused; None if it is fine. A checkpoint must not be able to hang the loader."""
    plain = source.replace("(?:", "(")
    counts = (len(re.findall(r"[*+?{]", plain)), plain.count("("))
    if max(counts) > MAX_REPEATS or "(?" in plain or re.search(r"\)[*+?{]", plain):
        return f"repeats a group, uses (?...) or has more than {MAX_REPEATS} repeats or groups"
    try:
        re.compile(source)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is not a regular expression: {error}"
    return None


def matches_wildcard(pattern: str, name: str) -> bool:
    """ModelOpt: `pattern` matches the name, or is a run of its dotted parts (such as "self_attn")."""
    if f".{pattern}." in f".{name}.":
        return True
    return any(c in pattern for c in "*?[") and _compiled(pattern, wildcard=True).match(name) is not None


def matches_target(pattern: str, name: str) -> bool:
    """compressed-tensors: `re:` expressions match from the start; others are a name or the end of one."""
    if pattern.startswith("re:"):
        return _compiled(pattern[3:]).match(name) is not None
    return f".{name}".endswith(f".{pattern}")


@lru_cache(maxsize=MAX_PATTERNS)
def _compiled(source: str, wildcard: bool = False) -> re.Pattern[str]:
    """`re` and `fnmatch` keep only a few hundred patterns; a checkpoint may name every module."""
    return re.compile(translate(source) if wildcard else source)
