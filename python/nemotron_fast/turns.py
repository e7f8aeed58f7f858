# SPDX-License-Identifier: Apache-2.0
"""Requests that take turns: the oldest `num_ahead` take part in every step, the others as the KV cache has room for
them until those have ended (admission.Waves says why).
"""

from __future__ import annotations

from collections.abc import Iterable

from nemotron_fast.admission import peak_pages
from nemotron_fast.pages import PAGE_SIZE, pages_for
from nemotron_fast.request import Request


def sitting_out(
    running: list[Request], waiting: Iterable[Request], num_ahead: int, max_rows: int, num_pages: int
) -> set[Request]:
    """Those of the decoding requests that are not in the next step.

    Args:
        running: in order of arrival.
        waiting: those whose prompts are not to be held up; pages are left for these.
        max_rows: decoding sequences of the step.
        num_pages: of the pool.
    """
    ahead = running[:num_ahead]
    behind = [r for r in running[num_ahead:] if r.is_decoding]
    num_rows = max_rows - num_ahead
    spare = num_pages - _owned(running[num_ahead:])
    if _fit_to_their_ends(running, num_pages):
        spare -= sum(pages_for(r.num_expected) for r in ahead)
    else:
        spare -= sum(pages_for(r.final_tokens) for r in ahead) + sum(pages_for(r.num_tokens) for r in waiting)
        tokens = spare * PAGE_SIZE + sum(len(r.pages) * PAGE_SIZE - r.num_expected for r in behind)
        steps = max((r.final_tokens - r.num_expected for r in ahead), default=0)
        num_rows = min(num_rows, -(-tokens // max(steps, 1)))  # so that they get these tokens in these steps
    out = set()
    for request in sorted(behind, key=lambda r: r.num_expected - len(r.prompt)):
        needed = pages_for(request.num_expected) - len(request.pages)
        if num_rows > 0 and needed <= max(spare, 0):
            num_rows -= 1
            spare -= needed
        else:
            out.add(request)
    return out


def _owned(running: list[Request]) -> int:
    """Pages of the requests, once their prompts are computed."""
    return sum(max(len(r.pages), 0 if r.is_decoding else pages_for(r.num_tokens)) for r in running)


def _fit_to_their_ends(running: list[Request], num_pages: int) -> bool:
    left = [r.final_tokens - r.num_expected for r in running]
    return peak_pages([r.num_expected for r in running], left) <= num_pages
