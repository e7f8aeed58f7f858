# SPDX-License-Identifier: Apache-2.0
"""Whether the KV cache will hold those who run to their ends. Admission waits for that: a request that starts and is
preempted later computes its tokens twice. And how many should run at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from nemotron_fast import pages
from nemotron_fast.request import Request

RECENT = 16  # requests that the mean follows


class OutputLengths:
    """How much requests generate: max_tokens if nothing can stop them before, else the mean of those that ended lately.
    Before the first has ended, no more than they have is expected of them.
    """

    def __init__(self) -> None:
        self.mean = 0.0

    def learn(self, ended: Request) -> None:
        """Take in a request that was not aborted."""
        self.mean += (len(ended.output) - self.mean) / RECENT

    def left(self, request: Request) -> int:
        """Tokens that it will probably still generate."""
        expected = min(request.max_tokens, round(self.mean)) if request.can_stop else request.max_tokens
        return max(expected - len(request.output), 0)


def peak_pages(owned: list[int], left: list[int]) -> int:
    """About the most pages that requests hold at a time from the next step on, if the i-th owns the KV of owned[i]
    tokens now, grows by one a step, and gives all back after left[i] steps. Half of its last page counts as unused.
    """
    peak = total = 0
    order = sorted(zip(left, owned, strict=True), reverse=True)  # those that end last first
    for count, (steps, tokens) in enumerate(order, start=1):
        if steps == 0:
            break
        total += tokens
        peak = max(peak, total + count * (steps + pages.PAGE_SIZE // 2))
    return pages.pages_for(peak)


@dataclass(frozen=True)
class WavePlan:
    """How many requests run at a time."""

    most_running: int  # of those that share no pages
    num_ahead: int | None = None  # so many, the oldest, take part in every step, the others in turns; None: all do


class Waves:
    """How requests share steps that surely generate equally many tokens and started together.

    None of them ends before all do. If more start than fit to their ends, they take two rounds of steps, and a step
    of half the requests takes far more than half the time. The fewest steps are had if all start at once: some, as few
    as may be, take part in every step, the others in turns, as many at a time as keeps steps level, until the first
    have ended and the others fit. Where that gains little, waves are level: 160 and 160 run faster than 215 and 105.
    """

    def __init__(self) -> None:
        self.lengths: Counter[int | None] = Counter()  # of the requests: tokens to generate, if that is sure
        self.prompt_pages = 0  # of all of them
        self.final_pages = 0  # of all of them at their ends, if they reach them

    def add(self, request: Request) -> None:
        self._count(request, 1)

    def remove(self, request: Request) -> None:
        self._count(request, -1)

    def plan(self, running: list[Request], waiting: Iterable[Request], max_num_seqs: int, num_pages: int) -> WavePlan:
        """For the next step of at most `max_num_seqs` sequences, with a pool of `num_pages`.

        `running` and `waiting`, each in order of arrival, are all requests that have been added.
        """
        everyone = WavePlan(max_num_seqs)
        if len(self.lengths) != 1:
            return everyone
        ((length, count),) = self.lengths.items()
        if length is None:
            return everyone
        room = max(min(max_num_seqs, num_pages * count // self.final_pages), 1)
        num_ahead = ahead_pages = ahead_prompts = 0
        for request in chain(running, waiting):
            others_fit = count - num_ahead <= max_num_seqs and self.final_pages - ahead_pages <= num_pages
            if others_fit or num_ahead == room:  # at most a full wave of perhaps very many
                break
            num_ahead += 1
            ahead_pages += pages.pages_for(request.final_tokens)
            ahead_prompts += pages.pages_for(len(request.prompt))
        if num_ahead == 0 or any(r.num_shared for r in running):
            return everyone
        behind = count - num_ahead
        spare = num_pages - ahead_pages - (self.prompt_pages - ahead_prompts)
        tokens = spare // behind * pages.PAGE_SIZE
        gain = min(tokens, length * (max_num_seqs - num_ahead) // behind)  # tokens of the others by then: steps less
        if gain > length // 8:
            return WavePlan(count, num_ahead)
        together = not running or len(running[0].output) - len(running[-1].output) <= length // 8
        return WavePlan(min(-(-count // 2), max_num_seqs)) if together else everyone

    def _count(self, request: Request, change: int) -> None:
        length = None if request.can_stop else request.max_tokens
        self.lengths[length] += change
        if not self.lengths[length]:
            del self.lengths[length]
        self.prompt_pages += change * pages.pages_for(len(request.prompt))
        self.final_pages += change * pages.pages_for(request.final_tokens)
