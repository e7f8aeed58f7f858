# SPDX-License-Identifier: Apache-2.0
"""Text <-> token ids, from the files of a checkpoint folder. No code of the checkpoint is ever run.

Read, by these fixed names only: tokenizer.json (needed), tokenizer_config.json, special_tokens_map.json,
generation_config.json or config.json (end-of-sequence ids), chat_template.jinja.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from nemotron_fast.chat_template import ChatTemplate, template_sources
from nemotron_fast.errors import RequestError
from nemotron_fast.files import read_json, read_text
from nemotron_fast.token_bytes import TokenBytes, TokenizerError

__all__ = ["Tokenizer", "TokenizerError"]

MAX_TOKENIZER_BYTES = 256 << 20
MAX_CONFIG_BYTES = 16 << 20
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A checkpoint's tokenizer: byte-level BPE (Llama 3), or BPE with byte fallback (Llama 2).

    Decoding is defined on bytes: the bytes of all tokens are joined and read as UTF-8, and each part that is
    not UTF-8 becomes U+FFFD. So decoding piece by piece gives the same text as decoding at once, and the
    `clean_up_tokenization_spaces` setting, which would eat spaces of the text, has no effect here.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        *,
        eos_token_ids: Sequence[int] = (),
        template: str | None = None,
    ) -> None:
        """`config` is the content of tokenizer_config.json, `template` wins over its chat_template,
        `eos_token_ids` are further ids that end a text.

        Raises:
            TokenizerError: a special token is not in the vocabulary, or the decoder is of an unknown kind.
        """
        self._config = dict(config or {})
        self._template = template
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """The largest id + 1; a model's embedding may have more rows."""
        self._bytes = TokenBytes(backend)
        self.special_ids = self._bytes.special_ids
        self.strips_first_space = self._bytes.strips_first_space
        self.special_tokens: dict[str, str] = {}
        """bos_token, eos_token, pad_token and unk_token, as far as the files name them."""
        for name in _SPECIAL_NAMES:
            if (token := _token_string(self._config.get(name), name)) is not None:
                self.special_tokens[name] = token
        self.bos_id = self._named_id("bos_token")
        self.pad_id = self._named_id("pad_token")
        eos = self._named_id("eos_token")
        self.eos_ids: frozenset[int] = frozenset(eos_token_ids) | ({eos} if eos is not None else set())
        self._prefix, self._suffix = self._specials_around()

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder.

        Raises:
            TokenizerError: no tokenizer.json there, a file that is broken, too large or a link out of the
                folder, or a special token that is not in the vocabulary.
        """
        folder = Path(path)
        if (text := _read(folder, "tokenizer.json", MAX_TOKENIZER_BYTES)) is None:
            hint = (
                "; the sentencepiece file tokenizer.model alone is not enough: convert it with transformers"
                if (folder / "tokenizer.model").exists()
                else ""
            )
            raise TokenizerError(f"no tokenizer.json in {folder}: copy it from the original checkpoint{hint}")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
        config = _read_json(folder, "special_tokens_map.json")
        main = _read_json(folder, "tokenizer_config.json")
        config.update({key: value for key, value in main.items() if value is not None})
        eos = _eos_ids(folder, "generation_config.json") or _eos_ids(folder, "config.json")
        template = _read(folder, "chat_template.jinja", MAX_CONFIG_BYTES)
        return cls(backend, config, eos_token_ids=eos, template=template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text become their ids.

        With `add_special_tokens`, what the tokenizer puts around a text (BOS for Llama) is added, and a text
        that begins with BOS already, as a rendered chat template does, still gets one BOS only.

        Raises:
            RequestError: `text` is not a string, or holds half a surrogate pair (not encodable as UTF-8).
        """
        if not isinstance(text, str):
            raise RequestError(f"text to encode is {type(text).__name__}, want str")
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError("text holds a lone surrogate, which is no character: remove it") from error
        if not add_special_tokens:
            return ids
        ids = [*self._prefix, *ids, *self._suffix]
        while self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            del ids[0]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids that the vocabulary lacks become nothing.

        Raises:
            RequestError: an id below 0.
        """
        known = [self.token_bytes(i) for i in ids if not (skip_special_tokens and i in self.special_ids)]
        data = b"".join(known)
        if self.strips_first_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; a special token stands for its name.

        An id that the vocabulary lacks stands for nothing (b""): a model's embedding may have more rows than
        the tokenizer has tokens, and then such an id can be sampled.

        Raises:
            RequestError: an id below 0.
        """
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token alone as text, for display: part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """Id of one vocabulary entry, such as "<|eot_id|>"; None if there is no such entry."""
        return self._backend.token_to_id(token)

    @cached_property
    def chat_templates(self) -> dict[str, ChatTemplate]:
        """All templates by name; the usual single one is called "default".

        Raises:
            ChatTemplateError: an entry of another form, or a template that is too large or not valid.
        """
        sources = template_sources(self._config.get("chat_template"), self._template)
        bos, eos = self.special_tokens.get("bos_token"), self.special_tokens.get("eos_token")
        return {
            name: ChatTemplate(source, bos, eos, special_tokens=self.special_tokens) for name, source in sources.items()
        }

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The default template, or the only one; None if the checkpoint has none.

        Raises:
            TokenizerError: several named templates, none of them called "default".
        """
        templates = self.chat_templates
        if len(templates) > 1 and "default" not in templates:
            raise TokenizerError(
                f"chat templates {sorted(templates)} but none named 'default': choose one from chat_templates"
            )
        return templates.get("default") or next(iter(templates.values()), None)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        if (found := self._backend.token_to_id(token)) is None:
            raise TokenizerError(f"{name} {token!r} is not in the vocabulary of tokenizer.json")
        return found

    def _specials_around(self) -> tuple[list[int], list[int]]:
        """Ids that encoding with special tokens puts before and after any text."""
        probe = "a"
        plain: list[int] = self._backend.encode(probe, add_special_tokens=False).ids
        full: list[int] = self._backend.encode(probe, add_special_tokens=True).ids
        starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
        if full != plain and (not plain or len(starts) != 1):
            raise TokenizerError(f"post_processor makes {full} of {plain}, want fixed tokens around it")
        prefix, suffix = full[: starts[0]], full[starts[0] + len(plain) :]
        match self._config.get("add_bos_token"), self.bos_id:
            case True, None:
                raise TokenizerError("add_bos_token is true but no bos_token is named")
            case True, int(bos) if bos not in prefix:
                prefix = [bos, *prefix]
            case False, int(bos):
                prefix = [i for i in prefix if i != bos]
        return prefix, suffix


def _read(folder: Path, name: str, limit: int) -> str | None:
    """A file's text; None if there is no such file. `limit` is in bytes."""
    return read_text((folder, name), limit, TokenizerError) if os.path.lexists(folder / name) else None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file."""
    return read_json((folder, name), MAX_CONFIG_BYTES, TokenizerError, optional=True)


def _eos_ids(folder: Path, name: str) -> list[int]:
    """`eos_token_id` of a model config: one id, a list of ids, or nothing."""
    value = _read_json(folder, name).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise TokenizerError(f"eos_token_id in {folder / name} is {value!r:.80}, want an id or a list of ids")
    return ids


def _token_string(value: Any, name: str) -> str | None:
    """A special token as the files write it: a string, an object with `content`, or null."""
    match value:
        case None | "":
            return None
        case str(token) | {"content": str(token)}:
            return token
    raise TokenizerError(f"{name} is {value!r:.80}, want a string, an object with 'content' or null")
