# SPDX-License-Identifier: Apache-2.0
"""Whether the KV cache will hold those who run to their ends. Admission waits for that: a request that starts and is
preempted later computes its tokens twice.
"""

from __future__ import annotations

from nemotron_fast import pages
from nemotron_fast.request import Request

RECENT = 16  # requests that the share follows


class OutputLengths:
    """How far requests get towards their max_tokens: all the way if nothing can stop them, else as those that ended
    lately did. Before the first has ended, no more than they have is expected of them.
    """

    def __init__(self) -> None:
        self.share = 0.0

    def learn(self, ended: Request) -> None:
        """Take in a request that was not aborted."""
        self.share += (len(ended.output) / ended.max_tokens - self.share) / RECENT

    def left(self, request: Request) -> int:
        """Tokens that it will probably still generate."""
        share = self.share if request.stop_ids or request.params.stop else 1.0
        return max(int(share * request.max_tokens) - len(request.output), 0)


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
