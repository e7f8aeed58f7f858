# SPDX-License-Identifier: Apache-2.0
"""The engine with text around it: conversations in, pieces of text and results out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from nemotron_fast.conversation import Conversation
from nemotron_fast.engine import Engine
from nemotron_fast.errors import RequestError
from nemotron_fast.outputs import Delta
from nemotron_fast.request import Request
from nemotron_fast.sampling_params import SamplingParams
from nemotron_fast.sequence_text import SequenceText, make_result
from nemotron_fast.tokenizer import Tokenizer

Group = list[SequenceText]  # the n sequences of one prompt


class TextEngine:
    """Starts conversations, steps the engine and keeps the text of every live sequence up to date."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, sampling_defaults: dict[str, Any]) -> None:
        self._engine: Engine | None = engine
        self._tokenizer, self._sampling_defaults = tokenizer, sampling_defaults
        self.live: dict[Request, SequenceText] = {}

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RequestError("this LLM is closed; make a new one")
        return self._engine

    def close(self) -> None:
        """Let go of the engine; nothing can be started or stepped afterwards, and what lives is forgotten."""
        self._engine = None
        self.live.clear()

    def start(
        self, conversations: list[Conversation], params: list[SamplingParams], *, streamed: bool = True
    ) -> list[Group]:
        """Queue n sequences per conversation; if one is refused, none is left queued. Only if `streamed` there is
        something to `drain`."""
        engine = self.engine
        started: list[Group] = []
        with contextlib.ExitStack() as undo:
            for conversation, own in zip(conversations, params, strict=True):
                resolved = self._resolve(conversation, own)
                group = []
                for index in range(own.n):
                    request = engine.add_request(conversation.token_ids, resolved, sample_index=index)
                    resolved = dataclasses.replace(resolved, prompt_logprobs=None)  # once per prompt is enough
                    undo.callback(engine.abort, request)
                    thought = (conversation.profile, conversation.starts_in_thought)
                    group.append(SequenceText(request, index, self._tokenizer, *thought, streamed=streamed))
                started.append(group)
            undo.pop_all()
        self.live.update((s.request, s) for group in started for s in group)
        return started

    def _resolve(self, conversation: Conversation, params: SamplingParams) -> SamplingParams:
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this checkpoint has no tokenizer.json")
        if params.max_thinking_tokens is not None and conversation.profile is None:
            raise RequestError("max_thinking_tokens needs chat with a model that has a reasoning switch")
        return params.resolve(self._sampling_defaults | conversation.sampling)

    def step(self) -> list[Request]:
        """One engine step and the text of every sequence it touched; returns the requests that got a token."""
        engine = self.engine
        touched = engine.step()
        for request in touched:
            sequence = self.live[request]
            sequence.advance()
            if sequence.stopped_by is not None:
                engine.stop_by_text(request, sequence.stopped_by)
            if request.is_finished:
                del self.live[request]
        return touched

    def cancel(self, groups: list[Group]) -> None:
        """End what has not ended; the pages are free afterwards."""
        for sequence in (s for group in groups for s in group):
            if self._engine is not None:
                self._engine.abort(sequence.request)
            self.live.pop(sequence.request, None)


def is_drained(group: Group) -> bool:
    """Whether nothing more will come."""
    return all(s.request.is_finished and not s.deltas for s in group)


def drain(conversation: Conversation, group: Group) -> Iterator[Delta]:
    """Take what became visible; the last delta of all carries the result."""
    for sequence in group:
        while sequence.deltas:
            delta = sequence.deltas.popleft()
            if is_drained(group):
                delta = dataclasses.replace(delta, result=make_result(conversation, group))
            yield delta
