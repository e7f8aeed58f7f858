# SPDX-License-Identifier: Apache-2.0
"""config.json of a `nemotron-nas`, `deci` or `llama` model -> one frozen, validated ModelConfig."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_fast.blocks import (
    WIDTH_MULTIPLE,
    Attention,
    Block,
    GatedMLP,
    SubBlock,
    live_sub_blocks,
    make_blocks,
    parse_ffn,
    parse_mixer,
)
from nemotron_fast.config_reader import ConfigReader, read_config_json, refuse_unsupported
from nemotron_fast.errors import ConfigError, Problems

MODEL_TYPES = ("nemotron-nas", "deci", "llama")
DTYPES = ("bfloat16", "float16", "float32")
MIN_HEAD_DIM, MAX_HEAD_DIM = 64, 128
MAX_LAYERS = 4096


@dataclass(frozen=True)
class Llama3Scaling:
    """The `llama3` RoPE rescale: long wavelengths divided by `factor`, short ones kept, a blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model that its config.json states. Sizes are plain (64-bit safe) Python ints."""

    model_type: str
    hidden_size: int  # E
    num_heads: int  # H
    head_dim: int  # D
    vocab_size: int  # V
    max_position: int  # tokens
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    dtype: str  # of the checkpoint: one of DTYPES
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def sub_blocks(self) -> tuple[SubBlock, ...]:
        """The live sub-blocks, in execution order."""
        return live_sub_blocks(self.blocks)

    @property
    def attention_blocks(self) -> tuple[SubBlock, ...]:
        """The live sub-blocks that own a KV slot, in slot order."""
        return tuple(s for s in self.sub_blocks if s.kv_slot is not None)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read a parsed config.json.

        Raises:
            ConfigError: naming every unsupported, missing or contradictory option at once.
        """
        if not isinstance(raw, dict):
            raise ConfigError(f"config.json holds a {type(raw).__name__}, want an object")
        problems = Problems()
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ConfigError(f"model_type is {model_type!r}, want one of {', '.join(MODEL_TYPES)}")
        refuse_unsupported(raw, problems)
        read = ConfigReader(raw, problems)
        hidden = read.integer("hidden_size")
        heads = read.integer("num_attention_heads")
        head_dim = raw.get("head_dim")
        if head_dim is None:
            problems.require(hidden % heads == 0, f"num_attention_heads={heads} does not divide hidden_size={hidden}")
            head_dim = hidden // heads
        else:
            head_dim = read.integer("head_dim")
        if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % WIDTH_MULTIPLE:
            problems.add(f"head_dim={head_dim}, want a multiple of {WIDTH_MULTIPLE} in {MIN_HEAD_DIM}..{MAX_HEAD_DIM}")
        problems.require(hidden % WIDTH_MULTIPLE == 0, f"hidden_size={hidden}, want a multiple of {WIDTH_MULTIPLE}")
        rope = _rope_fields(raw, problems)
        dtype = raw.get("torch_dtype") or raw.get("dtype") or "float32"
        problems.require(dtype in DTYPES, f"torch_dtype={dtype!r} is not supported, want one of {', '.join(DTYPES)}")
        vocab = read.integer("vocab_size")
        config = cls(
            model_type=model_type,
            hidden_size=hidden,
            num_heads=heads,
            head_dim=head_dim,
            vocab_size=vocab,
            max_position=read.integer("max_position_embeddings"),
            rope_theta=ConfigReader(rope, problems).number("rope_theta", default=10000.0),
            rope_scaling=_parse_rope_scaling(rope, problems),
            rms_norm_eps=read.number("rms_norm_eps", default=1e-6),
            tie_word_embeddings=read.boolean("tie_word_embeddings", default=False),
            dtype=dtype,
            bos_token_id=next(iter(read.token_ids("bos_token_id", vocab)), None),
            eos_token_ids=read.token_ids("eos_token_id", vocab),
            blocks=_parse_blocks(raw, read, hidden, heads, problems),
        )
        problems.raise_if_any(ConfigError, "config.json")
        return config

    @classmethod
    def from_path(cls, path: str | Path) -> ModelConfig:
        """Read config.json, given the file itself or the checkpoint folder that holds it."""
        return cls.from_hf(read_config_json(path))


