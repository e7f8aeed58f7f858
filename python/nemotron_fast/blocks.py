# SPDX-License-Identifier: Apache-2.0
"""The block list: what each of a model's layers is made of, as data.

A block is a mixer (attention, a square linear, or nothing) followed by an FFN (gated, a square linear, or
nothing); each has its own norm and is added to the residual stream. The runtime never walks blocks: it walks
the flat list of *live* sub-blocks, from which everything that does nothing has vanished.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemotron_fast.errors import Problems

WIDTH_MULTIPLE = 16  # widths and head sizes: what one tensor-core K step needs


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention with RoPE."""

    num_kv_heads: int  # K


@dataclass(frozen=True)
class Linear:
    """One bias-free [E, E] matrix in place of attention or of the FFN."""


@dataclass(frozen=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x))."""

    width: int  # F


@dataclass(frozen=True)
class Skip:
    """Nothing: no weights, no norm, the residual stream passes through."""


@dataclass(frozen=True)
class Block:
    index: int  # position in the checkpoint
    mixer: Attention | Linear | Skip
    ffn: GatedMLP | Linear | Skip
    kv_slot: int | None  # position in the KV cache; None unless the mixer is Attention


@dataclass(frozen=True)
class SubBlock:
    """One live step of the forward pass: norm, then `op`, then the residual add."""

    index: int  # of the block it belongs to
    role: str  # "mixer" or "ffn"
    op: Attention | Linear | GatedMLP
    kv_slot: int | None


def live_sub_blocks(blocks: tuple[Block, ...]) -> tuple[SubBlock, ...]:
    """The blocks without everything that does nothing, in execution order."""
    live: list[SubBlock] = []
    for block in blocks:
        if not isinstance(block.mixer, Skip):
            live.append(SubBlock(block.index, "mixer", block.mixer, block.kv_slot))
        if not isinstance(block.ffn, Skip):
            live.append(SubBlock(block.index, "ffn", block.ffn, None))
    return tuple(live)


def make_blocks(pairs: list[tuple[Attention | Linear | Skip, GatedMLP | Linear | Skip]]) -> tuple[Block, ...]:
    """Number the blocks and give each attention its KV slot."""
    blocks: list[Block] = []
    next_slot = 0
    for index, (mixer, ffn) in enumerate(pairs):
        slot = None
        if isinstance(mixer, Attention):
            slot, next_slot = next_slot, next_slot + 1
        blocks.append(Block(index, mixer, ffn, slot))
    return tuple(blocks)


def ffn_width(ffn_mult: float, hidden_size: int) -> int:
    """FFN width from `ffn_mult`: floor(2 * mult * E / 3) rounded up to 256.

    The formula of the published `configuration_decilm.py`; double precision, truncated.
    """
    raw = int(2 * ffn_mult * hidden_size / 3)
    return (raw + 255) // 256 * 256


def parse_mixer(cfg: Any, num_heads: int, where: str, problems: Problems) -> Attention | Linear | Skip:
    """Read one `attention` object of `block_configs`; what is wrong goes to `problems`."""
    if not _is_known(cfg, {"n_heads_in_group", "no_op", "replace_with_linear"}, where, problems):
        return Skip()
    kind = _special_kind(cfg, where, problems)
    if kind is not None:
        return kind
    group = cfg.get("n_heads_in_group")
    if not _is_positive_int(group):
        problems.add(f"{where}.n_heads_in_group is {group!r}, want a positive integer (or no_op / replace_with_linear)")
    elif num_heads % group:
        problems.add(f"{where}.n_heads_in_group={group} does not divide num_attention_heads={num_heads}")
    else:
        return Attention(num_heads // group)
    return Skip()


def parse_ffn(cfg: Any, hidden_size: int, where: str, problems: Problems) -> GatedMLP | Linear | Skip:
    """Read one `ffn` object, in either schema: `ffn_mult`, or `intermediate_size` (with `hidden_act`)."""
    keys = {"ffn_mult", "intermediate_size", "hidden_act", "gated", "no_op", "replace_with_linear"}
    if not _is_known(cfg, keys, where, problems):
        return Skip()
    kind = _special_kind(cfg, where, problems)
    if kind is not None:
        return kind
    problems.require(
        cfg.get("hidden_act") in (None, "silu"),
        f"{where}.hidden_act={cfg.get('hidden_act')!r} is not supported, want 'silu'",
    )
    problems.require(
        cfg.get("gated") in (None, True), f"{where}.gated={cfg.get('gated')!r} is not supported, want a gated FFN"
    )
    mult, width = cfg.get("ffn_mult"), cfg.get("intermediate_size")
    if mult is None and width is None:
        problems.add(f"{where} has neither ffn_mult nor intermediate_size (nor no_op / replace_with_linear)")
        return Skip()
    if mult is not None:
        if isinstance(mult, bool) or not isinstance(mult, (int, float)) or not 0 < mult < 1e6:
            problems.add(f"{where}.ffn_mult is {mult!r}, want a positive number")
            return Skip()
        derived = ffn_width(mult, hidden_size)
        if width is not None and width != derived:
            problems.add(f"{where}.intermediate_size={width} contradicts ffn_mult={mult}, which gives {derived}")
        width = derived
    if not _is_positive_int(width) or width % WIDTH_MULTIPLE:
        problems.add(f"{where}.intermediate_size is {width!r}, want a positive multiple of {WIDTH_MULTIPLE}")
        return Skip()
    return GatedMLP(width)


def _is_known(cfg: Any, known: set[str], where: str, problems: Problems) -> bool:
    """True for an object whose other options are all unset; every set one is named in `problems`."""
    if not isinstance(cfg, dict):
        return problems.require(False, f"{where} is {type(cfg).__name__}, want an object")
    for key, value in cfg.items():
        if key not in known and value not in (None, False):
            problems.add(f"{where}.{key}={value!r} is not supported")
    return True


def _special_kind(cfg: dict, where: str, problems: Problems) -> Linear | Skip | None:
    """The kind named by the two flags that attention and FFN share; None for an ordinary one."""
    flags = {}
    for key in ("no_op", "replace_with_linear"):
        value = cfg.get(key)
        problems.require(value in (None, True, False), f"{where}.{key} is {value!r}, want true or false")
        flags[key] = value is True
    if all(flags.values()):
        problems.add(f"{where} sets both no_op and replace_with_linear, want at most one")
    return Skip() if flags["no_op"] else Linear() if flags["replace_with_linear"] else None


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
