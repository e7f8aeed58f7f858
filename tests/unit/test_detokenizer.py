# SPDX-License-Identifier: Apache-2.0
"""Streamed text equals the text of all tokens, for any tokens, and never holds half a character."""

import packages
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import tiny_backend

from nemotron_fast.detokenizer import IncrementalDecoder
from nemotron_fast.errors import RequestError
from nemotron_fast.tokenizer import Tokenizer

EOT = 128009
# Latin, CJK, emoji with joiners and flags, combining marks, spaces of all kinds.
ALPHABET = "ab Zé\u0301日本한ת🙂👩\u200d👧🏳\ufe0f🇩🇪\u00a0\u3000\n\t"


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return Tokenizer.from_folder(packages.llama3_tokenizer_folder())


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    return Tokenizer(tiny_backend(), {"bos_token": "<s>", "eos_token": "</s>"})


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@pytest.mark.parametrize("skip", [True, False])
def test_any_tokens_llama3(llama, skip):
    pieces_of_characters = [i for i in range(0, 128000, 5) if "\ufffd" in llama.token_text(i)]
    ids = st.one_of(st.sampled_from(pieces_of_characters), st.integers(0, llama.vocab_size - 1))

    @settings(max_examples=300, deadline=None)
    @given(st.lists(ids, max_size=20))
    def check(tokens: list[int]) -> None:
        assert "".join(stream(llama, tokens, skip)) == llama.decode(tokens, skip_special_tokens=skip)

    check()


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, 263), max_size=20), skip=st.booleans())
def test_any_tokens_byte_fallback(tokens, skip):
    tokenizer = Tokenizer(tiny_backend())
    assert "".join(stream(tokenizer, tokens, skip)) == tokenizer.decode(tokens, skip_special_tokens=skip)


def test_real_text_llama3(llama):
    @settings(max_examples=200, deadline=None)
    @given(st.text(ALPHABET, max_size=40))
    def check(text: str) -> None:
        pieces = stream(llama, llama.encode(text))
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)  # no half characters

    check()


def test_a_character_comes_with_its_last_token(llama):
    ids = llama.encode("👩", add_special_tokens=False)
    assert len(ids) > 1
    assert stream(llama, ids) == [""] * (len(ids) - 1) + ["👩", ""]


def test_an_open_character_shows_at_the_end(llama):
    ids = llama.encode("👩", add_special_tokens=False)[:-1]
    *pieces, last = stream(llama, ids)
    assert "".join(pieces) == "" and last == "\ufffd" == llama.decode(ids)


def test_leading_space(llama, fallback):
    assert stream(llama, [1917]) == [" world", ""]
    space_a = fallback.token_id("▁a")
    assert stream(fallback, [1, space_a, space_a]) == ["", "a", " a", ""]
    assert stream(fallback, [1, space_a], skip=False) == ["<s>", " a", ""]


def test_special_tokens(llama):
    assert stream(llama, [9906, EOT]) == ["Hello", "", ""]
    assert stream(llama, [9906, EOT], skip=False) == ["Hello", "<|eot_id|>", ""]
    decoder = IncrementalDecoder(llama, keep_ids=[EOT])
    assert [decoder.push(i) for i in (128000, 9906, EOT)] == ["", "Hello", "<|eot_id|>"]


def test_flush_makes_it_new(fallback):
    decoder = IncrementalDecoder(fallback)
    space_a = fallback.token_id("▁a")
    assert [decoder.push(space_a), decoder.push(3 + 0xC3), decoder.flush(), decoder.flush()] == ["a", "", "\ufffd", ""]
    assert decoder.push(space_a) == "a"


@pytest.mark.parametrize("skip", [True, False])
def test_ids_of_a_padded_vocabulary_change_nothing(llama, skip):
    first, *rest = llama.encode("👩", add_special_tokens=False)
    tokens = [128256, first, 130_000, *rest, 1 << 20]
    assert stream(llama, tokens, skip) == ["", "", "", *[""] * (len(rest) - 1), "👩", "", ""]


def test_a_refused_id_changes_nothing(llama):
    first, *rest = llama.encode("👩", add_special_tokens=False)
    decoder = IncrementalDecoder(llama)
    decoder.push(first)
    with pytest.raises(RequestError, match="token id -1"):
        decoder.push(-1)
    assert "".join(decoder.push(i) for i in rest) == "👩"


def test_mid_character(llama):
    ids = llama.encode("👩", add_special_tokens=False)
    decoder = IncrementalDecoder(llama)
    found = [(decoder.push(i), decoder.mid_character) for i in [9906, *ids]]
    assert found == [("Hello", False), *[("", True)] * (len(ids) - 1), ("👩", False)]
    decoder.push(ids[0])
    assert decoder.mid_character and decoder.flush() and not decoder.mid_character