_ROPE_KEYS = frozenset(
    {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"}
    | {"original_max_position_embeddings"}
)


def _rope_fields(raw: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """The RoPE options of both dialects (`rope_theta` + `rope_scaling`, or one `rope_parameters`) as one object."""
    fields: dict[str, Any] = {}
    sources = [(key, raw.get(key)) for key in ("rope_scaling", "rope_parameters") if raw.get(key) is not None]
    for key, value in [*sources, ("config.json", {"rope_theta": raw.get("rope_theta")})]:
        if not problems.require(isinstance(value, dict), f"{key} is {value!r}, want an object"):
            continue
        value = {name: v for name, v in value.items() if v is not None}
        if "type" in value:  # the older name
            value.setdefault("rope_type", value["type"])
            problems.require(value["type"] == value["rope_type"], f"{key}: type and rope_type differ")
        for name, v in value.items():
            problems.require(name in _ROPE_KEYS, f"{key}.{name}={v!r} is not supported")
            problems.require(fields.setdefault(name, v) == v, f"{key}.{name}={v!r} contradicts {fields[name]!r}")
    return fields


def _parse_rope_scaling(rope: dict[str, Any], problems: Problems) -> Llama3Scaling | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        extra = sorted(rope.keys() - {"rope_type", "type", "rope_theta"})
        problems.require(not extra, f"rope options {', '.join(extra)} need rope_type 'llama3'")
        return None
    if kind != "llama3":
        problems.add(f"rope_type={kind!r} is not supported, want 'llama3' or none")
        return None
    read = ConfigReader(rope, problems)
    scaling = Llama3Scaling(
        factor=read.number("factor"),
        low_freq_factor=read.number("low_freq_factor"),
        high_freq_factor=read.number("high_freq_factor"),
        original_max_position=read.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        problems.add(
            f"rope high_freq_factor={scaling.high_freq_factor} must exceed low_freq_factor={scaling.low_freq_factor}"
        )
    return scaling


def _parse_blocks(
    raw: dict[str, Any], read: ConfigReader, hidden: int, heads: int, problems: Problems
) -> tuple[Block, ...]:
    num_layers = read.integer("num_hidden_layers")
    problems.require(num_layers <= MAX_LAYERS, f"num_hidden_layers={num_layers}, want at most {MAX_LAYERS}")
    if raw["model_type"] == "llama":
        kv_heads = heads if raw.get("num_key_value_heads") is None else read.integer("num_key_value_heads")
        problems.require(
            heads % kv_heads == 0, f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}"
        )
        width = read.integer("intermediate_size")
        problems.require(width % WIDTH_MULTIPLE == 0, f"intermediate_size={width}, want a multiple of {WIDTH_MULTIPLE}")
        return make_blocks([(Attention(kv_heads), GatedMLP(width))] * min(num_layers, MAX_LAYERS))
    for key in ("num_key_value_heads", "intermediate_size"):
        problems.require(
            raw.get(key) is None, f"{key}={raw.get(key)!r} must be null: block_configs states it per block"
        )
    entries = raw.get("block_configs")
    if not isinstance(entries, list):
        problems.add(f"block_configs is {type(entries).__name__}, want a list of {num_layers} blocks")
        return ()
    problems.require(
        len(entries) == num_layers, f"block_configs has {len(entries)} entries, want num_hidden_layers={num_layers}"
    )
    pairs = []
    for index, entry in enumerate(entries):
        where = f"block_configs[{index}]"
        if not isinstance(entry, dict) or not {"attention", "ffn"} <= entry.keys():
            problems.add(f"{where} must be an object with attention and ffn")
            continue
        for key, value in entry.items():
            problems.require(key in ("attention", "ffn") or not value, f"{where}.{key}={value!r} is not supported")
        mixer = parse_mixer(entry["attention"], heads, f"{where}.attention", problems)
        pairs.append((mixer, parse_ffn(entry["ffn"], hidden, f"{where}.ffn", problems)))
    return make_blocks(pairs)
