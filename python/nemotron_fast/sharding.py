# SPDX-License-Identifier: Apache-2.0
"""Which slice of which checkpoint tensor goes where: one pure function for the loader, the planner and counts.

`param_plan(config, rank, size)` lists every runtime parameter of one tensor-parallel rank. A parameter is a
stack (along rows) of pieces; a piece is a rectangle of one checkpoint tensor. With `size` = 1 the pieces are
whole tensors, so the plan is also the exact list of tensors that a checkpoint must hold.

How the work is split over `size` ranks:
    q, gate, up        rows: query heads, FFN columns of the tile multiple
    k, v               rows: KV heads, replicated where a block has fewer of them than there are ranks
    o, down, linear    columns, so that a sub-block ends in one sum over the ranks
    embed, lm_head     rows: vocabulary
    norms              replicated
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemotron_fast.blocks import Attention, GatedMLP, Linear, SubBlock
from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CapacityError

WIDTH_TILE = 64  # FFN widths and the vocabulary are split in multiples of this


@dataclass(frozen=True)
class Span:
    """The half-open range [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Piece:
    """A rectangle of one checkpoint tensor."""

    tensor: str  # name in the checkpoint
    shape: tuple[int, ...]  # whole shape in the checkpoint
    rows: Span
    cols: Span | None  # None for vectors


@dataclass(frozen=True)
class Param:
    """One runtime tensor of a rank: its pieces stacked along rows."""

    name: str  # "embed", "norm", "lm_head", or "blocks.{index}.{role}.{part}"
    kind: str  # "embed" | "norm" | "linear" (may be quantised) | "lm_head"
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape on this rank: [rows] or [rows, cols]."""
        rows = sum(len(p.rows) for p in self.pieces)
        cols = self.pieces[0].cols
        return (rows,) if cols is None else (rows, len(cols))

    @property
    def numel(self) -> int:
        """Elements on this rank."""
        rows, *cols = self.shape
        return rows * (cols[0] if cols else 1)


def split_span(total: int, rank: int, size: int, multiple: int = WIDTH_TILE) -> Span:
    """Rank's share of [0, total) in multiples of `multiple`, as even as that allows; the last may be ragged."""
    units = -(-total // multiple)
    base, extra = divmod(units, size)
    start = (rank * base + min(rank, extra)) * multiple
    stop = start + (base + (rank < extra)) * multiple
    return Span(min(start, total), min(stop, total))


def head_spans(num_heads: int, num_kv_heads: int, rank: int, size: int) -> tuple[Span, Span]:
    """Rank's query heads and the KV heads they read.

    Raises:
        CapacityError: the heads cannot be split over `size` ranks.
    """
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise CapacityError(
            f"{num_heads} query heads on {num_kv_heads} KV heads cannot be split over tensor_parallel_size={size}; "
            f"want a size that divides {num_heads} and divides, or is a multiple of, {num_kv_heads}"
        )
    q = Span(rank * num_heads // size, (rank + 1) * num_heads // size)
    group = num_heads // num_kv_heads
    return q, Span(q.start // group, -(-q.stop // group))


def param_plan(config: ModelConfig, rank: int = 0, size: int = 1) -> tuple[Param, ...]:
    """Every runtime parameter of one rank, in execution order.

    Raises:
        CapacityError: the model cannot be split over `size` ranks.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank}, want 0 <= rank < size={size}")
    return tuple(_params(config, rank, size))


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that the checkpoint must hold, exactly once each."""
    return {piece.tensor: piece.shape for param in param_plan(config) for piece in param.pieces}


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part: embedding, attention, linear, ffn, norm, lm_head, and their total."""
    counts = dict.fromkeys(("embedding", "attention", "linear", "ffn", "norm", "lm_head"), 0)
    for param in param_plan(config):
        counts[_part_of(param, config)] += param.numel
    return counts | {"total": sum(counts.values())}


def _part_of(param: Param, config: ModelConfig) -> str:
    match param.kind:
        case "embed":
            return "embedding"
        case "linear":
            last = param.name.rsplit(".", 1)[1]
            return {"qkv": "attention", "o": "attention", "linear": "linear"}.get(last, "ffn")
        case kind:
            return kind


def _params(config: ModelConfig, rank: int, size: int) -> Iterator[Param]:
    vocab, hidden = config.vocab_size, config.hidden_size
    vocab_rows = split_span(vocab, rank, size)
    all_cols = Span(0, hidden)
    table = Piece("model.embed_tokens.weight", (vocab, hidden), vocab_rows, all_cols)
    yield Param("embed", "embed", (table,))
    for sub in config.sub_blocks:
        yield from _sub_block_params(config, sub, rank, size)
    yield _norm("norm", "model.norm.weight", hidden)
    if not config.tie_word_embeddings:
        head = Piece("lm_head.weight", (vocab, hidden), vocab_rows, all_cols)
        yield Param("lm_head", "lm_head", (head,))


def _sub_block_params(config: ModelConfig, sub: SubBlock, rank: int, size: int) -> Iterator[Param]:
    hidden, dim = config.hidden_size, config.head_dim
    layer, name = f"model.layers.{sub.index}", f"blocks.{sub.index}.{sub.role}"
    all_cols = Span(0, hidden)
    norm = "input_layernorm" if sub.role == "mixer" else "post_attention_layernorm"
    yield _norm(f"{name}.norm", f"{layer}.{norm}.weight", hidden)
    match sub.op:
        case Attention(num_kv_heads):
            q, kv = head_spans(config.num_heads, num_kv_heads, rank, size)
            q_rows, kv_rows = (Span(s.start * dim, s.stop * dim) for s in (q, kv))
            q_shape, kv_shape = (config.num_heads * dim, hidden), (num_kv_heads * dim, hidden)
            yield Param(
                f"{name}.qkv",
                "linear",
                (
                    Piece(f"{layer}.self_attn.q_proj.weight", q_shape, q_rows, all_cols),
                    Piece(f"{layer}.self_attn.k_proj.weight", kv_shape, kv_rows, all_cols),
                    Piece(f"{layer}.self_attn.v_proj.weight", kv_shape, kv_rows, all_cols),
                ),
            )
            o = Piece(f"{layer}.self_attn.o_proj.weight", (hidden, config.num_heads * dim), all_cols, q_rows)
            yield Param(f"{name}.o", "linear", (o,))
        case GatedMLP(width):
            cut = split_span(width, rank, size)
            gate_up = tuple(
                Piece(f"{layer}.mlp.{part}_proj.weight", (width, hidden), cut, all_cols) for part in ("gate", "up")
            )
            yield Param(f"{name}.gate_up", "linear", gate_up)
            down = Piece(f"{layer}.mlp.down_proj.weight", (hidden, width), all_cols, cut)
            yield Param(f"{name}.down", "linear", (down,))
        case Linear():
            part = "self_attn.linear_attn" if sub.role == "mixer" else "mlp.linear_mlp"
            cut = split_span(hidden, rank, size)
            square = Piece(f"{layer}.{part}.weight", (hidden, hidden), all_cols, cut)
            yield Param(f"{name}.linear", "linear", (square,))


def _norm(name: str, tensor: str, hidden: int) -> Param:
    return Param(name, "norm", (Piece(tensor, (hidden,), Span(0, hidden), None),))
