# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files -> ids and back: the real Llama-3 vocabulary, a small byte-fallback one, broken files."""

import json
from pathlib import Path

import packages
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors

from nemotron_fast.errors import RequestError
from nemotron_fast.tokenizer import Tokenizer, TokenizerError

BOS, EOT = 128000, 128009
CASES = [
    "",
    "Hello world!",
    "  leading, trailing  ",
    "I'LL say it's 1234567 o'clock",
    "日本語のテスト, 한국어, עברית",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈, e\u0301 and é",
    "a\r\n\n\n\tb \u00a0\u3000 c\x00\x7f",
]


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return Tokenizer.from_folder(packages.llama3_tokenizer_folder())


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(packages.llama3_tokenizer_folder() / "tokenizer.json"))


def tiny_backend() -> tokenizers.Tokenizer:
    """A Llama-2 style vocabulary: pieces with U+2581 for a space, and one token for each byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "a"), ("a", "b")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def write(folder: Path, backend: tokenizers.Tokenizer | None = None, **files: object) -> Path:
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def test_llama3_facts(llama):
    assert llama.vocab_size == 128256
    assert llama.bos_id == BOS and llama.pad_id == 128004
    assert llama.eos_ids == {128001, 128008, 128009}
    assert llama.special_ids == set(range(128000, 128256))
    assert llama.token_id("<|eot_id|>") == EOT and llama.token_id("<think>") is None
    assert llama.chat_template is None and llama.chat_templates == {}


def test_llama3_known_ids(llama):
    assert llama.encode("Hello world!") == [BOS, 9906, 1917, 0]
    assert llama.encode("Hello world!", add_special_tokens=False) == [9906, 1917, 0]
    assert llama.encode("<|eot_id|>\n\n", add_special_tokens=False) == [EOT, 271]


@pytest.mark.parametrize("text", CASES)
def test_round_trip(llama, library, text):
    assert llama.decode(llama.encode(text)) == text
    assert llama.encode(text) == library.encode(text).ids


def test_ids_equal_tiktoken(llama):
    tiktoken = pytest.importorskip("tiktoken")
    reference = tiktoken.Encoding(
        "llama3", pat_str=packages.LLAMA3_SPLIT, mergeable_ranks=packages.llama3_ranks(), special_tokens={}
    )

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=60))
    def check(text: str) -> None:
        assert llama.encode(text, add_special_tokens=False) == reference.encode_ordinary(text)

    check()


@pytest.mark.parametrize("skip", [True, False])
def test_decode_equals_library_on_random_ids(llama, library, skip):
    """Random ids are mostly not valid UTF-8 together: both must replace the same bytes."""
    partial = [i for i in range(0, 128000, 7) if b"\xef\xbf\xbd" in llama.token_text(i).encode()]
    assert len(partial) > 100

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.one_of(st.sampled_from(partial), st.integers(0, 128255)), max_size=12))
    def check(ids: list[int]) -> None:
        assert llama.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)

    check()


def test_never_a_double_bos(llama):
    text = "<|begin_of_text|><|start_header_id|>user"
    assert llama.encode(text) == llama.encode(text, add_special_tokens=False) == [BOS, 128006, 882]
    assert llama.encode("<|begin_of_text|>" * 3 + "Hello") == [BOS, 9906]
    assert llama.encode("<|begin_of_text|>" * 2, add_special_tokens=False) == [BOS, BOS]


@pytest.mark.parametrize("padding", [128256, 1 << 31, 1 << 40])
def test_ids_beyond_the_vocabulary_stand_for_nothing(llama, padding):
    first, *rest = llama.encode("👩", add_special_tokens=False)
    assert llama.decode([9906, first, padding, *rest, padding]) == "Hello👩"
    assert llama.token_bytes(padding) == b"" and llama.token_text(padding) == ""


def test_negative_ids_are_refused(llama):
    with pytest.raises(RequestError, match="token id -1 is not in the tokenizer's vocabulary"):
        llama.decode([9906, -1])


def test_text_that_is_no_text_is_refused(llama):
    with pytest.raises(RequestError, match="lone surrogate"):
        llama.encode("a\ud800")
    with pytest.raises(RequestError, match="is bytes, want str"):
        llama.encode(b"a")


def test_token_text_is_for_display(llama):
    first, *_ = llama.encode("👩", add_special_tokens=False)
    assert llama.token_text(first).endswith("\ufffd") and llama.token_bytes(first) in "👩 👩".encode()
    assert llama.token_text(1917) == " world" and llama.token_text(EOT) == "<|eot_id|>"


def test_byte_fallback_vocabulary(tmp_path):
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    tokenizer = Tokenizer.from_folder(write(tmp_path, tiny_backend(), tokenizer_config=tokens))
    ids = tokenizer.encode("ab é")
    assert ids[-2:] == [3 + 0xC3, 3 + 0xA9] and tokenizer.bos_id == 1 and tokenizer.eos_ids == {2}
    assert tokenizer.decode(ids) == "ab é" == tiny_backend().decode(ids)
    assert tokenizer.decode([1, *ids, 2]) == "ab é"
    assert tokenizer.decode([3 + 0xC3]) == "\ufffd"


@pytest.mark.parametrize(
    "add, start", [(None, [1]), (True, [1]), (False, [])], ids=["as the post-processor", "always", "never"]
)
def test_add_bos_token(tmp_path, add, start):
    backend = tiny_backend()
    if add is not True:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = {"bos_token": "<s>"} | ({} if add is None else {"add_bos_token": add})
    tokenizer = Tokenizer.from_folder(write(tmp_path, backend, tokenizer_config=config))
    plain = tokenizer.encode("ab", add_special_tokens=False)
    assert tokenizer.encode("ab") == start + plain


def test_truncation_and_padding_settings_of_the_file_have_no_effect(tmp_path):
    backend = tiny_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer.from_folder(write(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("a b a b")) == "a b a b"
    assert len(tokenizer.encode("a")) == 1


def test_special_tokens_map_fills_gaps(tmp_path):
    folder = write(
        tmp_path,
        tiny_backend(),
        tokenizer_config={"bos_token": None, "eos_token": "</s>"},
        special_tokens_map={"bos_token": {"content": "<s>"}, "eos_token": "<s>"},
        config={"eos_token_id": 77},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.bos_id == 1 and tokenizer.eos_ids == {2, 77}
    write(tmp_path, generation_config={"eos_token_id": [88, 89]})
    assert Tokenizer.from_folder(folder).eos_ids == {2, 88, 89}


def test_chat_template_sources(tmp_path):
    two = [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
    write(tmp_path, tiny_backend(), tokenizer_config={"chat_template": two, "bos_token": "<s>"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert sorted(tokenizer.chat_templates) == ["rag", "tool_use"]
    with pytest.raises(TokenizerError, match="none named 'default'"):
        _ = tokenizer.chat_template
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file", encoding="utf-8")
    template = Tokenizer.from_folder(tmp_path).chat_template
    assert template.render([{"role": "user", "content": "x"}]) == "<s>file"
    write(tmp_path, tokenizer_config={"chat_template": "string"})
    assert Tokenizer.from_folder(tmp_path).chat_template.source == "{{ bos_token }}file"
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.from_folder(tmp_path).chat_template.source == "string"


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer.json in .*: copy it from the original checkpoint$"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model alone is not enough"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer": "{"}, "tokenizer.json cannot be read"),
        ({"tokenizer": "{}"}, "tokenizer.json cannot be read"),
        ({"tokenizer_config": "[1]"}, "holds a list, want an object"),
        ({"tokenizer_config": "{"}, "is not JSON"),
        ({"tokenizer_config": "[" * 100_000}, "nested too deeply"),
        ({"tokenizer_config": {"bos_token": 3}}, "bos_token is 3, want a string"),
        ({"tokenizer_config": {"eos_token": "<nope>"}}, "eos_token '<nope>' is not in the vocabulary"),
        ({"tokenizer_config": {"add_bos_token": True}}, "add_bos_token is true but no bos_token"),
        ({"generation_config": {"eos_token_id": ["2"]}}, "eos_token_id in .* is \\['2'\\]"),
    ],
)
def test_broken_files(tmp_path, files, message):
    write(tmp_path, tiny_backend())
    write(tmp_path, **files)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_unknown_decoders_are_refused():
    backend = tiny_backend()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match=r"decoder \['WordPiece'\], want ByteLevel"):
        Tokenizer(backend)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json"]
)
def test_links_out_of_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, tiny_backend())
    (tmp_path / "secret").write_text((folder / "tokenizer.json").read_text() if name == "tokenizer.json" else "{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(TokenizerError, match="is a link out of its folder"):
        Tokenizer.from_folder(folder)
