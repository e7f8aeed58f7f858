# SPDX-License-Identifier: Apache-2.0
"""SamplingParams: how the next tokens of a request are chosen, under the names OpenAI and vLLM use."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nemotron_fast.errors import Problems, RequestError

# Bounds that keep one request from exhausting the process.
MAX_N = 1024
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_BIASES = 4096
MAX_PENALTY = 2.0
MAX_BIAS = 100.0

# What a field left at None means when the checkpoint's generation_config.json does not say.
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request; validated on construction.

    A field of NEUTRAL left at None takes the value of the checkpoint's generation_config.json, else the
    neutral one. `max_new_tokens` is accepted as an alias of `max_tokens`; None means the room left in the
    context. Log-probabilities are natural logarithms of the model's own distribution, before any option here.

    Raises:
        RequestError: a value out of range (all of them named at once), or an unknown name.
    """

    n: int = 1  # completions per prompt
    max_tokens: int | None = None
    min_tokens: int = 0  # no end-of-sequence or stop token before this many
    temperature: float | None = None  # 0 = greedy
    top_p: float | None = None  # (0, 1]; 1 = off
    top_k: int | None = None  # 0 or -1 = off
    min_p: float | None = None  # [0, 1], relative to the most likely token; 0 = off
    presence_penalty: float = 0.0  # [-2, 2]
    frequency_penalty: float = 0.0  # [-2, 2]
    repetition_penalty: float | None = None  # > 0; 1 = off
    seed: int | None = None  # None = derived from the engine's seed and the request's number
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives per generated token, 0..20; None = no log-probabilities
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # token id -> [-100, 100]
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    max_thinking_tokens: int | None = None  # the thought is closed after this many tokens

    def __post_init__(self) -> None:
        problems = Problems()
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _tuple_of(stop, str, "stop", problems))
        object.__setattr__(self, "stop_token_ids", _tuple_of(self.stop_token_ids, int, "stop_token_ids", problems))
        if self.logit_bias is None:
            object.__setattr__(self, "logit_bias", {})
        self._check_integers(problems)
        self._check_numbers(problems)
        self._check_collections(problems)
        problems.raise_if_any(RequestError, "sampling parameters")
        biases = {int(k): float(v) for k, v in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", biases)

    def resolve(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """These parameters with every None of NEUTRAL filled from `defaults`, else from NEUTRAL."""
        filled = NEUTRAL | {k: defaults[k] for k in NEUTRAL if defaults.get(k) is not None}
        return replace(self, **{k: v for k, v in filled.items() if getattr(self, k) is None})

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty not in (None, 1.0))

    def _check_integers(self, problems: Problems) -> None:
        bounds = {
            "n": (1, MAX_N),
            "max_tokens": (1, 1 << 31),
            "min_tokens": (0, 1 << 31),
            "top_k": (-1, 1 << 31),
            "seed": (-(1 << 63), (1 << 63) - 1),
            "logprobs": (0, MAX_LOGPROBS),
            "prompt_logprobs": (0, MAX_LOGPROBS),
            "max_thinking_tokens": (0, 1 << 31),
        }
        optional = {"max_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "max_thinking_tokens"}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
            problems.require(ok, f"{name}={value!r}, want an integer in {low}..{high}")
        low, high = self.min_tokens, self.max_tokens
        if isinstance(low, int) and isinstance(high, int) and low > high >= 1:
            problems.add(f"min_tokens={low} exceeds max_tokens={high}")

    def _check_numbers(self, problems: Problems) -> None:
        checks = {
            "temperature": (lambda v: v >= 0, "a number >= 0"),
            "top_p": (lambda v: 0 < v <= 1, "a number in (0, 1]"),
            "min_p": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
            "repetition_penalty": (lambda v: v > 0, "a number > 0"),
            "presence_penalty": (lambda v: abs(v) <= MAX_PENALTY, f"a number in [-{MAX_PENALTY}, {MAX_PENALTY}]"),
            "frequency_penalty": (lambda v: abs(v) <= MAX_PENALTY, f"a number in [-{MAX_PENALTY}, {MAX_PENALTY}]"),
        }
        for name, (in_range, want) in checks.items():
            value = getattr(self, name)
            if value is None and name in NEUTRAL:
                continue
            problems.require(_is_number(value) and in_range(value), f"{name}={value!r}, want {want}")

    def _check_collections(self, problems: Problems) -> None:
        stops = self.stop
        ok = len(stops) <= MAX_STOPS and all(0 < len(s) <= MAX_STOP_CHARS for s in stops)
        problems.require(ok, f"stop: want at most {MAX_STOPS} strings of 1..{MAX_STOP_CHARS} characters")
        ok = len(self.stop_token_ids) <= MAX_STOPS and all(i >= 0 for i in self.stop_token_ids)
        problems.require(ok, f"stop_token_ids: want at most {MAX_STOPS} ids >= 0")
        bias = self.logit_bias
        if not isinstance(bias, Mapping):
            problems.add(f"logit_bias is {type(bias).__name__}, want a mapping of token id to bias")
            object.__setattr__(self, "logit_bias", {})
            return
        ok = len(bias) <= MAX_BIASES and all(
            str(k).isdecimal() and _is_number(v) and abs(v) <= MAX_BIAS for k, v in bias.items()
        )
        problems.require(ok, f"logit_bias: want at most {MAX_BIASES} entries of token id -> [-{MAX_BIAS}, {MAX_BIAS}]")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            problems.require(
                isinstance(getattr(self, name), bool), f"{name}={getattr(self, name)!r}, want true or false"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _tuple_of(value: Any, kind: type, name: str, problems: Problems) -> tuple:
    value = () if value is None else value
    items = list(value) if isinstance(value, (list, tuple, set, frozenset)) else None
    ok = items is not None and all(isinstance(i, kind) and not isinstance(i, bool) for i in items)
    return tuple(items) if problems.require(ok, f"{name}={value!r}, want a list of {kind.__name__}") else ()


def _refuse_unknown_names() -> None:
    """Make the constructor name the nearest option for an unknown one, and accept the alias of max_tokens."""
    construct = SamplingParams.__init__
    names = [f.name for f in fields(SamplingParams)]

    @functools.wraps(construct)
    def init(self: SamplingParams, *args: Any, **kwargs: Any) -> None:
        if "max_new_tokens" in kwargs:
            given = {kwargs.pop("max_new_tokens"), kwargs.pop("max_tokens", None)} - {None}
            if len(given) > 1:
                raise RequestError(f"max_tokens and its alias max_new_tokens differ: {sorted(given, key=str)}")
            kwargs["max_tokens"] = next(iter(given), None)
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, [*names, "max_new_tokens"], n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
                raise RequestError(f"unknown sampling parameter {name!r}; {hint}")
        construct(self, *args, **kwargs)

    SamplingParams.__init__ = init


_refuse_unknown_names()
