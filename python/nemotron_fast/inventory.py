# SPDX-License-Identifier: Apache-2.0
"""Which tensors a checkpoint must hold, given its config and quantisation: the strict check before any loading.

Names of the scales (see `scale_name`, `kv_scale_names`): ModelOpt writes `X.weight_scale`, `X.input_scale` and
`self_attn.k_proj.k_scale`; compressed-tensors `X.weight_scale` [N, 1] and `self_attn.k_scale`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nemotron_fast.config import ModelConfig
from nemotron_fast.dtypes import FLOAT_BYTES, FP8, STORED_NAMES
from nemotron_fast.errors import CheckpointError, Problems
from nemotron_fast.footprint import scheme_of
from nemotron_fast.quant_config import QuantConfig
from nemotron_fast.sharding import param_plan

if TYPE_CHECKING:
    from nemotron_fast.checkpoint import Checkpoint

FLOATS = tuple(STORED_NAMES[name] for name in FLOAT_BYTES)
QUANTIZED = (STORED_NAMES[FP8],)
MOST_NAMES = 6  # of a list in a message
# Tables that some exporters store and that are computed here.
_ROTARY = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


@dataclass
class Want:
    """What is expected of one tensor."""

    shapes: tuple[tuple[int, ...], ...]  # any of these
    dtypes: tuple[str, ...] = FLOATS  # any of these


@dataclass
class Inventory:
    """Every name that a checkpoint must or may hold."""

    required: dict[str, Want] = field(default_factory=dict)
    one_of: list[tuple[str, ...]] = field(default_factory=list)  # spellings of one optional scalar: at most one


def scale_name(tensor: str, kind: str) -> str:
    """Name of the "weight_scale" or "input_scale" of the weight `tensor`."""
    return f"{tensor.removesuffix('.weight')}.{kind}"


def kv_scale_names(layer: int, which: str) -> tuple[str, ...]:
    """Spellings of the scale of the K or V cache (`which` is "k" or "v"); `kv_scale` is one for both."""
    attention = f"model.layers.{layer}.self_attn"
    spellings = (f"{which}_proj.{which}_scale", f"{which}_scale", f"attn.{which}_scale", f"qkv_proj.{which}_scale")
    return (*(f"{attention}.{spelling}" for spelling in spellings), f"{attention}.kv_scale")


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Rotary tables, and an lm_head stored beside the embedding that it is tied to: may be there, is not used."""
    return _ROTARY.fullmatch(name) is not None or (config.tie_word_embeddings and name == "lm_head.weight")


def check_inventory(checkpoint: Checkpoint, config: ModelConfig, quant: QuantConfig | None) -> None:
    """Require every expected tensor once, in the right shape and kind of dtype, and nothing else.

    Raises:
        CheckpointError: all that is missing, unexpected, misshaped or of a wrong dtype, in one message.
    """
    problems = Problems()
    inventory = _expected(config, quant, problems)
    optional = {name: Want(_SCALAR) for names in inventory.one_of for name in names}
    for names in inventory.one_of:
        found = [name for name in names if name in checkpoint]
        problems.require(len(found) <= 1, f"the same scale is there as {' and as '.join(found)}")
    known = optional | inventory.required
    present = [name for name in checkpoint.names if not is_ignored(name, config)]
    _add_list(problems, "missing tensors", [n for n in inventory.required if n not in checkpoint])
    _add_list(problems, "tensors that the config has no place for", [n for n in present if n not in known])
    shapes, dtypes = [], []
    for name in present:
        if (want := known.get(name)) is None:
            continue
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        if shape not in want.shapes:
            shapes.append(f"{name} {list(shape)}, want {list(want.shapes[0])}")
        if dtype not in want.dtypes:
            dtypes.append(f"{name} {dtype}, want {' or '.join(want.dtypes)}")
    _add_list(problems, "wrong shapes", shapes)
    hint = "no quantisation is configured" if quant is None else f"quantised as {quant.method}"
    _add_list(problems, f"wrong dtypes ({hint})", dtypes)
    problems.raise_if_any(CheckpointError, "the weights do not match config.json")


_SCALAR: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))


def _expected(config: ModelConfig, quant: QuantConfig | None, problems: Problems) -> Inventory:
    inventory = Inventory()
    for param in param_plan(config):
        schemes = [scheme_of(quant, param, piece) for piece in param.pieces]
        if len({scheme and scheme.activation for scheme in schemes}) > 1:
            parts = ", ".join(p.tensor for p in param.pieces)
            problems.add(f"{parts} share their input but not their quantisation")
        for piece, scheme in zip(param.pieces, schemes, strict=True):
            inventory.required[piece.tensor] = Want((piece.shape,), QUANTIZED if scheme else FLOATS)
            if scheme:
                channel = ((piece.shape[0], 1), (piece.shape[0],))
                scales = channel if scheme.weight == "channel" else _SCALAR
                inventory.required[scale_name(piece.tensor, "weight_scale")] = Want(scales)
            if scheme and scheme.activation == "static":
                inventory.required[scale_name(piece.tensor, "input_scale")] = Want(_SCALAR)
    if quant is not None:
        for sub in config.attention_blocks:
            inventory.one_of += [kv_scale_names(sub.index, which) for which in "kv"]
    return inventory


def _add_list(problems: Problems, what: str, items: list[str]) -> None:
    """One problem for a whole list, shortened."""
    if items:
        more = f" and {len(items) - MOST_NAMES} more" if len(items) > MOST_NAMES else ""
        problems.add(f"{len(items)} {what}: {', '.join(items[:MOST_NAMES])}{more}")
