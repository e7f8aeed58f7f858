# SPDX-License-Identifier: Apache-2.0
"""Which tokens of which requests run in the next step.

First come, first served: running requests go on before waiting ones start, long prompts run in chunks under
one token budget, and when pages run out the youngest running request gives its pages back and is computed
again later.
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

    @property
    def samples(self) -> bool:
        """Whether the chunk ends at the last known token, so that the next one can be sampled."""
        return self.stop == self.request.num_tokens


class Scheduler:
    def __init__(self, num_pages: int, *, max_num_seqs: int, max_batched_tokens: int) -> None:
        self.pages = PageAllocator(num_pages)
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
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
        """The chunks of the next step; empty only if there is no work."""
        budget = self.max_batched_tokens
        chunks: list[Chunk] = []
        num_running = len(self.running)
        for request in list(self.running):
            if budget == 0:
                break
            if request.status is not Status.RUNNING:
                continue  # preempted by an older request of this same step
            chunk = self._grow(request, budget)
            if chunk is not None:
                chunks.append(chunk)
                budget -= chunk.stop - chunk.start
        preempted = len(self.running) < num_running  # then the pages are needed by those that stayed
        while self.waiting and budget and not preempted and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            pages = self.pages.allocate(pages_for(min(request.num_tokens, budget)))
            if pages is None:
                break
            self.waiting.popleft()
            request.pages, request.status = pages, Status.RUNNING
            request.scheduled_at = request.scheduled_at or time.perf_counter()
            self.running.append(request)
            chunk = Chunk(request, 0, min(request.num_tokens, budget))
            chunks.append(chunk)
            budget -= chunk.stop
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """Record that the chunks were computed, and take back the pages of finished requests."""
        for chunk in chunks:
            chunk.request.num_computed = chunk.stop
            if chunk.request.is_finished:
                self.remove(chunk.request)

    def remove(self, request: Request) -> None:
        """Forget a request wherever it is; its pages are free afterwards."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def _grow(self, request: Request, budget: int) -> Chunk | None:
        """The request's next chunk with pages for it, preempting younger requests if needed."""
        stop = min(request.num_tokens, request.num_computed + budget)
        while True:
            pages = self.pages.allocate(pages_for(stop) - len(request.pages))
            if pages is not None:
                request.pages += pages
                return Chunk(request, request.num_computed, stop)
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return None

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.status, request.num_computed = Status.WAITING, 0
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self.pages.release(request.pages)
        request.pages = []
