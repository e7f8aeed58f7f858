# SPDX-License-Identifier: Apache-2.0
"""config.json -> block list: the real configs to the number, both schemas, and refusals by name."""

import copy
import json
import re
from pathlib import Path

import pytest

from nemotron_fast.blocks import Attention, GatedMLP, Linear, Skip, ffn_width
from nemotron_fast.config import Llama3Scaling, ModelConfig
from nemotron_fast.errors import ConfigError
from nemotron_fast.sharding import checkpoint_shapes, parameter_counts

CONFIGS = Path(__file__).parent.parent / "configs"


def raw(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def tiny(**changes) -> dict:
    block = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}
    return {
        "model_type": "nemotron-nas",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "max_position_embeddings": 512,
        "block_configs": [copy.deepcopy(block), copy.deepcopy(block)],
    } | changes


def test_super_49b():
    config = ModelConfig.from_hf(raw("super-49b-v1"))
    assert len(config.blocks) == 80
    without = [b.index for b in config.blocks if isinstance(b.mixer, Skip)]
    assert without == [6, 7, 11, *range(42, 52), *range(53, 71)] and len(without) == 31
    assert all(b.mixer == Attention(8) for b in config.blocks if b.kv_slot is not None)
    assert len(config.sub_blocks) == 129
    widths = {b.ffn.width for b in config.blocks}
    assert widths == {28672, 17920, 14336, 7168, 5632, 2816}
    assert parameter_counts(config)["total"] == 49_867_145_216
    assert len(checkpoint_shapes(config)) == 568
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192) and config.rope_theta == 500_000.0
    assert config.eos_token_ids == (128001, 128008, 128009) and config.head_dim == 128


def test_bench_step_has_the_blocks_of_super_49b() -> None:
    source = (CONFIGS.parent.parent / "bench/cpp/bench_step.cu").read_text()
    runs = re.findall(r"\{(\d+), (true|false), (\d+)\}", source)
    found = [(attends == "true", int(width)) for count, attends, width in runs for _ in range(int(count))]
    blocks = ModelConfig.from_hf(raw("super-49b-v1")).blocks
    assert found == [(isinstance(b.mixer, Attention), b.ffn.width) for b in blocks]


def test_ultra_253b():
    config = ModelConfig.from_hf(raw("ultra-253b-v1"))
    assert len(config.blocks) == 162
    empty = [b for b in config.blocks if isinstance(b.mixer, Skip) and isinstance(b.ffn, Skip)]
    assert (len(empty), len(config.attention_blocks), len(config.sub_blocks)) == (81, 64, 145)
    assert parameter_counts(config)["total"] == 253_401_268_224
    assert len(checkpoint_shapes(config)) == 647
    widest = max(checkpoint_shapes(config).values(), key=lambda s: s[0])
    assert widest == (425_984, 16_384)  # 6.98e9 elements: beyond 32 bits


def test_every_block_kind():
    config = ModelConfig.from_hf(raw("mini-all-blocks"))
    kinds = {type(b.mixer) for b in config.blocks} | {type(b.ffn) for b in config.blocks}
    assert kinds == {Attention, Linear, Skip, GatedMLP}
    assert {b.mixer.num_kv_heads for b in config.blocks if isinstance(b.mixer, Attention)} == {2, 4, 8}
    slots = [b.kv_slot for b in config.blocks if b.kv_slot is not None]
    assert slots == list(range(len(slots)))


@pytest.mark.parametrize("mult,hidden,width", [(0.5, 8192, 2816), (1.0, 8192, 5632), (39.0, 16384, 425_984)])
def test_ffn_width(mult, hidden, width):
    assert ffn_width(mult, hidden) == width


def test_both_ffn_schemas_and_uniform_llama():
    old = ModelConfig.from_hf(tiny())
    new = tiny()
    for block in new["block_configs"]:
        block["ffn"] = {"intermediate_size": 256, "hidden_act": "silu", "ffn_mult": None}
    assert ModelConfig.from_hf(new).blocks == old.blocks
    llama = tiny(model_type="llama", num_key_value_heads=2, intermediate_size=256)
    del llama["block_configs"]
    assert ModelConfig.from_hf(llama).blocks == old.blocks


def test_rope_parameters_dialect():
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 128
    old = ModelConfig.from_hf(tiny(rope_theta=1e4, rope_scaling=scaling))
    assert ModelConfig.from_hf(tiny(rope_parameters=scaling | {"rope_theta": 1e4})) == old


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', want one of"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 does not divide hidden_size=256"),
        ({"hidden_size": "256"}, "hidden_size is '256', want a positive integer"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"head_dim": 256}, "head_dim=256, want a multiple of 16 in 64..128"),
        ({"num_hidden_layers": 3}, "block_configs has 2 entries, want num_hidden_layers=3"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, want 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope options factor need rope_type 'llama3'"),
        ({"rope_scaling": {"rope_type": "default", "type": "linear"}}, "rope_scaling: type and rope_type differ"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5 is not"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5}, "rope_theta=500000.0 contradicts 10000.0"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers=100000, want at most 4096"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"sliding_window": 4096}, "unknown option sliding_window=4096"),
        ({"torch_dtype": "int8"}, "torch_dtype='int8'"),
        ({"eos_token_id": 100}, "eos_token_id is 100, want ids below vocab_size=100"),
        ({"intermediate_size": 512}, "intermediate_size=512 must be null"),
        ({"block_configs": None}, "block_configs is NoneType"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ],
)
def test_bad_options_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(tiny(**changes))


@pytest.mark.parametrize(
    "part,block,message",
    [
        ("attention", {"n_heads_in_group": 3}, "n_heads_in_group=3 does not divide num_attention_heads=4"),
        ("attention", {"n_heads_in_group": None}, "n_heads_in_group is None, want a positive integer"),
        ("attention", {"no_op": True, "replace_with_linear": True}, "both no_op and replace_with_linear"),
        ("attention", {"n_heads_in_group": 1, "window_length": 8}, r"\[1\].attention.window_length=8 is not supported"),
        ("attention", {"n_heads_in_group": 1, "mamba": {"x": 1}}, "mamba=.* is not supported"),
        ("attention", [], "attention is list, want an object"),
        ("ffn", {}, "neither ffn_mult nor intermediate_size"),
        ("ffn", {"ffn_mult": -1.0}, "ffn_mult is -1.0"),
        ("ffn", {"intermediate_size": 100}, "intermediate_size is 100, want a positive multiple of 16"),
        ("ffn", {"ffn_mult": 1.0, "intermediate_size": 512}, "contradicts ffn_mult=1.0, which gives 256"),
        ("ffn", {"ffn_mult": 1.0, "hidden_act": "relu"}, "hidden_act='relu'"),
        ("ffn", {"ffn_mult": 1.0, "gated": False}, "gated=False"),
        ("ffn", {"ffn_mult": 1.0, "moe": {"num_experts": 8}}, "moe=.* is not supported"),
    ],
)
def test_bad_blocks_are_refused_by_name(part, block, message):
    config = tiny()
    config["block_configs"][1][part] = block
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(config)


def test_one_error_lists_all_problems():
    with pytest.raises(ConfigError, match="3 problems: .*foo=1.*head_dim=60.*vocab_size is None"):
        ModelConfig.from_hf(tiny(foo=1, head_dim=60, vocab_size=None))


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*config.json: No such file"):
        ModelConfig.from_path(tmp_path)
    (tmp_path / "config.json").write_text("{nope")
    with pytest.raises(ConfigError, match="is not JSON"):
        ModelConfig.from_path(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="holds a list, want an object"):
        ModelConfig.from_path(tmp_path)
