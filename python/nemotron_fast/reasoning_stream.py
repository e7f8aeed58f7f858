# SPDX-License-Identifier: Apache-2.0
"""A streamed answer -> thought and content, and the budget of a thought."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from nemotron_fast.stop_strings import partial_match

if TYPE_CHECKING:
    from nemotron_fast.reasoning import ReasoningProfile

CLOSE_TEXT = "\n</think>\n\n"
"""What is forced after a thought that has used up its budget."""

GRACE_TOKENS = 8
"""How far a thought may go beyond its budget to finish a tag or a character; `</think>` has 8 characters."""

Piece = tuple[Literal["reasoning", "content"], str]


class ReasoningSplitter:
    """Tells one answer's thought from its content, by the tags in its text.

    A thought is the first thing of an answer or there is none: tags further on, and a closing tag without an
    opening one, are content. The first closing tag ends it. Whitespace next to a tag belongs to neither side.
    A thought that is never closed is all reasoning, and the content is "". Without a thought the content is
    the text unchanged. How the text is cut into pieces makes no difference to the joined result.
    """

    def __init__(self, profile: ReasoningProfile, starts_inside: bool = False) -> None:
        """`starts_inside`: the prompt has opened the thought, see `prompt_opens_thought`."""
        self._open, self._close = profile.open_tag, profile.close_tag
        # start -> thought -> closed -> content, or start -> content
        self._state = "thought" if starts_inside else "start"
        self._held = ""  # whitespace and pieces of tags that cannot be decided yet
        self._thought_has_text = False

    @property
    def in_thought(self) -> bool:
        """Whether the text so far ends inside the thought."""
        return self._state == "thought"

    @property
    def mid_tag(self) -> bool:
        """Whether the thought so far ends in what may be the beginning of its closing tag."""
        return self.in_thought and partial_match(self._held, self._close) > 0

    def push(self, delta: str) -> list[Piece]:
        """Add text; returns what is decided by it, in order, each piece not empty."""
        text = self._held + delta
        self._held = ""
        pieces: list[Piece] = []
        if self._state == "start":
            text = self._start(text)
        if self._state == "thought":
            reasoning, text = self._think(text)
            if reasoning:
                pieces.append(("reasoning", reasoning))
        if self._state == "closed":
            text = text.lstrip()
            if text:
                self._state = "content"
        if self._state == "content" and text:
            pieces.append(("content", text))
        return pieces

    def flush(self) -> list[Piece]:
        """The answer is complete: returns what was held back."""
        held, self._held = self._held, ""
        if self._state == "thought":
            held = held.rstrip() if self._thought_has_text else held.strip()
            return [("reasoning", held)] if held else []
        return [("content", held)] if held else []

    def _start(self, text: str) -> str:
        """Before the first word: returns the text that the next state has to look at."""
        begin = text.lstrip()
        if begin.startswith(self._open):
            self._state = "thought"
            return begin[len(self._open) :]
        if self._open.startswith(begin):  # also when there is only whitespace so far
            self._held = text
            return ""
        self._state = "content"
        return text

    def _think(self, text: str) -> tuple[str, str]:
        """Inside the thought: returns reasoning text, and what follows the closing tag."""
        thought, tag, after = text.partition(self._close)
        if tag:
            self._state = "closed"
        else:
            thought = text[: len(text) - partial_match(text, self._close)]
        thought = thought.rstrip()
        if not tag:
            self._held = text[len(thought) :]
        if not self._thought_has_text:
            thought = thought.lstrip()
            self._thought_has_text = bool(thought)
        return thought, after


class ThinkingBudget:
    """Counts the tokens of a thought and says, once, when to force `close_text`.

    The engine calls `at_start` before the first token and `push` after each one; on True it makes the tokens
    of `close_text` the next ones. These are no longer counted.
    """

    def __init__(self, max_tokens: int, *, starts_inside: bool = False, close_text: str = CLOSE_TEXT) -> None:
        """Tokens that lie wholly inside the thought count. `starts_inside` as for ReasoningSplitter.

        Raises:
            ValueError: `max_tokens` is not an integer >= 0.
        """
        if type(max_tokens) is not int or max_tokens < 0:
            raise ValueError(f"thinking budget is {max_tokens!r}, want a number of tokens >= 0")
        self.max_tokens = max_tokens
        self.close_text = close_text
        self.spent = 0
        """Tokens of the thought so far."""
        self._inside = starts_inside
        self._forced = False

    def at_start(self) -> bool:
        """Whether to close before the first token: a budget of 0 in a thought that the prompt has opened."""
        return self._force_if_due()

    def push(self, in_thought: bool, mid_piece: bool = False) -> bool:
        """Count one token; `in_thought` is the splitter's property after it.

        `mid_piece`: the token ends inside what should not be cut, that is the closing tag (the splitter's
        `mid_tag`) or a character (the decoder's `mid_character`). The model is let finish it, for at most
        `GRACE_TOKENS` more: one that only ever begins such pieces does not think for ever.
        """
        if self._inside and in_thought and not self._forced:
            self.spent += 1
        self._inside = in_thought
        if mid_piece and self.spent < self.max_tokens + GRACE_TOKENS:
            return False
        return self._force_if_due()

    def _force_if_due(self) -> bool:
        due = self._inside and not self._forced and self.spent >= self.max_tokens
        self._forced = self._forced or due
        return due
