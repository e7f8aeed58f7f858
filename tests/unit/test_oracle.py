# SPDX-License-Identifier: Apache-2.0
"""The oracle against transformers, in float64, and its checkpoints against what readers expect."""

import copy
import json
import random

import oracle
import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
from transformers.models.llama import modeling_llama  # noqa: E402

ROPES = {
    "plain": None,
    "llama3": oracle.LLAMA3_ROPE,
    "llama3_other": {**oracle.LLAMA3_ROPE, "factor": 4.0, "high_freq_factor": 3.0},
}
IDS = torch.randint(4, 320, (90,), generator=torch.Generator().manual_seed(0)).tolist()


def theirs(config: dict, weights: dict) -> torch.nn.Module:
    """Built from a copy: LlamaConfig writes into the rope dict it is given."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**copy.deepcopy(config), attn_implementation="sdpa"))
    model = model.to(torch.float64).eval()
    missing = model.load_state_dict({k: v.double() for k, v in weights.items()}, strict=False)
    assert missing.unexpected_keys == [] and set(missing.missing_keys) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model


def in_double(monkeypatch) -> None:
    """transformers keeps norms and rotary angles in FP32 whatever the model's type; lift both to FP64."""
    monkeypatch.setattr(
        modeling_llama.LlamaRMSNorm,
        "forward",
        lambda self, x: torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon),
    )

    def angles(self, x, position_ids):
        freqs = position_ids[..., None].double() * oracle.inverse_frequencies(self.config.oracle)
        both = torch.cat((freqs, freqs), dim=-1)
        return both.cos(), both.sin()

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", angles)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("heads,kv_heads,head_dim,tie", [(4, 2, 64, False), (4, 1, 80, True), (6, 6, 32, False)])
def test_forward_equals_transformers(tmp_path, monkeypatch, rope, heads, kv_heads, head_dim, tie):
    config, weights = oracle.random_checkpoint(
        1,
        tmp_path,
        model_type="llama",
        blocks=[(kv_heads, 96)] * 3,
        heads=heads,
        head_dim=head_dim,
        tie=tie,
        rope_scaling=ROPES[rope],
        dtype=torch.float32,
    )
    model = theirs(config, weights)
    ours = oracle.forward(config, weights, IDS)
    with torch.no_grad():
        as_is = model(torch.tensor([IDS])).logits[0]
        model.model.rotary_emb.config.oracle = config
        in_double(monkeypatch)
        double = model(torch.tensor([IDS])).logits[0]
    assert ours.dtype == double.dtype == torch.float64
    torch.testing.assert_close(ours, as_is, rtol=1e-4, atol=2e-4)  # FP32 norms and angles inside transformers
    torch.testing.assert_close(ours, double, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_equal_transformers(rope):
    config = {"hidden_size": 512, "num_attention_heads": 4, "rope_theta": 5e5, "rope_scaling": ROPES[rope]}
    rotary = modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**copy.deepcopy(config)))
    ours = oracle.inverse_frequencies(config)
    torch.testing.assert_close(ours, rotary.inv_freq.double(), rtol=1e-6, atol=0)  # theirs is FP32


def test_biases_and_wide_heads_equal_transformers(tmp_path, monkeypatch):
    config, weights = oracle.random_checkpoint(
        2, tmp_path, model_type="llama", blocks=[(2, 96)] * 2, hidden_size=192, attention_bias=True, dtype=torch.float64
    )
    for i in range(2):
        for name, rows in {"q": 256, "k": 128, "v": 128, "o": 192}.items():
            weights[f"model.layers.{i}.self_attn.{name}_proj.bias"] = torch.randn(rows, dtype=torch.float64)
    model = theirs(config, weights)
    model.model.rotary_emb.config.oracle = config
    in_double(monkeypatch)
    with torch.no_grad():
        double = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(oracle.forward(config, weights, IDS), double, rtol=1e-9, atol=1e-9)


def test_nemotron_equals_llama_where_all_blocks_are_alike(tmp_path):
    """The same weights read through block_configs: both FFN schemas, width 512 at hidden 256."""
    for ffn in (512, 3.0):
        config, weights = oracle.random_checkpoint(3, tmp_path, blocks=[(2, ffn)] * 2)
        llama = {**config, "block_configs": None, "num_key_value_heads": 2, "intermediate_size": 512}
        assert torch.equal(oracle.forward(config, weights, IDS), oracle.forward(llama, weights, IDS))


def test_linear_and_absent_parts(tmp_path):
    """A block with identity maps adds its normed input; an absent part adds nothing and has no weights."""
    blocks = [(None, None), ("linear", None), (None, "linear")]
    config, weights = oracle.random_checkpoint(4, tmp_path, blocks=blocks)
    eye = torch.eye(256, dtype=torch.bfloat16)
    weights["model.layers.1.self_attn.linear_attn.weight"] = eye
    weights["model.layers.2.mlp.linear_mlp.weight"] = eye
    assert sorted(n for n in weights if "layers" in n) == [
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.linear_attn.weight",
        "model.layers.2.mlp.linear_mlp.weight",
        "model.layers.2.post_attention_layernorm.weight",
    ]
    x = weights["model.embed_tokens.weight"].double()[IDS]
    for norm in ("model.layers.1.input_layernorm", "model.layers.2.post_attention_layernorm"):
        x = x + torch.nn.functional.rms_norm(x, (256,), weights[f"{norm}.weight"].double(), 1e-5)
    x = torch.nn.functional.rms_norm(x, (256,), weights["model.norm.weight"].double(), 1e-5)
    want = x @ weights["lm_head.weight"].double().T
    torch.testing.assert_close(oracle.forward(config, weights, IDS), want, rtol=1e-9, atol=1e-9)


def test_rounded_width():
    """Widths of the released models."""
    pairs = [(5.25, 28672), (3.28125, 17920), (2.625, 14336), (1.3125, 7168), (1.0, 5632), (0.5, 2816)]
    assert [oracle.rounded_width(mult, 8192) for mult, _ in pairs] == [width for _, width in pairs]
    assert oracle.rounded_width(39.0, 16384) == 425984


@pytest.mark.parametrize("seed", range(6))
def test_random_checkpoints_are_lively(tmp_path, seed):
    """Random block lists, types and shards: files hold what is returned; logits spread, but not one-hot."""
    dtype = (torch.bfloat16, torch.float16, torch.float32)[seed % 3]
    config, weights = oracle.random_checkpoint(
        seed,
        tmp_path,
        heads=(4, 6, 2)[seed % 3],
        tie=seed == 5,
        head_dim=(64, 80, 96, 128)[seed % 4],
        dtype=dtype,
        shards=1 + seed % 3,
    )
    stored = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[k], weights[k]) and stored[k].dtype == dtype for k in stored)
    if seed % 3:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(weights)
        assert set(index["weight_map"].values()) == {f.name for f in tmp_path.glob("model-*.safetensors")}
    logits = oracle.forward(config, weights, IDS[:24])
    assert logits.isfinite().all() and 1.5 < float(logits.std()) < 6
    assert oracle.greedy(config, weights, IDS[:24], 2)[0] == int(logits[-1].argmax())


def test_every_kind_occurs_in_random_blocks():
    drawn = {part for seed in range(40) for block in oracle.random_blocks(random.Random(seed), 4) for part in block}
    assert drawn >= {1, 2, 4, 256, 1.3, "linear", None}
