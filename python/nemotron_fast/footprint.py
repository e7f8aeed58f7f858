# SPDX-License-Identifier: Apache-2.0
"""How many bytes the parts of a model take on one rank: weights, KV cache, workspace.

What a weight is held in: a linear or lm_head that the checkpoint stores in FP8 (`quant`) stays so; with
quantize="fp8" every linear becomes FP8, with a scale per output row; all else is of `dtype` ("auto": the
checkpoint's).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from nemotron_fast.blocks import Attention, GatedMLP
from nemotron_fast.config import ModelConfig
from nemotron_fast.dtypes import DTYPE_BYTES, FLOAT_BYTES, FP8, SCALE_BYTES, dtype_name
from nemotron_fast.errors import CheckpointError, RequestError
from nemotron_fast.pages import PAGE_SIZE
from nemotron_fast.quant_config import Fp8Scheme, QuantConfig
from nemotron_fast.sharding import Param, Piece, head_spans, param_plan, split_span

ON_LOAD = Fp8Scheme("channel", "dynamic")  # what quantize="fp8" makes of a linear


def scheme_of(quant: QuantConfig | None, param: Param, piece: Piece) -> Fp8Scheme | None:
    """How the piece is quantised in the checkpoint; embeddings and norms never are."""
    if quant is None or param.kind not in ("linear", "lm_head"):
        return None
    return _scheme_for(quant, piece.tensor.removesuffix(".weight"))


@lru_cache(maxsize=8192)
def _scheme_for(quant: QuantConfig, module: str) -> Fp8Scheme | None:
    """Remembered, since a plan asks for every rank, and a mixed checkpoint has a pattern per linear."""
    return quant.scheme_for(module)


def count_fp8_linears(params: Iterable[Param], quant: QuantConfig | None) -> tuple[int, int]:
    """(tensors of linears that the checkpoint holds in FP8, tensors of linears)."""
    linears = [(param, piece) for param in params if param.kind == "linear" for piece in param.pieces]
    return sum(scheme_of(quant, *pair) is not None for pair in linears), len(linears)


def linear_dtype(
    config: ModelConfig, *, dtype: str = "auto", quantize: str | None = None, quant: QuantConfig | None = None
) -> str:
    """What the linears are held in: "fp8", the name of `dtype`, or "partly fp8".

    Raises:
        RequestError: `dtype` or `quantize` is not known.
        CheckpointError: quantize="fp8" of a partly quantised checkpoint.
    """
    name = dtype_name(dtype, config.dtype, FLOAT_BYTES)
    if quantize not in (None, FP8):
        raise RequestError(f"quantize={quantize!r}, want 'fp8' or None")
    stored, total = count_fp8_linears(param_plan(config), quant)
    if quantize is not None and 0 < stored < total:
        raise CheckpointError(
            f"quantize='fp8' on a checkpoint with {stored} of {total} linears in FP8 already; "
            "leave quantize out, or give the unquantised checkpoint"
        )
    if quantize is not None or 0 < stored == total:
        return FP8
    return f"partly {FP8}" if stored else name


def param_bytes(
    param: Param,
    config: ModelConfig,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    quant: QuantConfig | None = None,
) -> tuple[int, int]:
    """Bytes of one parameter and of its scales: those of its weight, at most, and of its input.

    Fused tensors with a scale each share one if all are equal, which only the checkpoint tells: here they are
    counted as one per row, as they are held otherwise.
    """
    width = FLOAT_BYTES[dtype_name(dtype, config.dtype, FLOAT_BYTES)]
    weights = scales = 0
    has_input_scale = False
    for piece in param.pieces:
        scheme = scheme_of(quant, param, piece)
        if scheme is None and quantize is not None and param.kind == "linear":
            scheme = ON_LOAD
        elements = len(piece.rows) * (1 if piece.cols is None else len(piece.cols))
        weights += elements * (width if scheme is None else DTYPE_BYTES[FP8])
        if scheme is not None:
            is_one = scheme.weight == "tensor" and len(param.pieces) == 1
            scales += SCALE_BYTES * (1 if is_one else len(piece.rows))
            has_input_scale |= scheme.activation == "static"
    return weights, scales + SCALE_BYTES * has_input_scale


def weight_bytes_by_kind(
    config: ModelConfig,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    quant: QuantConfig | None = None,
    rank: int = 0,
    size: int = 1,
) -> dict[str, int]:
    """Bytes of one rank's weights by kind of parameter (embed, linear, norm, lm_head), plus "scales".

    Raises:
        RequestError, CheckpointError: see `linear_dtype`.
        CapacityError: the model cannot be split over `size` ranks.
    """
    linear_dtype(config, dtype=dtype, quantize=quantize, quant=quant)
    out = dict.fromkeys(("embed", "linear", "norm", "lm_head", "scales"), 0)
    for param in param_plan(config, rank, size):
        weights, scales = param_bytes(param, config, dtype=dtype, quantize=quantize, quant=quant)
        out[param.kind] += weights
        out["scales"] += scales
    return out


def weight_bytes(
    config: ModelConfig,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    quant: QuantConfig | None = None,
    rank: int = 0,
    size: int = 1,
) -> int:
    """Bytes that loading takes on one rank: weights and scales. Raises as `weight_bytes_by_kind`."""
    return sum(weight_bytes_by_kind(config, dtype=dtype, quantize=quantize, quant=quant, rank=rank, size=size).values())


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str = "auto", rank: int = 0, size: int = 1) -> int:
    """Bytes of K and V of one token on one rank: 2 * K * D * width, summed over the attention blocks."""
    width = DTYPE_BYTES[dtype_name(kv_dtype, config.dtype, what="kv_dtype")]
    heads = sum(
        len(head_spans(config.num_heads, sub.op.num_kv_heads, rank, size)[1]) for sub in config.attention_blocks
    )
    return 2 * heads * config.head_dim * width


def num_pages_that_fit(
    config: ModelConfig,
    free_bytes: int,
    kv_dtype: str = "auto",
    page_size: int = PAGE_SIZE,
    rank: int = 0,
    size: int = 1,
) -> int | None:
    """KV pages (`page_size` tokens in every KV slot) in `free_bytes`; None if no block has attention."""
    page_bytes = page_size * kv_bytes_per_token(config, kv_dtype, rank, size)
    return max(free_bytes, 0) // page_bytes if page_bytes else None


def workspace_bytes(
    config: ModelConfig,
    *,
    num_tokens: int,
    num_seqs: int,
    dtype: str = "auto",
    page_size: int = PAGE_SIZE,
    rank: int = 0,
    size: int = 1,
) -> dict[str, int]:
    """Buffers of one rank, an upper bound: nothing is fused away, one sub-block's buffers live at a time.

    With T = num_tokens and S = num_seqs in a step, `a` bytes per element of `dtype`, `_r` meaning this rank's share:
        activations  T * a * (2 E + widest sub-block), which is
                     attention (2 H_r + 2 K_r) D + E, FFN 3 F_r + E, linear 2 E
        logits       S * (V_r a + 2 V 4): the rank's own, gathered float32 logits and one sorted copy
        tables       max_position * D * 4 (cos and sin) + S * max_position / page_size * 4 (page table)
    """
    act = FLOAT_BYTES[dtype_name(dtype, config.dtype, FLOAT_BYTES)]
    hidden, dim, vocab = config.hidden_size, config.head_dim, config.vocab_size
    widest = 0
    for sub in config.sub_blocks:
        match sub.op:
            case Attention(kv_heads):
                q, kv = head_spans(config.num_heads, kv_heads, rank, size)
                width = (2 * len(q) + 2 * len(kv)) * dim + hidden
            case GatedMLP(ffn):
                width = 3 * len(split_span(ffn, rank, size)) + hidden
            case _:
                width = 2 * hidden
        widest = max(widest, width)
    vocab_r = len(split_span(vocab, rank, size))
    pages = -(-config.max_position // page_size)
    return {
        "activations": num_tokens * act * (2 * hidden + widest),
        "logits": num_seqs * (vocab_r * act + 2 * vocab * 4),
        "tables": config.max_position * dim * 4 + num_seqs * pages * 4,
    }
