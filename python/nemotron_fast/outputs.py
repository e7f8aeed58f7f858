# SPDX-License-Identifier: Apache-2.0
"""What a generation returns. Every class turns into plain JSON values with `to_dict()`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nemotron_fast.request import TokenLogprob


@dataclass(frozen=True)
class Completion:
    """One generated sequence."""

    index: int  # 0..n-1
    text: str  # everything generated, stop strings and special tokens removed as asked
    token_ids: list[int]  # with the token that stopped it
    finish_reason: str  # "stop" | "length" | "abort"
    stop_reason: int | str | None  # the stop token id or string
    reasoning: str | None  # the thought; None for a model, or a call, without reasoning
    content: str  # `text` without the thought
    logprobs: list[TokenLogprob] | None  # one per token, if asked for


@dataclass(frozen=True)
class Usage:
    """Token counts; completion_tokens is the sum over all n completions."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def to_dict(self) -> dict[str, int]:
        return asdict(self) | {"total_tokens": self.total_tokens}


@dataclass(frozen=True)
class Timings:
    """Seconds. Of several completions the first to start, to answer and the last to finish count."""

    queue_s: float  # arrival to the first step
    ttft_s: float  # arrival to the first token
    decode_s: float  # first token to the last
    total_s: float  # arrival to the end
    tokens_per_s: float  # generated tokens over total_s


@dataclass(frozen=True)
class Result:
    """Everything about one prompt."""

    prompt: str | None  # None when token ids were given
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"usage": self.usage.to_dict()}


@dataclass(frozen=True)
class Delta:
    """A piece of a stream: what became visible, and on the last piece of a completion why it ended."""

    index: int  # of the completion
    text: str
    reasoning: str
    content: str
    token_ids: list[int]
    finish_reason: str | None = None
    result: Result | None = None  # on the very last delta of the stream
