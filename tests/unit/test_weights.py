# SPDX-License-Identifier: Apache-2.0
"""load_weights: exact values, shards that add up to the whole, FP8 scales, bad numbers."""

import json

import oracle
import pytest
import torch
from safetensors.torch import save_file

from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CapacityError, CheckpointError, RequestError
from nemotron_fast.quant_config import parse_quant_config, read_quant_config
from nemotron_fast.weights import AttentionWeights, LinearWeight, MLPWeights, load_weights

BLOCKS = [(2, 256), ("linear", None), (None, "linear"), (4, 512)]
Q = "model.layers.0.self_attn.q_proj"


def make(folder, seed=0, **kwargs):
    config, weights = oracle.random_checkpoint(seed, folder, **kwargs)
    return ModelConfig.from_hf(config), weights


def make_fp8(folder, seed=0, blocks=None, method="modelopt", **extra):
    """A checkpoint with FP8 linears and scales that differ from tensor to tensor."""
    config, weights = oracle.random_checkpoint(seed, folder, blocks=blocks)
    stored, generator = {}, torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(shape, generator=generator) + 0.25

    for name, weight in weights.items():
        if weight.ndim == 1 or "layers" not in name:
            stored[name] = weight
            continue
        base = name.removesuffix(".weight")
        stored[name] = weight.to(torch.float8_e4m3fn)
        stored[f"{base}.weight_scale"] = uniform() if method == "modelopt" else uniform(weight.shape[0], 1).bfloat16()
        if method == "modelopt":
            stored[f"{base}.input_scale"] = uniform()
    save_file(stored | extra, folder / "model.safetensors")
    args = {"num_bits": 8, "type": "float"}
    group = {
        "targets": ["Linear"],
        "weights": {**args, "strategy": "channel"},
        "input_activations": {**args, "strategy": "token", "dynamic": True},
    }
    files = {
        "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        "compressed": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        },
    }
    config["quantization_config"] = files[method]
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_hf(config), read_quant_config(folder), stored | extra


def dense(linear: LinearWeight) -> torch.Tensor:
    """[N, K] float64."""
    w = linear.weight.double()
    return w if linear.weight_scale is None else w * linear.weight_scale.double().view(-1, 1)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def sub_named(model, config, index, role):
    return model.sub_blocks[[(sub.index, sub.role) for sub in config.sub_blocks].index((index, role))]


# ---- values


@pytest.mark.parametrize("seed", range(6))
def test_one_rank_holds_the_checkpoint(tmp_path, seed):
    config, weights = make(tmp_path, seed, shards=1 + seed % 3)
    model = load_weights(tmp_path, config)
    assert len(model.sub_blocks) == len(config.sub_blocks)
    assert same(model.embed, weights["model.embed_tokens.weight"])
    assert same(model.lm_head.weight, weights["lm_head.weight"])
    assert same(model.norm, weights["model.norm.weight"])
    for sub, loaded in zip(config.sub_blocks, model.sub_blocks, strict=True):
        layer = f"model.layers.{sub.index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        if isinstance(loaded, AttentionWeights):
            parts = {"qkv": [f"{attention}.{n}_proj" for n in "qkv"], "o": [f"{attention}.o_proj"]}
            assert (loaded.k_scale, loaded.v_scale) == (1.0, 1.0)
        elif isinstance(loaded, MLPWeights):
            parts = {"gate_up": [f"{mlp}.gate_proj", f"{mlp}.up_proj"], "down": [f"{mlp}.down_proj"]}
        else:
            parts = {"linear": [f"{attention}.linear_attn" if sub.role == "mixer" else f"{mlp}.linear_mlp"]}
        for name, tensors in parts.items():
            assert same(getattr(loaded, name).weight, torch.cat([weights[f"{t}.weight"] for t in tensors])), name
        norm = "input_layernorm" if sub.role == "mixer" else "post_attention_layernorm"
        assert same(loaded.norm, weights[f"{layer}.{norm}.weight"])
    assert model.nbytes == sum(w.nbytes for w in weights.values())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float32])
def test_conversion(tmp_path, stored, wanted):
    config, weights = make(tmp_path, blocks=BLOCKS, dtype=stored)
    model = load_weights(tmp_path, config, dtype=wanted)
    assert same(model.embed, weights["model.embed_tokens.weight"].to(wanted))
    assert same(model.sub_blocks[1].down.weight, weights["model.layers.0.mlp.down_proj.weight"].to(wanted))


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_tied_embedding_is_shared(tmp_path, quantize):
    config, weights = make(tmp_path, blocks=BLOCKS, tie=True)
    model = load_weights(tmp_path, config, quantize=quantize)
    assert model.lm_head.weight.data_ptr() == model.embed.data_ptr() and model.lm_head.weight_scale is None
    assert quantize or model.nbytes == sum(w.nbytes for w in weights.values())


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_progress(tmp_path, quantize):
    config, _ = make(tmp_path, blocks=BLOCKS)
    seen: list[tuple[int, int]] = []
    model = load_weights(tmp_path, config, quantize=quantize, progress=lambda *s: seen.append(s))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert 0 <= model.nbytes - seen[-1][1] < 0.05 * model.nbytes  # scales are not counted


