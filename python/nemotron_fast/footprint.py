# SPDX-License-Identifier: Apache-2.0
"""How many bytes the parts of a model take on one rank: weights, KV cache, workspace."""

from __future__ import annotations

from nemotron_fast.blocks import Attention, GatedMLP
from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import RequestError
from nemotron_fast.sharding import Param, head_spans, param_plan, split_span

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1}
SCALE_BYTES = 4  # one float32 per output row of an FP8 linear


def resolve_dtype(dtype: str, config: ModelConfig) -> str:
    """`dtype`, or the checkpoint's for "auto".

    Raises:
        RequestError: not one of DTYPE_BYTES.
    """
    name = config.dtype if dtype == "auto" else dtype
    if name not in DTYPE_BYTES:
        raise RequestError(f"dtype {dtype!r} is not known, want auto, {', '.join(DTYPE_BYTES)}")
    return name


def param_bytes(param: Param, config: ModelConfig, weight_dtype: str = "auto") -> tuple[int, int]:
    """Bytes of one parameter and of its scales.

    With "fp8" only the linears are FP8 (1 byte, and a float32 scale per output row); embedding, norms and
    lm_head stay in the checkpoint's dtype.
    """
    dtype = resolve_dtype(weight_dtype, config)
    if dtype != "fp8":
        return param.numel * DTYPE_BYTES[dtype], 0
    if param.kind == "linear":
        return param.numel, param.shape[0] * SCALE_BYTES
    return param.numel * DTYPE_BYTES[config.dtype], 0


def weight_bytes_by_kind(
    config: ModelConfig, weight_dtype: str = "auto", rank: int = 0, size: int = 1
) -> dict[str, int]:
    """Bytes of one rank's weights by kind of parameter (embed, linear, norm, lm_head), plus "scales"."""
    out = dict.fromkeys(("embed", "linear", "norm", "lm_head", "scales"), 0)
    for param in param_plan(config, rank, size):
        weights, scales = param_bytes(param, config, weight_dtype)
        out[param.kind] += weights
        out["scales"] += scales
    return out


def weight_bytes(config: ModelConfig, weight_dtype: str = "auto", rank: int = 0, size: int = 1) -> int:
    """Bytes of one rank's weights, without scales."""
    parts = weight_bytes_by_kind(config, weight_dtype, rank, size)
    return sum(parts.values()) - parts["scales"]


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str = "auto", rank: int = 0, size: int = 1) -> int:
    """Bytes of K and V of one token on one rank: 2 * K * D * width, summed over the attention blocks."""
    width = DTYPE_BYTES[resolve_dtype(kv_dtype, config)]
    heads = sum(
        len(head_spans(config.num_heads, sub.op.num_kv_heads, rank, size)[1]) for sub in config.attention_blocks
    )
    return 2 * heads * config.head_dim * width


def num_pages_that_fit(
    config: ModelConfig,
    free_bytes: int,
    kv_dtype: str = "auto",
    page_size: int = 64,
    rank: int = 0,
    size: int = 1,
) -> int | None:
    """KV pages (`page_size` tokens in every KV slot) in `free_bytes`; None if no block has attention."""
    page_bytes = page_size * kv_bytes_per_token(config, kv_dtype, rank, size)
    return max(free_bytes, 0) // page_bytes if page_bytes else None


def workspace_bytes(
    config: ModelConfig, *, num_tokens: int, num_seqs: int, page_size: int = 64, rank: int = 0, size: int = 1
) -> dict[str, int]:
    """Buffers of one rank, an upper bound: nothing is fused away, one sub-block's buffers live at a time.

    With T = num_tokens and S = num_seqs in a step, `a` bytes per element, `_r` meaning this rank's share:
        activations  T * a * (2 E + widest sub-block), which is
                     attention (2 H_r + 2 K_r) D + E, FFN 3 F_r + E, linear 2 E
        logits       S * (V_r a + 2 V 4): the rank's own, gathered float32 logits and one sorted copy
        tables       max_position * D * 4 (cos and sin) + S * max_position / page_size * 4 (page table)
    """
    act = DTYPE_BYTES[config.dtype]
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
