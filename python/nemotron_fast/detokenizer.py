# SPDX-License-Identifier: Apache-2.0
"""Token ids -> text as they come. The pieces joined equal `Tokenizer.decode` of all ids."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from nemotron_fast.tokenizer import Tokenizer

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDecoder:
    """Decodes one sequence of tokens. Constant work per token: it keeps at most 3 bytes of a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, keep_ids: Iterable[int] = ()) -> None:
        """`keep_ids`: special tokens to show all the same, such as a `<think>` that is one token."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - frozenset(keep_ids) if skip_special_tokens else frozenset()
        self._utf8 = _new_utf8_decoder(errors="replace")
        self._may_strip = tokenizer.strips_first_space

    @property
    def mid_character(self) -> bool:
        """Whether the tokens so far end inside a character: what is put in now would make it U+FFFD."""
        return bool(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        """The text that this token completes: "" while a character is open, never half a character.

        An id that the tokenizer does not know gives "" and changes nothing: a model whose embedding is padded
        beyond the vocabulary can sample one.

        Raises:
            RequestError: an id below 0. The decoder is as it was before.
        """
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._may_strip and data:
            self._may_strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The end of the text: U+FFFD if a character is still open, else "". The decoder is as new then."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._may_strip = self._tokenizer.strips_first_space
        return text
