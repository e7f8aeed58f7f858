# SPDX-License-Identifier: Apache-2.0
"""The header reader and the writer: hostile files end in one CheckpointError; the official reader agrees."""

import json
import pathlib
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nemotron_fast.checkpoint import Checkpoint
from nemotron_fast.errors import CheckpointError
from nemotron_fast.safetensors_file import MAX_HEADER_BYTES, TensorInfo, Writer, read_header


def fails(match: str, folder: pathlib.Path) -> str:
    """Opening raises one CheckpointError of one line."""
    with pytest.raises(CheckpointError, match=match) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_writer_is_read_by_safetensors(tmp_path):
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7).to(torch.float8_e4m3fn), "c": torch.randn(2, 1)}
    dtypes = {"a": "BF16", "b": "F8_E4M3", "c": "F32"}
    plan = {name: TensorInfo("", dtypes[name], tuple(t.shape)) for name, t in tensors.items()}
    writer = Writer(tmp_path / "x.safetensors", plan)
    writer.write("b", tensors["b"])
    writer.write("a", tensors["a"][1:], offset=10)
    writer.write("a", tensors["a"][:1])
    writer.write("c", tensors["c"])
    writer.close()
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n].view(torch.uint8), t.view(torch.uint8)) for n, t in tensors.items())
    assert read_header(tmp_path / "x.safetensors")["b"].shape == (7,)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header,size,match",
    [
        (b"", 0, "JSON"),
        (b"[]", 0, "want an object"),
        (b"{" * 100000, 0, "JSON"),
        (b'{"a": ' * 100000, 0, "JSON"),
        (b"\xff\xfe", 0, "JSON"),
        (b'{"a": 1, "a": 2}', 0, "twice"),
        ({"a": None}, 0, "exactly dtype, shape"),
        ({"a": {**ENTRY, "extra": 1}}, 8, "exactly dtype, shape"),
        ({"a": {**ENTRY, "dtype": "F31"}}, 8, "F31"),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, 8, "dtype"),
        ({"a": {**ENTRY, "shape": [-2]}}, 8, "want lists of sizes"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, 8, "want lists of sizes"),
        ({"a": {**ENTRY, "shape": [2.0]}}, 8, "want lists of sizes"),
        ({"a": {**ENTRY, "shape": [1] * 9 + [2]}}, 8, "want lists of sizes"),
        ({"a": {**ENTRY, "shape": [1 << 62, 1 << 62]}}, 8, "takes 8 bytes"),
        ({"a": {**ENTRY, "shape": [1 << 70]}}, 8, "want lists of sizes"),
        ({"a": {**ENTRY, "shape": [3]}}, 8, "takes 8 bytes, F32"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, 8, "takes -8 bytes"),
        ({"a": {**ENTRY, "data_offsets": [0, 8, 16]}}, 8, "want lists of sizes"),
        ({"a": {**ENTRY, "data_offsets": [8, 16]}}, 16, "starts at byte 8, want 0"),
        ({"a": ENTRY, "b": ENTRY}, 8, "overlap"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, 20, "hole"),
        ({"a": ENTRY}, 4, "download it again"),
    ],
)
def test_bad_headers(tmp_path, header, size, match):
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(header, b"\0" * size))
    fails(match, tmp_path)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_big_header_attack(tmp_path, length):
    """A sparse file of the claimed size: nothing of it may be read into memory."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", length) + b"{}")
        file.truncate(min(length + 8, 1 << 36))
    fails(f"header of {length} bytes", tmp_path)


EMPTY = {**ENTRY, "shape": [0], "data_offsets": [8, 8]}
GOOD = safetensors_bytes({"__metadata__": {"format": "pt"}, "w": ENTRY, "e": EMPTY}, b"\0" * 8)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200)
    | st.builds(
        lambda cut, at, junk: (GOOD[:at] + junk + GOOD[at + len(junk) :])[:cut],
        st.integers(0, len(GOOD)),
        st.integers(0, len(GOOD)),
        st.binary(max_size=6),
    )
)
@example(GOOD)
def test_fuzzed_files_are_read_or_refused(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    try:
        checkpoint = Checkpoint.open(tmp_path)
        for name in checkpoint.names:
            assert tuple(checkpoint.read(name).shape) == checkpoint.shape(name)
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert data != GOOD
