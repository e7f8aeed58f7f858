# SPDX-License-Identifier: Apache-2.0
"""What an engine is doing and how fast: counts, latencies, throughput."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from nemotron_fast.scheduler import Scheduler

MAX_SAMPLES = 10_000  # of each latency, the newest
RATE_STEPS = 256  # newest steps that tokens_per_s is taken from


@dataclass(frozen=True)
class Latency:
    """Of the newest samples, in seconds; zeros if there are none."""

    count: int = 0
    mean_s: float = 0.0
    p50_s: float = 0.0
    p99_s: float = 0.0

    @classmethod
    def of(cls, samples: Iterable[float]) -> Latency:
        ordered = sorted(samples)
        if not ordered:
            return cls()
        last = len(ordered) - 1
        return cls(len(ordered), sum(ordered) / len(ordered), ordered[last // 2], ordered[round(0.99 * last)])


@dataclass(frozen=True)
class Metrics:
    """A snapshot of an engine."""

    running: int  # requests that own pages
    waiting: int
    finished: int  # to their end; aborted ones are not counted
    preemptions: int  # times a request gave its pages back and was computed again
    pages_free: int
    pages_cached: int  # owned by nobody, with content that a new request may begin with
    pages_held: int
    prefix_hit_rate: float  # of the tokens of started requests, the share that the cache had
    prompt_tokens: int  # of requests that got their first token
    generated_tokens: int
    tokens_per_s: float  # generated, over the newest steps
    ttft: Latency  # arrival to first token
    inter_token: Latency  # a token to the next of the same request

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Recorder:
    """Collects what a snapshot needs beyond the scheduler's own state."""

    def __init__(self) -> None:
        self._ttft: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._inter_token: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._steps: deque[tuple[float, int]] = deque(maxlen=RATE_STEPS)  # end, tokens
        self._finished = self._prompt_tokens = self._generated_tokens = 0

    def first_token(self, prompt_tokens: int, seconds: float) -> None:
        self._prompt_tokens += prompt_tokens
        self._ttft.append(seconds)

    def next_token(self, seconds: float) -> None:
        self._inter_token.append(seconds)

    def step(self, end: float, num_tokens: int, num_finished: int) -> None:
        self._steps.append((end, num_tokens))
        self._generated_tokens += num_tokens
        self._finished += num_finished

    def snapshot(self, scheduler: Scheduler) -> Metrics:
        steps, pages = list(self._steps), scheduler.pages
        elapsed = steps[-1][0] - steps[0][0] if steps else 0.0
        return Metrics(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            finished=self._finished,
            preemptions=scheduler.num_preempted,
            pages_free=pages.num_free,
            pages_cached=pages.num_cached,
            pages_held=pages.num_held,
            prefix_hit_rate=scheduler.num_found / max(scheduler.num_looked_up, 1),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            tokens_per_s=sum(count for _, count in steps[1:]) / elapsed if elapsed else 0.0,
            ttft=Latency.of(list(self._ttft)),
            inter_token=Latency.of(list(self._inter_token)),
        )
