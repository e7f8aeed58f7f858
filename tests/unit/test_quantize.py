# SPDX-License-Identifier: Apache-2.0
"""quantise: the rounding of one tensor; a checkpoint that loads as if it were quantised on load; no leftovers."""

import dataclasses
import json

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nemotron_fast import quantize as module
from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CapacityError, CheckpointError, NemotronFastError
from nemotron_fast.quant_config import Fp8Scheme, read_quant_config
from nemotron_fast.quantize import quantize_checkpoint, quantize_tensor_fp8
from nemotron_fast.weights import load_weights

BLOCKS = [(2, 256), ("linear", None), (None, "linear"), (4, 512)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tensors(value):
    """Every tensor in the weights, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [t for part in value for t in tensors(part)] if isinstance(value, list) else []


# ---- one tensor


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9), st.integers(0, 40), st.integers(-30, 30), st.sampled_from(DTYPES), st.integers(0, 99))
def test_tensor(n, k, exponent, dtype, seed):
    """Error at most half a step: 1/16 of the value, or half of the least subnormal (2^-10), times the scale."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).mul(2.0**exponent).to(dtype)
    w = torch.where(torch.isfinite(w), w, torch.ones_like(w))
    fp8, scale = quantize_tensor_fp8(w)
    assert fp8.dtype == torch.float8_e4m3fn and fp8.shape == w.shape
    assert scale.dtype == torch.float32 and scale.shape == (n,) and torch.isfinite(scale).all() and (scale > 0).all()
    exact, back = w.double(), fp8.double() * scale.double()[:, None]
    bound = torch.maximum(exact.abs() / 16, scale.double()[:, None] * 2**-10) * (1 + 1e-6)
    assert ((back - exact).abs() <= bound).all()
    if k:
        assert (fp8.double().abs().amax(1)[(w != 0).any(1)] == 448).all()


def test_special_rows():
    w = torch.zeros(4, 8)
    w[1] = 1e-45  # the least float32
    w[2] = torch.finfo(torch.float32).max
    w[3, 0] = -3.0
    fp8, scale = quantize_tensor_fp8(w)
    assert scale[0] == 1 and (scale > 0).all() and torch.isfinite(fp8.float()).all()
    assert (fp8[2].float() == 448).all() and fp8[3, 0].float() == -448
    assert scale[3] == torch.tensor(3.0) / 448
    fp8, scale = quantize_tensor_fp8(torch.tensor([[1.0, 448.0]]))
    assert fp8.float().tolist() == [[1, 448]] and scale.tolist() == [1]


# ---- a checkpoint


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "src"
    config, weights = oracle.random_checkpoint(0, folder, blocks=BLOCKS)
    return folder, config, weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards,tie", [(1, False), (3, True)])
def test_loads_as_quantised_on_load(tmp_path, dtype, shards, tie):
    src, dst = tmp_path / "src", tmp_path / "dst"
    oracle.random_checkpoint(1, src, blocks=BLOCKS, dtype=dtype, shards=shards, tie=tie)
    seen: list[tuple[int, int]] = []
    quantize_checkpoint(src, dst, shard_bytes=300_000 if shards > 1 else 1 << 30, progress=lambda *s: seen.append(s))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert (dst / "model.safetensors").exists() == (shards == 1)
    config, quant = ModelConfig.from_path(dst), read_quant_config(dst)
    assert quant.scheme_for("model.layers.0.mlp.up_proj") == Fp8Scheme("channel", "dynamic")
    for rank, size in ((0, 1), (1, 2)):
        written = load_weights(dst, config, quant, rank=rank, size=size)
        on_load = load_weights(src, ModelConfig.from_path(src), quantize="fp8", rank=rank, size=size)
        for a, b in zip(tensors(written), tensors(on_load), strict=True):
            assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_layout_of_the_files(source, tmp_path):
    src, config, weights = source
    quantize_checkpoint(src, tmp_path / "dst")
    stored = load_file(tmp_path / "dst" / "model.safetensors")
    for name, weight in weights.items():
        if weight.ndim == 1 or name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(stored.pop(name), weight)
            continue
        fp8, scale = quantize_tensor_fp8(weight)
        assert torch.equal(stored.pop(name).view(torch.uint8), fp8.view(torch.uint8))
        assert torch.equal(stored.pop(name.replace(".weight", ".weight_scale")), scale[:, None])
    assert not stored
    written = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert written.pop("quantization_config")["format"] == "float-quantized" and written == config


def test_shards_and_index(source, tmp_path):
    src, *_ = source
    quantize_checkpoint(src, tmp_path / "dst", shard_bytes=200_000)
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    held = {name: load_file(tmp_path / "dst" / file) for file in files for name in [file]}
    assert {n: f for f, part in held.items() for n in part} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for part in held.values() for t in part.values())
    assert all(sum(t.nbytes for t in part.values()) <= 200_000 for part in held.values())


