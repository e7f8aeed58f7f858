# SPDX-License-Identifier: Apache-2.0
"""The forms in which callers give prompts and parameters, made into one."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from nemotron_fast.errors import RequestError
from nemotron_fast.sampling_params import SamplingParams

Prompt = str | Sequence[int]
Message = dict[str, Any]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt (text, or a sequence of ids) becomes a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise RequestError(f"prompts is {type(prompts).__name__}, want text, token ids, or a list of either")
    items = list(prompts)
    return items if all(isinstance(p, (str, Iterable)) for p in items) and items else [items]


def per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, (list, tuple)) or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(f"params is {type(params).__name__}, want SamplingParams, or a list of them")
    if len(params) != count:
        raise RequestError(f"params has {len(params)} entries for {count} prompts, want one for each")
    return [*params]


def token_ids(prompt: Any) -> list[int]:
    """Token ids of any integer type as plain ints."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise RequestError(f"a prompt is {prompt!r:.60}, want text or a list of token ids") from None
