# SPDX-License-Identifier: Apache-2.0
"""The strict inventory: all that is missing, unexpected, misshaped or of a wrong dtype, in one error."""

import pathlib

import oracle
import pytest
import torch
from safetensors.torch import save_file

from nemotron_fast.checkpoint import Checkpoint
from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CheckpointError
from nemotron_fast.quant_config import QuantConfig, parse_quant_config

BLOCKS = [(2, 256), ("linear", None), (None, "linear"), (4, 512)]
FP8 = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}


@pytest.fixture
def single(tmp_path):
    config, weights = oracle.random_checkpoint(0, tmp_path, blocks=BLOCKS)
    return tmp_path, ModelConfig.from_hf(config), weights


def fails(match: str, folder: pathlib.Path, config: ModelConfig, quant: QuantConfig | None = None) -> str:
    """The check raises one CheckpointError of one line."""
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=match) as caught:
        checkpoint.check(config, quant)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: pathlib.Path, weights: dict) -> None:
    save_file(weights, folder / "model.safetensors")


def test_all_problems_in_one_error(single):
    folder, config, weights = single
    del weights["model.layers.0.self_attn.k_proj.weight"]
    weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
    weights["model.norm.weight"] = torch.zeros(7).bfloat16()
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.float64)
    rewrite(folder, weights)
    message = fails("4 problems", folder, config)
    assert "1 missing tensors: model.layers.0.self_attn.k_proj.weight" in message
    assert "1 tensors that the config has no place for: model.layers.9.mlp.up_proj.weight" in message
    assert "model.norm.weight [7], want [256]" in message
    assert "lm_head.weight F64, want BF16 or F16 or F32" in message


def test_long_lists_are_shortened(single):
    folder, config, weights = single
    rewrite(folder, {"model.norm.weight": weights["model.norm.weight"]})
    message = fails(r"\d+ missing tensors: .* and \d+ more", folder, config)
    assert len(message) < 600


def test_bias_and_unused_norms_are_refused(single):
    folder, config, weights = single
    extra = ("model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight")
    rewrite(folder, weights | {name: torch.ones(256) for name in extra})
    assert all(name in fails("no place for", folder, config) for name in extra)


def test_rotary_tables_are_ignored(single):
    folder, config, weights = single
    rewrite(
        folder,
        weights
        | {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32),
            "model.rotary_emb.inv_freq": torch.zeros(32),
        },
    )
    Checkpoint.open(folder).check(config)


@pytest.mark.parametrize("stored", [False, True])
def test_tied_lm_head_may_be_stored(tmp_path, stored):
    config, weights = oracle.random_checkpoint(0, tmp_path, blocks=BLOCKS, tie=True)
    if stored:
        rewrite(tmp_path, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    Checkpoint.open(tmp_path).check(ModelConfig.from_hf(config))


def fp8_weights(weights: dict) -> dict:
    out = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and "layers" in name:
            base = name.removesuffix(".weight")
            out |= {
                name: weight.to(torch.float8_e4m3fn),
                f"{base}.weight_scale": torch.tensor(0.5),
                f"{base}.input_scale": torch.tensor([2.0]),
            }
        else:
            out[name] = weight
    return out


def test_fp8_scales(single):
    folder, config, weights = single
    quant = parse_quant_config({}, FP8)
    fails(r"wrong dtypes \(quantised as modelopt\).*want F8_E4M3", folder, config, quant)
    weights = fp8_weights(weights)
    rewrite(folder, weights)
    Checkpoint.open(folder).check(config, quant)
    fails(r"no place for.*wrong dtypes \(no quantisation is configured\)", folder, config)
    q = "model.layers.0.self_attn.q_proj"
    del weights[f"{q}.weight_scale"], weights[f"{q}.input_scale"]
    weights["model.layers.0.mlp.down_proj.weight_scale"] = torch.ones(2)
    weights["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(2, 2)
    rewrite(folder, weights)
    message = fails("3 problems", folder, config, quant)
    for part in (f"{q}.weight_scale", f"{q}.input_scale", "down_proj.weight_scale [2], want []", "weight_scale_inv"):
        assert part in message


@pytest.mark.parametrize("spelling", ["k_proj.k_scale", "k_scale", "attn.k_scale", "qkv_proj.k_scale", "kv_scale"])
def test_kv_scale_spellings(single, spelling):
    folder, config, weights = single
    name = f"model.layers.0.self_attn.{spelling}"
    rewrite(folder, fp8_weights(weights) | {name: torch.tensor(2.0)})
    Checkpoint.open(folder).check(config, parse_quant_config({}, FP8))
    other = "model.layers.0.self_attn." + ("k_scale" if spelling != "k_scale" else "kv_scale")
    rewrite(folder, fp8_weights(weights) | {name: torch.tensor(2.0), other: torch.tensor(2.0)})
    fails("the same scale is there as", folder, config, parse_quant_config({}, FP8))
    rewrite(folder, fp8_weights(weights) | {"model.layers.1.self_attn.k_scale": torch.tensor(2.0)})  # a linear block
    fails("no place for", folder, config, parse_quant_config({}, FP8))
    rewrite(folder, fp8_weights(weights) | {name: torch.ones(4)})  # one per head
    fails(r"wrong shapes.*\[4\]", folder, config, parse_quant_config({}, FP8))


def test_fused_projections_must_agree(single):
    folder, config, _ = single
    quant = parse_quant_config({}, {"quantization": FP8["quantization"] | {"exclude_modules": ["lm_head", "*k_proj"]}})
    fails("q_proj.weight, .*share their input but not their quantisation", folder, config, quant)