def test_copies_what_belongs_to_the_model(source, tmp_path):
    src, *_ = source
    copied = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"]
    for name in [*copied, "pytorch_model.bin", "optimizer.pt", "README.md", "model.gguf"]:
        (src / name).write_text(name)
    quantize_checkpoint(src, tmp_path / "dst")
    there = {p.name for p in (tmp_path / "dst").iterdir()}
    assert there == {*copied, "config.json", "model.safetensors"}
    assert (tmp_path / "dst" / "LICENSE").read_text() == "LICENSE"


def test_empty_destination_is_used(source, tmp_path):
    (tmp_path / "dst").mkdir()
    quantize_checkpoint(source[0], tmp_path / "dst")
    assert (tmp_path / "dst" / "model.safetensors").exists()


# ---- what is refused, and leaves nothing behind


def refuses(match, src, dst, error=CheckpointError, **kwargs):
    before = sorted(p for p in src.parent.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        quantize_checkpoint(src, dst, **kwargs)
    assert sorted(p for p in src.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)


def test_bad_destinations(source, tmp_path):
    src, *_ = source
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "link").symlink_to(src)
    refuses("inside", src, src)
    refuses("inside", src, src / "fp8")
    refuses("inside", src, tmp_path / "link" / "fp8")
    refuses("not an empty folder", src, tmp_path / "full")
    refuses("not an empty folder", src, tmp_path / "full" / "x")
    refuses("create it first", src, tmp_path / "no" / "where")


def test_quantised_source(source, tmp_path):
    quantize_checkpoint(source[0], tmp_path / "once")
    refuses("quantised already", tmp_path / "once", tmp_path / "twice")


def test_nan_in_the_source(source, tmp_path):
    src, _, weights = source
    for name in ("model.layers.3.mlp.up_proj.weight", "model.norm.weight"):
        saved = weights[name].clone()
        weights[name].view(-1)[7] = float("nan")
        save_file(weights, src / "model.safetensors")
        refuses(f"{name} holds NaN or infinity", src, tmp_path / "dst")
        weights[name] = saved


def test_broken_source(source, tmp_path):
    src, _, weights = source
    save_file({n: w for n, w in weights.items() if n != "model.norm.weight"}, src / "model.safetensors")
    refuses("missing", src, tmp_path / "dst")
    (src / "config.json").unlink()
    refuses(r"config\.json", src, tmp_path / "dst", error=NemotronFastError)


def test_copied_link_out_of_the_folder(source, tmp_path):
    src, *_ = source
    (tmp_path / "secret").write_text("secret")
    (src / "tokenizer.json").symlink_to(tmp_path / "secret")
    refuses("link out of its folder", src, tmp_path / "dst")


def test_full_disk(source, tmp_path, monkeypatch):
    src, *_ = source
    usage = module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    refuses("GB free", src, tmp_path / "dst", error=CapacityError)


@pytest.mark.parametrize(
    "error,becomes",
    [(OSError(28, "No space left on device"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_interrupted(source, tmp_path, monkeypatch, error, becomes):
    src, *_ = source
    calls = []

    def write(self, *args):
        calls.append(args)
        if len(calls) > 9:
            raise error

    monkeypatch.setattr(module.Writer, "write", write)
    refuses("No space" if becomes is CheckpointError else None, src, tmp_path / "dst", error=becomes)
