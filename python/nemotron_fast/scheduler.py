# SPDX-License-Identifier: Apache-2.0
"""Which tokens of which requests run in the next step.

First come, first served: running requests go on before waiting ones start, long prompts run in chunks under
one token budget of which decoding takes its share first, and when pages run out the youngest running request
gives its pages back and is computed again later.

A step may be planned while the one before is in flight: a request whose next token is being sampled then goes
on from a token that only the device knows. `receive` takes in the tokens once they are known.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from nemotron_fast.errors import CapacityError
from nemotron_fast.pages import PAGE_SIZE, PageAllocator, pages_for
from nemotron_fast.request import Request, Status


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of one request, computed in one step."""

    request: Request
    start: int
    stop: int
    samples: bool  # whether it ends at the last token there is, so that the next one is sampled


class Scheduler:
    """Args:
    max_batched_tokens: tokens of one step.
    max_mixed_tokens: prompt tokens of a step that decodes as well, so that long prompts bound its time; None: no
        bound but the one above.
    """

    def __init__(
        self, num_pages: int, *, max_num_seqs: int, max_batched_tokens: int, max_mixed_tokens: int | None = None
    ) -> None:
        self.pages = PageAllocator(num_pages)
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.max_mixed_tokens = max_mixed_tokens or max_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            CapacityError: it could never run, because the whole pool is smaller than what it may need.
        """
        need = len(request.prompt) + request.max_tokens
        if pages_for(need) > self.pages.num_pages:
            raise CapacityError(
                f"the request may need {need} tokens of KV cache, the pool holds {self.pages.num_pages * PAGE_SIZE}; "
                "lower max_tokens, or give the engine more memory or an FP8 KV cache"
            )
        self.waiting.append(request)

    def next(self) -> list[Chunk]:
        """Plan the next step; empty if there is no work, or none before a token in flight is known."""
        num_decoding = sum(_is_decoding(r) for r in self.running)
        decode_budget = self.max_batched_tokens
        prompt_budget = max(decode_budget - num_decoding, 0)
        if num_decoding:
            prompt_budget = min(prompt_budget, self.max_mixed_tokens)
        chunks: list[Chunk] = []
        num_running = len(self.running)
        for request in list(self.running):
            if request.status is not Status.RUNNING or request.awaits_last_token:
                continue  # preempted by an older request of this same step, or computed to its end
            decoding = _is_decoding(request)
            num_tokens = min(request.num_expected - request.num_computed, decode_budget if decoding else prompt_budget)
            if num_tokens == 0 or not self._grow(request, request.num_computed + num_tokens):
                continue
            chunks.append(_plan(request, num_tokens))
            if decoding:
                decode_budget -= 1
            else:
                prompt_budget -= num_tokens
        if len(self.running) == num_running:  # else the pages are needed by those that stayed
            chunks += self._admit(prompt_budget)
        return chunks

    def receive(self, request: Request, token: int) -> bool:
        """Take in the token that the oldest step in flight sampled for a request; False if it came too late."""
        request.in_flight -= 1
        if request.is_finished:  # by an earlier token, or aborted
            return False
        request.append(token)
        if request.is_finished:
            self.remove(request)
        return True

    def remove(self, request: Request) -> None:
        """Forget a request wherever it is; its pages are free afterwards.

        A step in flight may still write to them: whatever uses them next comes after it on the device.
        """
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def _admit(self, budget: int) -> list[Chunk]:
        """Start waiting requests that the pool holds whole, as they are now."""
        chunks = []
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if request.in_flight or pages_for(request.num_tokens) > self.pages.num_free:
                break
            self.waiting.popleft()
            request.status = Status.RUNNING
            request.scheduled_at = request.scheduled_at or time.perf_counter()
            self.running.append(request)
            num_tokens = min(request.num_tokens, budget)
            grown = self._grow(request, num_tokens)
            assert grown, "the pages were free a moment ago"
            chunks.append(_plan(request, num_tokens))
            budget -= num_tokens
        return chunks

    def _grow(self, request: Request, stop: int) -> bool:
        """Pages for the request's tokens below `stop`, preempting younger requests, or itself, if needed."""
        while True:
            pages = self.pages.allocate(pages_for(stop) - len(request.pages))
            if pages is not None:
                request.pages += pages
                return True
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.status, request.num_computed = Status.WAITING, 0
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self.pages.release(request.pages)
        request.pages = []


def _is_decoding(request: Request) -> bool:
    return request.num_expected - request.num_computed == 1 and not request.awaits_last_token


def _plan(request: Request, num_tokens: int) -> Chunk:
    """The request's next chunk, recorded as computed."""
    start = request.num_computed
    request.num_computed = start + num_tokens
    samples = request.num_computed == request.num_expected
    request.in_flight += samples
    return Chunk(request, start, request.num_computed, samples)
