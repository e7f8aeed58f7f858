# SPDX-License-Identifier: Apache-2.0
"""Whether the KV cache will hold those who run to their ends. Admission waits for that: a request that starts and is
preempted later computes its tokens twice.
"""

from __future__ import annotations

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
        can_stop = request.stop_ids or request.params.stop
        expected = min(request.max_tokens, round(self.mean)) if can_stop else request.max_tokens
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
