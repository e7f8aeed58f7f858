# SPDX-License-Identifier: Apache-2.0
"""A model's structure as plain data: what `inspect` prints, plots and writes as JSON. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_fast.blocks import Attention, Block, GatedMLP, Linear
from nemotron_fast.config import ModelConfig, read_config_json
from nemotron_fast.footprint import kv_bytes_per_token, param_bytes, weight_bytes_by_kind
from nemotron_fast.models import resolve_model
from nemotron_fast.quant_config import QuantConfig, parse_quant_config, read_quant_config
from nemotron_fast.sharding import Param, param_plan, parameter_counts

KV_DTYPES = ("bfloat16", "fp8")  # of the two KV sizes that are shown


@dataclass(frozen=True)
class Model:
    """What the small files of a checkpoint say."""

    name: str
    config: ModelConfig
    quant: QuantConfig | None


def read_model(path: str) -> Model:
    """The model in a checkpoint folder, in one config.json (any file name), or of a known name such as "demo".

    Raises:
        CheckpointError: no such folder or name. ConfigError: a config that cannot be read.
    """
    file = Path(path)
    if file.is_file() and file.name != "config.json":
        raw = read_config_json(file)
        return Model(file.stem, ModelConfig.from_hf(raw), parse_quant_config(raw))
    folder = file.parent if file.is_file() else resolve_model(path)
    return Model(folder.resolve().name, ModelConfig.from_path(folder), read_quant_config(folder))


def summarise(model: Model) -> dict[str, Any]:
    """Counts, sizes in bytes (of weights: without scales) and every block, JSON-able."""
    config = model.config
    blocks = [block_summary(model, block, params) for block, params in _params_of_blocks(config)]
    mixers = Counter(b["attention"]["kind"] for b in blocks)
    ffns = Counter(b["ffn"]["kind"] for b in blocks)
    widths = Counter(b["ffn"]["width"] for b in blocks if b["ffn"]["kind"] == "ffn")
    kv_heads = Counter(b["attention"]["kv_heads"] for b in blocks if b["attention"]["kind"] == "attention")
    return {
        "name": model.name,
        "model_type": config.model_type,
        "dtype": config.dtype,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position": config.max_position,
        "num_blocks": len(blocks),
        "attention_blocks": mixers["attention"],
        "linear_attention_blocks": mixers["linear"],
        "noop_attention_blocks": mixers["noop"],
        "ffn_blocks": ffns["ffn"],
        "linear_ffn_blocks": ffns["linear"],
        "noop_ffn_blocks": ffns["noop"],
        "empty_blocks": sum(b["attention"]["kind"] == b["ffn"]["kind"] == "noop" for b in blocks),
        "live_sub_blocks": len(config.sub_blocks),
        "ffn_widths": {str(width): widths[width] for width in sorted(widths)},
        "kv_heads": {str(heads): kv_heads[heads] for heads in sorted(kv_heads)},
        "parameters": parameter_counts(config),
        "quantization": None if model.quant is None else model.quant.method,
        "weight_bytes": _without_scales(weight_bytes_by_kind(config, quant=model.quant)),
        "weight_bytes_as": {
            "bfloat16": _without_scales(weight_bytes_by_kind(config, dtype="bfloat16")),
            "fp8": _without_scales(weight_bytes_by_kind(config, quantize="fp8")),
        },
        "kv_bytes_per_token": {name: kv_bytes_per_token(config, name) for name in KV_DTYPES},
        "blocks": blocks,
    }


def block_summary(model: Model, block: Block, params: list[Param]) -> dict[str, Any]:
    """One block: kinds, sizes, and the parameters and bytes (without scales) of its two halves."""

    def half(role: str) -> dict[str, int]:
        own = [p for p in params if p.name.split(".")[2] == role]
        return {
            "parameters": sum(p.numel for p in own),
            "bytes": sum(param_bytes(p, model.config, quant=model.quant)[0] for p in own),
        }

    attention: dict[str, Any] = {"kind": _kind(block.mixer)}
    if isinstance(block.mixer, Attention):
        attention |= {"kv_heads": block.mixer.num_kv_heads, "kv_slot": block.kv_slot}
    ffn: dict[str, Any] = {"kind": _kind(block.ffn)}
    if isinstance(block.ffn, GatedMLP):
        ffn["width"] = block.ffn.width
    attention |= half("mixer")
    ffn |= half("ffn")
    return {
        "index": block.index,
        "attention": attention,
        "ffn": ffn,
        "parameters": attention["parameters"] + ffn["parameters"],
        "bytes": attention["bytes"] + ffn["bytes"],
    }


def _kind(part: object) -> str:
    match part:
        case Attention():
            return "attention"
        case GatedMLP():
            return "ffn"
        case Linear():
            return "linear"
        case _:
            return "noop"


def _params_of_blocks(config: ModelConfig) -> list[tuple[Block, list[Param]]]:
    by_index: dict[int, list[Param]] = {block.index: [] for block in config.blocks}
    for param in param_plan(config):
        if param.name.startswith("blocks."):
            by_index[int(param.name.split(".")[1])].append(param)
    return [(block, by_index[block.index]) for block in config.blocks]


def _without_scales(by_kind: dict[str, int]) -> int:
    return sum(by_kind.values()) - by_kind["scales"]
