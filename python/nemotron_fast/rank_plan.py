# SPDX-License-Identifier: Apache-2.0
"""One rank's memory, part by part. `planner.plan` puts the ranks together."""

from __future__ import annotations

from dataclasses import dataclass

from nemotron_fast.config import ModelConfig
from nemotron_fast.footprint import kv_bytes_per_token, weight_bytes_by_kind, workspace_bytes
from nemotron_fast.pages import PAGE_SIZE
from nemotron_fast.quant_config import QuantConfig

CONTEXT_BYTES = 600_000_000  # CUDA context with loaded kernels; a bare one took 552 MB on an H200, driver 580
GRAPH_BYTES = 400_000_000  # captured graphs, stream-K and split-KV partial sums; assumed
NCCL_BYTES = 500_000_000  # communicator buffers, only with several ranks; assumed


@dataclass(frozen=True)
class PlanOptions:
    """What the memory is planned for. "auto" is what the checkpoint says."""

    tp: int = 1  # ranks
    dtype: str = "auto"  # of activations and unquantised weights: a key of dtypes.FLOAT_BYTES, or "auto"
    quantize: str | None = None  # "fp8": the linears become FP8, unless they are already
    kv_dtype: str = "auto"  # a key of dtypes.DTYPE_BYTES, or "auto"
    max_num_seqs: int = 256  # sequences in one step
    max_batched_tokens: int = 2048  # tokens in one step: a prefill chunk; GEMMs are compute-bound there
    page_size: int = PAGE_SIZE  # tokens
    memory_fraction: float = 0.95  # of the usable memory; the rest absorbs what is not planned
    reserve_bytes: int | None = None  # None: the constants above


@dataclass(frozen=True)
class RankPlan:
    """One rank's memory, in bytes."""

    rank: int
    embedding: int
    linears: int
    norms: int
    lm_head: int
    weights: int  # sum of the four above
    scales: int  # of FP8 linears, kept apart: they are no checkpoint weights
    activations: int
    logits: int
    tables: int
    reserve: int
    total: int  # everything but KV
    free_for_kv: int  # budget - total; negative when the weights do not fit
    kv_per_token: int
    page_bytes: int  # of one KV page: kv_per_token * page_size; 0 if no block has attention
    read_per_step: int  # weights and scales that one decode step reads


def plan_rank(
    config: ModelConfig, options: PlanOptions, budget: int, rank: int, quant: QuantConfig | None = None
) -> RankPlan:
    """The memory of one rank; `options` with resolved dtypes, `budget` in bytes.

    Raises:
        CapacityError: the heads cannot be split over `options.tp` ranks.
        CheckpointError: `options.quantize` of a partly quantised checkpoint.
    """
    parts = weight_bytes_by_kind(
        config, dtype=options.dtype, quantize=options.quantize, quant=quant, rank=rank, size=options.tp
    )
    scales = parts.pop("scales")
    work = workspace_bytes(
        config,
        num_tokens=options.max_batched_tokens,
        num_seqs=options.max_num_seqs,
        dtype=options.dtype,
        page_size=options.page_size,
        rank=rank,
        size=options.tp,
    )
    reserve = options.reserve_bytes
    if reserve is None:
        reserve = CONTEXT_BYTES + GRAPH_BYTES + (NCCL_BYTES if options.tp > 1 else 0)
    total = sum(parts.values()) + scales + sum(work.values()) + reserve
    # A tied embedding is also the lm_head and read whole; otherwise a step reads one row a token: nothing.
    read = sum(parts.values()) + scales - (0 if config.tie_word_embeddings else parts["embed"])
    kv_per_token = kv_bytes_per_token(config, options.kv_dtype, rank, options.tp)
    return RankPlan(
        rank=rank,
        embedding=parts["embed"],
        linears=parts["linear"],
        norms=parts["norm"],
        lm_head=parts["lm_head"],
        weights=sum(parts.values()),
        scales=scales,
        reserve=reserve,
        total=total,
        free_for_kv=budget - total,
        kv_per_token=kv_per_token,
        page_bytes=kv_per_token * options.page_size,
        read_per_step=read,
        **work,
    )
