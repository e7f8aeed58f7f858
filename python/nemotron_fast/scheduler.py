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
from itertools import accumulate, takewhile

from nemotron_fast.admission import OutputLengths, WavePlan, Waves, peak_pages
from nemotron_fast.errors import CapacityError
from nemotron_fast.pages import PAGE_SIZE, PagePool, page_key, pages_for
from nemotron_fast.prompt_budget import MIN_PROMPT_TOKENS, PromptBudget
from nemotron_fast.request import Request, Status
from nemotron_fast.turns import sitting_out


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
    max_mixed_tokens: tokens of a step that both decodes and computes prompts, fewer of those far into a sequence
        (PromptBudget), so that prompts bound its time; None: no bound but the one above, because only throughput
        counts, for which requests also wait or take turns (admission.Waves).
    prefix_caching: use pages again that hold the same tokens.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_mixed_tokens: int | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.pages = PagePool(num_pages)
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.max_mixed_tokens = max_mixed_tokens or max_batched_tokens
        self.levels_waves = max_mixed_tokens is None
        self.prefix_caching = prefix_caching
        self.num_looked_up = 0  # tokens of started requests that the cache was asked for
        self.num_found = 0  # and those it had
        self.num_preempted = 0  # times a request gave its pages back
        self.output_lengths = OutputLengths()
        self.waves = Waves()
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
        need = request.final_tokens
        if pages_for(need) > self.pages.num_pages:
            raise CapacityError(
                f"the request may need {need} tokens of KV cache, the pool holds {self.pages.num_pages * PAGE_SIZE}; "
                "lower max_tokens, or give the engine more memory or an FP8 KV cache"
            )
        self.waiting.append(request)
        self.waves.add(request)

    def next(self) -> list[Chunk]:
        """Plan the next step; empty if there is no work, or none before a token in flight is known."""
        waves = WavePlan(self.max_num_seqs)
        if self.levels_waves:
            waves = self.waves.plan(self.running, self.waiting, self.max_num_seqs, self.pages.num_pages)
        out = self._sitting_out(waves)
        num_decoding = sum(r.is_decoding for r in self.running) - len(out)
        decode_budget = self.max_batched_tokens
        prompt_tokens = max(decode_budget - num_decoding, 0)
        if num_decoding:
            prompt_tokens = min(prompt_tokens, max(self.max_mixed_tokens - num_decoding, MIN_PROMPT_TOKENS))
        prompt_budget = PromptBudget(prompt_tokens, bounds_time=num_decoding > 0 and not self.levels_waves)
        chunks: list[Chunk] = []
        num_running = len(self.running)
        for request in list(self.running):
            if len(chunks) == self.max_num_seqs:
                break
            if request.status is not Status.RUNNING or request.awaits_last_token or request in out:
                continue  # preempted by an older request of this same step, computed to its end, or not its turn
            num_tokens, start = request.num_expected - request.num_computed, request.num_computed
            decoding = request.is_decoding
            num_tokens = min(num_tokens, decode_budget) if decoding else prompt_budget.fits(start, num_tokens)
            if num_tokens == 0 or not self._grow(request, start + num_tokens):
                continue
            chunks.append(self._plan(request, num_tokens))
            if decoding:
                decode_budget -= 1
            else:
                prompt_budget.spend(start, num_tokens)
        if len(self.running) == num_running:  # else the pages are needed by those that stayed
            chunks += self._admit(prompt_budget, self.max_num_seqs - len(chunks), waves)
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
            self.waves.remove(request)
            if request.finish_reason in ("stop", "length"):
                self.output_lengths.learn(request)
        elif request in self.waiting:
            self.waiting.remove(request)
            self.waves.remove(request)
        self._release(request)

    def check(self) -> None:
        """The invariants between steps."""
        assert not any(r.pages for r in self.waiting), "a waiting request holds pages"
        assert self.waves.lengths.total() == len(self.waiting) + len(self.running), "waves are of other requests"
        self.pages.check(r.pages for r in self.running)

    def _sitting_out(self, waves: WavePlan) -> set[Request]:
        """Running requests that leave this step to others. Prompts come first: the more have started, the better."""
        if waves.num_ahead is None:
            return set()
        num_prompts = sum(not r.is_decoding and not r.awaits_last_token for r in self.running)
        sizes = accumulate(r.num_tokens for r in self.waiting)
        num_prompts += sum(1 for _ in takewhile(lambda tokens: tokens <= self.max_batched_tokens, sizes))
        max_rows = max(self.max_num_seqs - num_prompts, 0)
        return sitting_out(self.running, self.waiting, waves.num_ahead, max_rows, self.pages.num_pages)

    def _admit(self, budget: PromptBudget, num_rows: int, waves: WavePlan) -> list[Chunk]:
        """Start waiting requests that the pool holds whole, as they are now and probably to their ends."""
        chunks = []
        while self.waiting and budget and len(chunks) < num_rows:
            request = self.waiting[0]
            shared = self._find_prefix(request)
            own = pages_for(request.num_tokens) - len(shared)
            if request.in_flight or not self.pages.can_hold(shared, own):
                break
            if not self._has_room_later(request, shared, waves):
                break
            self.waiting.popleft()
            self._start(request, shared)
            start = request.num_computed
            num_tokens = budget.fits(start, request.num_tokens - start)
            budget.spend(start, num_tokens)
            grown = self._grow(request, start + num_tokens)
            assert grown, "the pool holds the whole request"
            chunks.append(self._plan(request, num_tokens))
        return chunks

    def _has_room_later(self, request: Request, shared: list[int], waves: WavePlan) -> bool:
        """Whether the pool will probably hold the running requests and this one, which starts with `shared` pages."""
        num_running, num_ahead = len(self.running), waves.num_ahead
        if num_running >= (self.max_num_seqs if shared and num_ahead is None else waves.most_running):
            return False
        if num_running == 0 or num_ahead is not None:  # who takes turns leaves pages for the prompts that wait
            return True
        # Beginnings that several share, each counted once.
        others = max(self.pages.num_held - sum(len(r.pages) - r.num_shared for r in self.running), 0)
        at_ends = sum(pages_for(r.final_tokens) - r.num_shared for r in self.running)
        if others + at_ends + pages_for(request.final_tokens) - len(shared) <= self.pages.num_pages:
            return True
        owned = [r.num_expected - r.num_shared * PAGE_SIZE for r in self.running]  # once its prompt is computed
        owned.append(request.num_tokens - len(shared) * PAGE_SIZE)
        left = [self.output_lengths.left(r) for r in (*self.running, request)]
        return others + peak_pages(owned, left) <= self.pages.num_pages

    def _start(self, request: Request, shared: list[int]) -> None:
        self.pages.share(shared)
        request.pages, request.num_shared, request.num_published = shared, len(shared), len(shared)
        request.num_computed = len(shared) * PAGE_SIZE
        self.num_looked_up += request.num_tokens
        self.num_found += request.num_computed
        if request.scheduled_at is None:
            request.scheduled_at = time.perf_counter()
            request.num_cached = request.num_computed
        request.status = Status.RUNNING
        self.running.append(request)

    def _find_prefix(self, request: Request) -> list[int]:
        """Cached pages that the request can begin with; at least one token is left to compute."""
        wants_prompt = request.params.prompt_logprobs is not None and len(request.prompt_logprobs) < len(request.prompt)
        if not self.prefix_caching or wants_prompt:
            return []
        return self.pages.find(_keys(request, (request.num_tokens - 1) // PAGE_SIZE))

    def _plan(self, request: Request, num_tokens: int) -> Chunk:
        """The request's next chunk, recorded as computed.

        Pages that a prompt's chunk fills are there for requests of the same step already: a step appends all KV of
        a block before its attention. The token of a decoding request counts from the next step on, so that a
        kernel may append and attend at once.
        """
        start = request.num_computed
        request.num_computed = start + num_tokens
        samples = request.num_computed == request.num_expected
        request.in_flight += samples
        self._publish(request, request.num_computed if num_tokens > 1 else start)
        return Chunk(request, start, request.num_computed, samples)

    def _publish(self, request: Request, num_computed: int) -> None:
        """Let others use the request's pages that are full of known tokens, of which so many are computed."""
        count = min(num_computed, request.num_tokens) // PAGE_SIZE
        if not self.prefix_caching or count <= request.num_published:
            return
        keys = _keys(request, count)
        for index in range(request.num_published, count):
            self.pages.publish(request.pages[index], keys[index])
        request.num_published = count

    def _grow(self, request: Request, stop: int) -> bool:
        """Pages for the request's tokens below `stop`, preempting younger requests, or itself, if needed."""
        needed = pages_for(stop) - len(request.pages)
        if needed <= 0:
            return True
        while (pages := self.pages.allocate(needed)) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        request.pages += pages
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        self.num_preempted += 1

    def _release(self, request: Request) -> None:
        if request.pages:
            self._publish(request, request.num_computed)
            self.pages.release(request.pages)
        request.pages, request.num_computed, request.num_shared, request.num_published = [], 0, 0, 0


def _keys(request: Request, count: int) -> list[bytes]:
    """The keys of the request's first `count` pages; all their tokens are known."""
    keys = request.page_keys
    while len(keys) < count:
        begin = len(keys) * PAGE_SIZE
        keys.append(page_key(keys[-1] if keys else b"", request.tokens(begin, begin + PAGE_SIZE)))
    return keys[:count]
