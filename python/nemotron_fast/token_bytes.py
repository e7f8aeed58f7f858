# SPDX-License-Identifier: Apache-2.0
"""Token id -> the bytes it stands for: the one definition behind decoding, streaming and logprob display."""

from __future__ import annotations

import json
import operator
from typing import Any

import tokenizers

from nemotron_fast.errors import CheckpointError, RequestError

_KNOWN_DECODERS = frozenset({"ByteLevel", "ByteFallback", "Replace", "Fuse", "Strip"})


class TokenizerError(CheckpointError):
    """A tokenizer file that is missing, broken, or of a kind that this engine does not decode."""


def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself where it is printable Latin-1,
    else the next free character from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in printable)
    table.update({chr(0x100 + n): b for n, b in enumerate(others)})
    return table


_BYTE_OF_CHAR = _byte_of_char()


class TokenBytes:
    """The bytes of every token of a `tokenizers` vocabulary, computed on first use."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises TokenizerError if the decoder is neither byte-level nor with byte fallback."""
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self._cache: dict[int, bytes] = {i: token.content.encode() for i, token in added.items()}
        steps = _decoder_steps(backend)
        kinds = [step.get("type") for step in steps]
        if set(kinds) - _KNOWN_DECODERS or not {"ByteLevel", "ByteFallback"} & set(kinds):
            raise TokenizerError(
                f"tokenizer.json has the decoder {kinds}, want ByteLevel (as Llama 3), or Replace, "
                "ByteFallback, Fuse and Strip (as Llama 2)"
            )
        self._byte_level = "ByteLevel" in kinds
        self.strips_first_space = "Strip" in kinds
        """Whether a text loses one leading space, which the encoder had put there."""

    def __getitem__(self, token_id: int) -> bytes:
        """b"" for an id that the vocabulary lacks, as the padding rows of an embedding are. Such ids are not kept.

        Raises:
            RequestError: an id below 0, which no model gives.
        """
        data = self._cache.get(token_id)
        if data is None:
            index = operator.index(token_id)
            if index < 0:
                raise RequestError(f"token id {index} is not in the tokenizer's vocabulary")
            token = self._backend.id_to_token(index) if index < 1 << 32 else None
            if token is None:
                return b""
            data = self._cache[index] = self._compute(token)
        return data

    def _compute(self, token: str) -> bytes:
        if self._byte_level:
            data = [_BYTE_OF_CHAR.get(char) for char in token]
            return bytes(b for b in data if b is not None) if None not in data else token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's parts, as dicts with a "type"; empty if there is none."""
    if backend.decoder is None:
        return []
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return state["decoders"] if state.get("type") == "Sequence" else [state]
