# SPDX-License-Identifier: Apache-2.0
"""AsyncLLM: the API for programs with an event loop. The engine runs in a thread of its own.

The thread alone touches the engine: what callers want done waits in an inbox until the step at hand is over, and
what a step made visible goes back to each caller's event loop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nemotron_fast.conversation import Conversation
from nemotron_fast.errors import RequestError
from nemotron_fast.llm import LLM
from nemotron_fast.metrics import Metrics
from nemotron_fast.outputs import Delta, Result
from nemotron_fast.prompts import Message, Prompt
from nemotron_fast.sampling_params import SamplingParams
from nemotron_fast.text_engine import Group, drain

# Tokens of a step in which some decode, which bounds how far a long prompt holds up their streams: on an H100, batch 16
# of Super-49B decodes in 17.3 ms, beside a prompt of 32,768 tokens in 33 (p99 37, the slowest 39).
MIXED_TOKENS = 224

Parcel = list[Delta] | Exception  # what one step brings to a stream


@dataclass(eq=False)
class _Stream:
    conversation: Conversation
    params: SamplingParams
    loop: asyncio.AbstractEventLoop
    parcels: asyncio.Queue[Parcel]
    group: Group = field(default_factory=list)


class AsyncLLM:
    """Takes the arguments of LLM; max_mixed_tokens is 224 unless given. Warms up at once, so that no request waits for
    that. Close it, or use it in an `async with` statement.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._llm = LLM(model, **{"max_mixed_tokens": MIXED_TOKENS} | options)
        self._llm.warm_up()
        self._text = self._llm.text_engine
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: close
        self._streams: set[_Stream] = set()  # of the thread
        self._closed = False
        self._closing = threading.Lock()  # nothing is put behind the None
        self._thread = threading.Thread(target=self._serve, name="nemotron_fast engine", daemon=True)
        self._thread.start()

    async def stream(
        self, prompt: Prompt | list[Message], params: SamplingParams | None = None, *, thinking: bool | None = None
    ) -> AsyncIterator[Delta]:
        """Answer one prompt (text, token ids or messages) piece by piece; the last delta carries the result.

        Closing the iterator, or cancelling the task that reads it, cancels the request.

        Raises:
            RequestError: a prompt or parameter that cannot be served, or the AsyncLLM is closed.
        """
        params = params or SamplingParams()
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params is {type(params).__name__}, want SamplingParams")
        conversation = await asyncio.to_thread(self._llm.prepare, prompt, thinking)
        stream = _Stream(conversation, params, asyncio.get_running_loop(), asyncio.Queue())
        with self._closing:
            self._refuse_if_closed()
            self._inbox.put(partial(self._begin, stream))
        try:
            while True:
                parcel = await stream.parcels.get()
                if isinstance(parcel, Exception):
                    raise parcel
                for delta in parcel:
                    yield delta
                    if delta.result is not None:
                        return
        finally:
            self._inbox.put(partial(self._end, stream))

    async def generate(
        self, prompt: Prompt | list[Message], params: SamplingParams | None = None, *, thinking: bool | None = None
    ) -> Result:
        """The whole answer to one prompt. Raises as `stream`."""
        async for delta in self.stream(prompt, params, thinking=thinking):
            result = delta.result
        return result

    def metrics(self) -> Metrics:
        """What the engine is doing."""
        self._refuse_if_closed()
        return self._llm.metrics()

    def close(self) -> None:
        """End all streams with a RequestError and free the model. Closing twice is harmless."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._inbox.put(None)
        self._thread.join()
        self._llm.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RequestError("this AsyncLLM is closed; make a new one")

    # What follows runs in the thread.

    def _serve(self) -> None:
        while True:
            while not (self._text.engine.has_work and self._inbox.empty()):
                command = self._inbox.get()
                if command is None:
                    self._fail(RequestError("the AsyncLLM was closed before the answer was complete"))
                    return
                command()
            try:
                self._text.step()
            except Exception as error:  # belongs to every caller that waits
                self._fail(error)
            self._deliver()

    def _begin(self, stream: _Stream) -> None:
        try:
            (stream.group,) = self._text.start([stream.conversation], [stream.params])
        except Exception as error:  # belongs to the caller
            self._send({stream: error})
        else:
            self._streams.add(stream)

    def _end(self, stream: _Stream) -> None:
        self._streams.discard(stream)
        self._text.cancel([stream.group])

    def _fail(self, error: Exception) -> None:
        streams = list(self._streams)
        for stream in streams:
            self._end(stream)
        self._send(dict.fromkeys(streams, error))

    def _deliver(self) -> None:
        self._send({s: deltas for s in self._streams if (deltas := list(drain(s.conversation, s.group)))})

    def _send(self, parcels: dict[_Stream, Parcel]) -> None:
        """One call per event loop, however many streams it has."""
        by_loop: dict[asyncio.AbstractEventLoop, dict[_Stream, Parcel]] = defaultdict(dict)
        for stream, parcel in parcels.items():
            by_loop[stream.loop][stream] = parcel
        for loop, theirs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, theirs)
            except RuntimeError:  # the loop is closed: nobody waits any more
                for stream in theirs:
                    self._end(stream)


def _put_all(parcels: dict[_Stream, Parcel]) -> None:
    for stream, parcel in parcels.items():
        stream.parcels.put_nowait(parcel)
