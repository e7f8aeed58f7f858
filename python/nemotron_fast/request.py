# SPDX-License-Identifier: Apache-2.0
"""Request: one sequence being generated, and the state it moves through."""

from __future__ import annotations

import enum
import time
from collections import deque
from dataclasses import dataclass, field

from nemotron_fast.sampling_params import SamplingParams


class Status(enum.Enum):
    WAITING = "waiting"  # owns no pages; also the state after a preemption
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural) of one token, its rank (1 = most likely) and the most likely alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), most likely first


@dataclass(eq=False)
class Request:
    """One sequence. `params` are resolved: no field of sampling_params.NEUTRAL is None.

    Tokens by position:
        [0, len(prompt))               given
        [len(prompt), num_tokens)      generated; the last one is not computed yet
        [num_tokens, num_expected)     sampled by a step in flight: on the device, not yet known to the host
        [0, num_computed)              their KV is in `pages`, or will be once the steps in flight are done
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_ids: frozenset[int]  # end-of-sequence ids (unless ignored) and the request's own
    output: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)  # token ids that replace the next sampled ones
    status: Status = Status.WAITING
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    in_flight: int = 0  # tokens that steps in flight sample for it
    page_keys: list[bytes] = field(default_factory=list)  # of its leading full pages
    num_shared: int = 0  # pages that it had from others when it last started
    num_published: int = 0  # pages whose content other requests may use
    num_cached: int = 0  # prompt tokens that were found in the cache when it first ran
    sample_row: int = 0  # of the step in flight, that samples its next token
    finish_reason: str | None = None  # "stop" | "length" | "abort"
    stop_reason: int | str | None = None  # the token id or string that stopped it
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # the first token has none
    arrived_at: float = field(default_factory=time.perf_counter)  # seconds, as are the next four
    scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    finished_at: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def num_expected(self) -> int:
        return self.num_tokens + self.in_flight

    @property
    def final_tokens(self) -> int:
        """If nothing stops it before."""
        return len(self.prompt) + self.max_tokens

    @property
    def can_stop(self) -> bool:
        """Whether anything but max_tokens may end it."""
        return bool(self.stop_ids or self.params.stop)

    @property
    def sample_index(self) -> int:
        """Which of the output's tokens the newest step in flight samples."""
        return len(self.output) + self.in_flight - 1

    @property
    def awaits_last_token(self) -> bool:
        """Whether the steps in flight sample the last token it may have."""
        return len(self.output) + self.in_flight >= self.max_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether its next step computes one token and samples another."""
        return self.num_expected - self.num_computed == 1 and not self.awaits_last_token

    @property
    def needs_known_tokens(self) -> bool:
        """Whether its steps must wait for the one before, because they compute with tokens that the host must know."""
        params = self.params
        counts_tokens = params.has_penalties or params.logprobs is not None
        may_be_forced = params.max_thinking_tokens is not None
        reports_prompt = params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt)
        return reports_prompt or (may_be_forced and counts_tokens)

    @property
    def is_running(self) -> bool:
        return self.status is Status.RUNNING

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions [start, stop)."""
        edge = len(self.prompt)
        return self.prompt[start:stop] + self.output[max(start - edge, 0) : max(stop - edge, 0)]

    def append(self, token: int) -> None:
        """Add a generated token and decide whether it is the last one."""
        now = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = now
        self.output.append(token)
        if token in self.stop_ids and len(self.output) > self.params.min_tokens:
            self.finish("stop", token)
        elif len(self.output) >= self.max_tokens:
            self.finish("length")

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """Enter the final state; later calls change nothing."""
        if self.is_finished:
            return
        self.status, self.finish_reason, self.stop_reason = Status.FINISHED, reason, stop_reason
        self.finished_at = time.perf_counter()

    def finish_by_text(self, stop: str) -> None:
        """A stop string was found in the text; that counts more than what the last token alone would say."""
        self.finish("stop", stop)
        self.finish_reason, self.stop_reason = "stop", stop
