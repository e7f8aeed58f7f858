# SPDX-License-Identifier: Apache-2.0
"""Checkpoint: reads exactly; missing, misplaced and contradictory files end in one clear CheckpointError."""

import json
import os
import pathlib
import pickle

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_fast.checkpoint import CHUNK_ELEMENTS, Checkpoint
from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CheckpointError
from nemotron_fast.sharding import Span

BLOCKS = [(2, 256), ("linear", None), (None, "linear"), (4, 512)]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path):
    config, weights = oracle.random_checkpoint(0, tmp_path, blocks=BLOCKS)
    return tmp_path, ModelConfig.from_hf(config), weights


@pytest.fixture
def sharded(tmp_path):
    config, weights = oracle.random_checkpoint(0, tmp_path, blocks=BLOCKS, shards=3)
    return tmp_path, ModelConfig.from_hf(config), weights


def fails(match: str, folder: pathlib.Path) -> str:
    """Opening raises one CheckpointError of one line."""
    with pytest.raises(CheckpointError, match=match) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_index(folder: pathlib.Path, **changes: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    for name, file in changes.items():
        index["weight_map"].pop(name, None) if file is None else index["weight_map"].update({name: file})
    (folder / INDEX).write_text(json.dumps(index))


# ---- reading


@pytest.mark.parametrize("which", ["single", "sharded"])
def test_reads_what_was_written(which, request):
    folder, config, weights = request.getfixturevalue(which)
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.check(config)
        assert sorted(checkpoint.names) == sorted(weights)
        for name, weight in weights.items():
            assert checkpoint.shape(name) == tuple(weight.shape) and checkpoint.dtype(name) == "BF16"
            assert torch.equal(checkpoint.read(name), weight)
        q = weights["model.layers.0.self_attn.q_proj.weight"]
        part = checkpoint.read("model.layers.0.self_attn.q_proj.weight", Span(3, 70), Span(64, 65))
    assert torch.equal(part, q[3:70, 64:65])  # valid after close
    assert checkpoint.read("model.norm.weight", Span(5, 5)).shape == (0,)


def test_reads_in_chunks(tmp_path):
    weight = torch.randn(70, CHUNK_ELEMENTS // 16)
    save_file({"w": weight, "s": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for rows, cols in ((None, None), (Span(3, 50), None), (None, Span(10, 90)), (Span(3, 3), None), (None, Span(4, 4))):
        chunks = list(checkpoint.read_chunks("w", rows, cols))
        want = weight[slice(None) if rows is None else slice(rows.start, rows.stop)]
        want = want if cols is None else want[:, cols.start : cols.stop]
        assert sum(chunk.numel() for _, chunk in chunks) == want.numel()
        assert all(chunk.numel() <= CHUNK_ELEMENTS for _, chunk in chunks)
        if chunks:
            assert torch.equal(torch.cat([chunk for _, chunk in chunks]), want)
    assert checkpoint.read("s").item() == 3.0


def test_changed_after_open(single):
    folder, *_ = single
    checkpoint = Checkpoint.open(folder)
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"cannot read model\.norm\.weight"):
        checkpoint.read("model.norm.weight")


# ---- files


def test_no_folder_no_weights(tmp_path):
    fails("is not a folder", tmp_path / "nothing")
    fails(r"neither model\.safetensors nor", tmp_path)


def test_pickles_are_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    fails("pickles .*never read; convert", tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_truncated_shard(sharded, keep):
    folder, *_ = sharded
    shard = folder / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:keep])
    message = fails("truncated|holds", folder)
    assert shard.name in message and "00001" not in message


def test_trailing_bytes(single):
    with (single[0] / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    fails("its header says", single[0])


def test_shard_listed_but_missing(sharded):
    (sharded[0] / "model-00003-of-00003.safetensors").unlink()
    fails(r"model-00003-of-00003\.safetensors is missing", sharded[0])


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "sub/x", "", ".", "..", "a\\b", "x\0y"])
def test_index_pointing_outside(sharded, name):
    folder, *_ = sharded
    (folder.parent / "evil.safetensors").write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    edit_index(folder, **{"model.norm.weight": name})
    fails("plain name", folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00003.safetensors"])
def test_symlink_out_of_the_folder(tmp_path, name):
    folder = tmp_path / "model"
    oracle.random_checkpoint(0, folder, blocks=BLOCKS, shards=1 if name == "model.safetensors" else 3)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    fails("link out of its folder", folder)


def test_links_of_a_hugging_face_cache(tmp_path):
    folder, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    _, weights = oracle.random_checkpoint(0, folder, blocks=BLOCKS)
    blobs.mkdir()
    (folder / "model.safetensors").rename(blobs / "0123")
    (folder / "model.safetensors").symlink_to("../../blobs/0123")
    assert len(Checkpoint.open(folder).names) == len(weights)


def test_link_loops_and_long_names(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for name in ("a", "x" * 5000):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
        fails("cannot follow|missing", tmp_path)


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    fails("not a regular file", tmp_path)


def test_both_layouts(sharded):
    save_file({"a": torch.zeros(1)}, sharded[0] / "model.safetensors")
    fails("has both", sharded[0])


def test_duplicate_over_shards(sharded):
    folder, _, weights = sharded
    shard = folder / "model-00002-of-00003.safetensors"
    save_file(load_file(shard) | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"]}, shard)
    fails(r"00002.*another shard also holds: model\.embed_tokens\.weight", folder)


def test_index_and_shards_disagree(sharded):
    folder, *_ = sharded
    edit_index(folder, **{"model.norm.weight": None, "ghost": "model-00001-of-00003.safetensors"})
    message = fails("2 problems", folder)
    assert "lacks tensors that the index lists in it: ghost" in message
    assert "holds tensors that the index does not list in it: model.norm.weight" in message


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "{", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "f", "a": "f"}}', "[" * 100000, "\xff"],
)
def test_broken_index(tmp_path, text):
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    fails("JSON|weight_map", tmp_path)
