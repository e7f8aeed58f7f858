# SPDX-License-Identifier: Apache-2.0
"""The text of one growing sequence: decoding, stop strings, reasoning, thinking budget."""

from __future__ import annotations

from collections import deque

from nemotron_fast.conversation import Conversation
from nemotron_fast.detokenizer import IncrementalDecoder
from nemotron_fast.outputs import Completion, Delta, Result, Timings, Usage
from nemotron_fast.reasoning import ReasoningProfile
from nemotron_fast.reasoning_stream import ReasoningSplitter, ThinkingBudget
from nemotron_fast.request import Request
from nemotron_fast.stop_strings import StopStrings
from nemotron_fast.tokenizer import Tokenizer


class SequenceText:
    """Follows a request: call `advance()` after each of its tokens; `deltas` holds what became visible, if `streamed`.

    Without a tokenizer there is no text, only token ids.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        tokenizer: Tokenizer | None,
        profile: ReasoningProfile | None = None,
        starts_in_thought: bool = False,
        *,
        streamed: bool = True,
    ) -> None:
        params = request.params
        self.request, self.index = request, index
        self.deltas: deque[Delta] = deque()
        self.stopped_by: str | None = None  # the stop string that was found
        self._tokenizer, self._streamed = tokenizer, streamed
        self._decoder = None
        if tokenizer is not None:
            tags = (tokenizer.token_id(t) for t in (profile.open_tag, profile.close_tag)) if profile else ()
            keep = [i for i in tags if i is not None]
            self._decoder = IncrementalDecoder(tokenizer, params.skip_special_tokens, keep_ids=keep)
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._splitter = ReasoningSplitter(profile, starts_in_thought) if profile else None
        self._budget = None
        if profile and params.max_thinking_tokens is not None:
            self._budget = ThinkingBudget(params.max_thinking_tokens, starts_inside=starts_in_thought)
        self._num_seen = 0
        self._parts: dict[str, list[str]] = {"text": [], "reasoning": [], "content": []}
        if self._budget is not None and self._budget.at_start():
            self._close_thought()

    def advance(self) -> None:
        """Take in the request's new tokens; sets `stopped_by`, and forces the end of a thought over budget."""
        request = self.request
        while self._num_seen < len(request.output) and self.stopped_by is None:
            token = request.output[self._num_seen]
            self._num_seen += 1
            is_end = request.is_finished and self._num_seen == len(request.output)
            hidden = is_end and token == request.stop_reason and not request.params.include_stop_str_in_output
            visible = self._push(token, hidden)
            if is_end or self.stopped_by is not None:
                if self.stopped_by is None:
                    visible += self._flush()
                finish = "stop" if self.stopped_by is not None else request.finish_reason
                self._emit(visible, [token], finish)
            else:
                self._emit(visible, [token], None)
                if self._budget:
                    mid_piece = self._splitter.mid_tag or self._decoder.mid_character
                    if self._budget.push(self._splitter.in_thought, mid_piece):
                        self._close_thought()

    def completion(self) -> Completion:
        """The finished sequence."""
        joined = {kind: "".join(parts) for kind, parts in self._parts.items()}
        request = self.request
        return Completion(
            index=self.index,
            text=joined["text"],
            token_ids=list(request.output),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            reasoning=joined["reasoning"] if self._splitter else None,
            content=joined["content"],
            logprobs=list(request.logprobs) if request.params.logprobs is not None else None,
        )

    def _push(self, token: int, hidden: bool) -> str:
        if self._decoder is None or hidden:
            return ""
        visible, self.stopped_by = self._stops.push(self._decoder.push(token))
        return visible

    def _flush(self) -> str:
        if self._decoder is None:
            return ""
        visible, self.stopped_by = self._stops.push(self._decoder.flush())
        return visible if self.stopped_by is not None else visible + self._stops.flush()

    def _emit(self, text: str, token_ids: list[int], finish_reason: str | None) -> None:
        split = [("content", text)]
        if self._splitter is not None:
            split = self._splitter.push(text)
            if finish_reason is not None:
                split += self._splitter.flush()
        pieces = {"text": text, "reasoning": "", "content": ""}
        for kind, part in split:
            pieces[kind] += part
        for kind, part in pieces.items():
            self._parts[kind].append(part)
        if self._streamed:  # else nobody takes them, and so many objects make the interpreter's collector slow
            self.deltas.append(Delta(self.index, token_ids=token_ids, finish_reason=finish_reason, **pieces))

    def _close_thought(self) -> None:
        self.request.forced.extend(self._tokenizer.encode(self._budget.close_text, add_special_tokens=False))


def make_result(conversation: Conversation, group: list[SequenceText]) -> Result:
    """The result of a prompt from its n finished sequences."""
    requests = [s.request for s in group]
    arrived = min(r.arrived_at for r in requests)
    first = min(r.first_token_at for r in requests)
    end = max(r.finished_at for r in requests)
    generated = sum(len(r.output) for r in requests)
    return Result(
        prompt=conversation.text,
        prompt_token_ids=conversation.token_ids,
        outputs=[s.completion() for s in group],
        prompt_logprobs=requests[0].prompt_logprobs or None,
        usage=Usage(len(conversation.token_ids), generated),
        timings=Timings(
            queue_s=min(r.scheduled_at for r in requests) - arrived,
            ttft_s=first - arrived,
            decode_s=end - first,
            total_s=end - arrived,
            tokens_per_s=generated / max(end - arrived, 1e-9),
        ),
    )
