# SPDX-License-Identifier: Apache-2.0
"""Whether the KV cache will hold those who run to their ends. Admission waits for that: a request that starts and is
preempted later computes its tokens twice. And how many should run at a time.
"""

from __future__ import annotations

from collections import Counter

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


class Waves:
    """How many requests should run at a time.

    As many as there is room for, but for those that surely generate equally many tokens and started together: none of
    them ends before all do, so they run in waves. Then level waves are the fastest, 160 and 160 rather than 215 and
    105: they are as many steps, and a step takes longer the more run, at last more than in proportion.
    """

    def __init__(self) -> None:
        self.lengths: Counter[int | None] = Counter()  # of the requests: tokens to generate, if that is sure
        self.num_tokens = 0  # of all of them at their ends, if they reach them

    def add(self, request: Request) -> None:
        self._count(request, 1)

    def remove(self, request: Request) -> None:
        self._count(request, -1)

    def most_running(self, running: list[Request], max_num_seqs: int, num_pages: int) -> int:
        """Of those that share no pages. `running` in order of arrival; these and those that wait have been added."""
        if len(self.lengths) != 1:
            return max_num_seqs
        ((length, count),) = self.lengths.items()
        if length is None or any(r.num_shared for r in running):
            return max_num_seqs
        if running and len(running[0].output) - len(running[-1].output) > length // 8:
            return max_num_seqs
        room = num_pages * pages.PAGE_SIZE * count // (self.num_tokens + count * pages.PAGE_SIZE // 2)
        num_waves = -(-count // max(min(max_num_seqs, room), 1))
        return -(-count // num_waves)

    def _count(self, request: Request, change: int) -> None:
        length = None if request.can_stop else request.max_tokens
        self.lengths[length] += change
        if not self.lengths[length]:
            del self.lengths[length]
        self.num_tokens += change * (len(request.prompt) + request.max_tokens)