# ---- tensor parallel


@pytest.mark.parametrize("kind", ["plain", "fp8 on load", "modelopt", "compressed"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("seed", [3, 22, 32])  # short random block lists
def test_ranks_add_up_to_the_whole(tmp_path, seed, size, kind):
    quant = None
    if kind in ("plain", "fp8 on load"):
        config, _ = make(tmp_path, seed)
    else:
        config, quant, _ = make_fp8(tmp_path, seed, method=kind)
    kwargs = {"quantize": "fp8"} if kind == "fp8 on load" else {}
    whole = load_weights(tmp_path, config, quant, **kwargs)
    ranks = [load_weights(tmp_path, config, quant, rank=r, size=size, **kwargs) for r in range(size)]
    assert same(torch.cat([r.embed for r in ranks]), whole.embed)
    assert same(torch.cat([r.lm_head.weight for r in ranks]), whole.lm_head.weight)
    for i, full in enumerate(whole.sub_blocks):
        parts = [r.sub_blocks[i] for r in ranks]
        assert all(same(p.norm, full.norm) for p in parts)
        if isinstance(full, AttentionWeights):
            check_attention(config, full, parts)
        elif isinstance(full, MLPWeights):
            gates, ups = zip(*(dense(p.gate_up).chunk(2) for p in parts), strict=True)
            assert torch.equal(torch.cat(gates + ups), dense(full.gate_up))
            check_columns(full.down, [p.down for p in parts])
        else:
            check_columns(full.linear, [p.linear for p in parts])


def check_columns(full: LinearWeight, parts: list[LinearWeight]) -> None:
    """Split along K: the weight comes back, and partial products add up to the product."""
    assert torch.equal(torch.cat([dense(p) for p in parts], dim=1), dense(full))
    x = torch.randn(3, full.weight.shape[1], dtype=torch.float64)
    pieces = x.split([p.weight.shape[1] for p in parts], dim=1)
    total = sum(piece @ dense(p).T for piece, p in zip(pieces, parts, strict=True))
    torch.testing.assert_close(total, x @ dense(full).T, rtol=1e-12, atol=1e-12)


def check_attention(config: ModelConfig, full: AttentionWeights, parts: list[AttentionWeights]) -> None:
    q_rows = config.num_heads * config.head_dim
    kv_rows = (full.qkv.weight.shape[0] - q_rows) // 2
    q, k, v = dense(full.qkv).split([q_rows, kv_rows, kv_rows])
    own_q = q_rows // len(parts)
    split = [dense(p.qkv).split([own_q, *[(p.qkv.weight.shape[0] - own_q) // 2] * 2]) for p in parts]
    assert torch.equal(torch.cat([s[0] for s in split]), q)
    own = split[:: max(1, len(parts) * config.head_dim // kv_rows)]  # one of the ranks that share a KV head
    assert torch.equal(torch.cat([s[1] for s in own]), k) and torch.equal(torch.cat([s[2] for s in own]), v)
    check_columns(full.o, [p.o for p in parts])


def test_ranks_without_a_share(tmp_path):
    """Width 256 over 4 ranks of 64 columns is the least; a vocabulary of 64 leaves three ranks empty."""
    config, _ = make(tmp_path, blocks=BLOCKS, vocab=64)
    assert [len(load_weights(tmp_path, config, rank=r, size=4).embed) for r in range(4)] == [64, 0, 0, 0]
    with pytest.raises(CapacityError, match="cannot be split"):
        load_weights(tmp_path, config, size=3)


# ---- FP8


def test_unequal_scales_dequantise_exactly(tmp_path):
    kv = {"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(1.5)}
    config, quant, stored = make_fp8(tmp_path, blocks=BLOCKS, **kv)
    model = load_weights(tmp_path, config, quant)
    attention = sub_named(model, config, 0, "mixer")
    names = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    want = torch.cat([stored[f"{n}.weight"].double() * stored[f"{n}.weight_scale"].double() for n in names])
    assert torch.equal(dense(attention.qkv), want)
    assert attention.qkv.weight_scale.shape == (want.shape[0],) and attention.qkv.weight.dtype == torch.float8_e4m3fn
    assert attention.qkv.input_scale.tolist() == [max(stored[f"{n}.input_scale"].item() for n in names)]
    assert attention.o.weight_scale.shape == (1,) and attention.o.input_scale.shape == (1,)
    assert (attention.k_scale, attention.v_scale) == (1.5, 1.0)
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.lm_head.weight_scale is None


def test_equal_scales_stay_one(tmp_path):
    same_scale = {f"model.layers.0.self_attn.{n}_proj.weight_scale": torch.tensor([0.5]) for n in "qkv"}
    config, quant, _ = make_fp8(tmp_path, blocks=BLOCKS, **same_scale)
    assert load_weights(tmp_path, config, quant).sub_blocks[0].qkv.weight_scale.tolist() == [0.5]


def test_per_channel_scales(tmp_path):
    config, quant, stored = make_fp8(tmp_path, blocks=BLOCKS, method="compressed")
    up_gate = sub_named(load_weights(tmp_path, config, quant), config, 0, "ffn").gate_up
    names = [f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up")]
    want = torch.cat([stored[n].double() * stored[f"{n}_scale"].double() for n in names])
    assert torch.equal(dense(up_gate), want) and up_gate.input_scale is None


def test_fp8_lm_head(tmp_path):
    scales = {"lm_head.weight_scale": torch.tensor(0.5), "lm_head.input_scale": torch.tensor(1.0)}
    ones = {"lm_head.weight": torch.ones(320, 256).to(torch.float8_e4m3fn)}
    config, _, _ = make_fp8(tmp_path, blocks=BLOCKS, **scales, **ones)
    quant = parse_quant_config({}, {"quantization": {"quant_algo": "FP8", "exclude_modules": []}})
    assert (dense(load_weights(tmp_path, config, quant).lm_head) == 0.5).all()


def test_quantise_on_load(tmp_path):
    config, weights = make(tmp_path, blocks=BLOCKS)
    qkv = sub_named(load_weights(tmp_path, config, quantize="fp8"), config, 0, "mixer").qkv
    want = torch.cat([weights[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"]).double()
    assert qkv.weight.dtype == torch.float8_e4m3fn and qkv.input_scale is None
    assert torch.equal(qkv.weight_scale, (want.abs().amax(1) / 448).float())
    assert ((dense(qkv) - want).abs() <= want.abs() / 16 + want.abs().amax(1, keepdim=True) * 2**-17).all()


def test_quantise_what_is_quantised(tmp_path):
    config, quant, _ = make_fp8(tmp_path / "a", blocks=BLOCKS)
    as_is, again = (load_weights(tmp_path / "a", config, quant, quantize=q) for q in (None, "fp8"))
    assert same(as_is.sub_blocks[0].qkv.weight, again.sub_blocks[0].qkv.weight)
    layers = {Q.replace("q_proj", f"{n}_proj"): {"quant_algo": "FP8"} for n in "qkv"}
    mixed = parse_quant_config({}, {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}})
    with pytest.raises(CheckpointError, match=r"3 of \d+ linears in FP8 already; leave quantize out"):
        load_weights(tmp_path / "a", config, mixed, quantize="fp8")


# ---- what is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
@pytest.mark.parametrize("name", [f"{Q}.weight_scale", f"{Q}.input_scale", "model.layers.0.self_attn.k_proj.k_scale"])
def test_bad_scales(tmp_path, name, bad):
    config, quant, _ = make_fp8(tmp_path, blocks=BLOCKS, **{name: torch.tensor(bad)})
    with pytest.raises(CheckpointError, match=rf"{name} is .*want finite and > 0"):
        load_weights(tmp_path, config, quant)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [f"{Q}.weight", "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_bad_weights(tmp_path, name, bad, quantize):
    config, weights = make(tmp_path, blocks=BLOCKS)
    weights[name].view(-1)[-1] = bad
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        load_weights(tmp_path, config, quantize=quantize)
    load_weights(tmp_path, config, quantize=quantize, verify=False)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_nan(tmp_path, code):
    config, quant, stored = make_fp8(tmp_path, blocks=BLOCKS)
    stored[f"{Q}.weight"].view(torch.uint8)[5, 6] = code
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{Q}.weight holds NaN"):
        load_weights(tmp_path, config, quant)


@pytest.mark.parametrize("verify", [True, False])
def test_overflow(tmp_path, verify):
    config, weights = make(tmp_path, blocks=BLOCKS, dtype=torch.float32)
    weights[f"{Q}.weight"][3, 4] = 1e5
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{Q}.weight overflows torch.float16 \(stored as torch.float32\)"):
        load_weights(tmp_path, config, dtype=torch.float16, verify=verify)
    load_weights(tmp_path, config, dtype=torch.bfloat16)


@pytest.mark.parametrize("kwargs", [{"dtype": torch.int8}, {"quantize": "int4"}])
def test_bad_arguments(tmp_path, kwargs):
    config, _ = make(tmp_path, blocks=BLOCKS)
    with pytest.raises(RequestError, match="want"):
        load_weights(tmp_path, config, **kwargs)


def test_refused_before_memory_is_allocated(tmp_path, monkeypatch):
    config, weights = make(tmp_path, blocks=BLOCKS)
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.setattr(torch, "empty", None)
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(tmp_path, config)
