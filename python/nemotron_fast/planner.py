# SPDX-License-Identifier: Apache-2.0
"""Memory in bytes, before anything is loaded: what it takes, what fits, and the refusal if it does not.

Pure functions of a ModelConfig; the engine sizes its KV pool with the same ones. A rank's memory is

    budget = usable device memory x memory_fraction
           = weights + scales                   sharding.param_plan
           + activations + logits + tables      footprint.workspace_bytes
           + reserve                            CUDA context, CUDA graphs, NCCL: the constants of rank_plan.py
           + KV pool                            all that is left, in whole pages
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from nemotron_fast.config import ModelConfig
from nemotron_fast.dtypes import FLOAT_BYTES, FP8, dtype_name
from nemotron_fast.errors import CapacityError, CheckpointError, RequestError
from nemotron_fast.footprint import kv_bytes_per_token, linear_dtype, num_pages_that_fit, weight_bytes
from nemotron_fast.hardware import Gpu, custom_gpu
from nemotron_fast.quant_config import QuantConfig
from nemotron_fast.rank_plan import PlanOptions, RankPlan, plan_rank

__all__ = [
    "Plan",
    "PlanOptions",
    "RankPlan",
    "gigabytes",
    "kv_bytes_per_token",
    "num_pages_that_fit",
    "plan",
    "weight_bytes",
]

TABLE_CONTEXTS = (1024, 2048, 8192, 32768, 131072)  # tokens; `Plan.sequences_at`


@dataclass(frozen=True)
class Plan:
    """The memory of every rank and what fits in it. Sizes in bytes, contexts in tokens."""

    config: ModelConfig
    gpu: Gpu
    options: PlanOptions  # dtypes resolved
    max_model_len: int | None  # as asked
    budget: int  # per rank
    ranks: tuple[RankPlan, ...]
    quant: QuantConfig | None = None  # how the checkpoint is quantised

    @property
    def weight_dtype(self) -> str:
        """Of the linears: "fp8", "partly fp8", or the name of a float type."""
        options = self.options
        return linear_dtype(self.config, dtype=options.dtype, quantize=options.quantize, quant=self.quant)

    @property
    def weights_fit(self) -> bool:
        return all(rank.free_for_kv >= 0 for rank in self.ranks)

    @property
    def num_pages(self) -> int | None:
        """KV pages that every rank can hold; None if no block has attention."""
        if not self.ranks[0].page_bytes:
            return None
        return min(max(r.free_for_kv, 0) // r.page_bytes for r in self.ranks)

    @property
    def kv_tokens(self) -> int | None:
        """Tokens of KV in those pages, over all sequences."""
        return None if self.num_pages is None else self.num_pages * self.options.page_size

    @property
    def max_context(self) -> int:
        """Longest single sequence: what fits, at most max_position; 0 if the weights do not fit."""
        if not self.weights_fit:
            return 0
        limit = self.config.max_position
        return limit if self.kv_tokens is None else min(limit, self.kv_tokens)

    @property
    def rank_ratio(self) -> float:
        """Most over least loaded rank, in bytes of everything but the reserve, with the KV pool full."""
        pool = self.kv_tokens or 0
        loads = [r.total - r.reserve + pool * r.kv_per_token for r in self.ranks]
        return max(loads) / min(loads)

    def sequences_at(self, context: int) -> int | None:
        """Sequences of `context` tokens whose KV fits at once; None if no block has attention."""
        return None if self.num_pages is None else self.num_pages // -(-context // self.options.page_size)

    def decode_limit_s(self, context: int = 0) -> float | None:
        """Lower bound on a batch-1 decode step in seconds: bytes of the worst rank / datasheet bandwidth.

        Weights, scales and the KV of `context` tokens; no time for communication. None without a bandwidth.
        """
        if self.gpu.bandwidth is None:
            return None
        return max(r.read_per_step + context * r.kv_per_token for r in self.ranks) / self.gpu.bandwidth

    def require(self, max_model_len: int | None = None) -> None:
        """Check that the weights fit, and a sequence of `max_model_len` tokens (default: the plan's; else one page).

        Raises:
            CapacityError: with what is needed, what there is, and what would fit.
        """
        wanted = max_model_len if max_model_len is not None else self.max_model_len
        limit = self.config.max_position
        if wanted is not None and wanted > limit:
            raise CapacityError(
                f"max_model_len={wanted} exceeds the model's {limit} positions; ask for at most {limit}"
            )
        if self.holds(wanted):
            return
        worst = min(self.ranks, key=lambda r: r.free_for_kv)
        context = wanted or min(self.options.page_size, limit)
        need = worst.kv_per_token * self._in_pages(context)
        where = f"rank {worst.rank} of {self.options.tp}" if self.options.tp > 1 else self.gpu.label
        weights, context_kv = worst.weights + worst.scales, gigabytes(need)
        raise CapacityError(
            f"does not fit on {where}: needs {gigabytes(worst.total + need)} ({gigabytes(weights)} "
            f"{self.weight_dtype} weights, {gigabytes(worst.total - weights)} workspace and reserve, "
            f"{context_kv} {self.options.kv_dtype} KV for {context} tokens), has {gigabytes(self.budget)}; "
            f"{_advice(self, wanted)}"
        )

    def holds(self, context: int | None) -> bool:
        """Do the weights, and the KV of one sequence of `context` tokens (default: one page), fit?"""
        pages = self.num_pages
        if not self.weights_fit or pages is None:
            return self.weights_fit
        return pages * self.options.page_size >= (context or 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything above as JSON-able data; sizes in bytes, times in seconds."""
        limit = self.decode_limit_s()
        contexts = [c for c in TABLE_CONTEXTS if c <= self.config.max_position]
        return {
            "gpu": asdict(self.gpu),
            "options": asdict(self.options),
            "weight_dtype": self.weight_dtype,
            "max_model_len": self.max_model_len,
            "max_position": self.config.max_position,
            "budget_bytes": self.budget,
            "weights_fit": self.weights_fit,
            "fits": self.holds(self.max_model_len),
            "ranks": [asdict(rank) for rank in self.ranks],
            "rank_ratio": self.rank_ratio,
            "kv_pages": self.num_pages,
            "kv_tokens": self.kv_tokens,
            "max_context": self.max_context,
            "sequences_at": {str(c): self.sequences_at(c) for c in contexts},
            "decode_limit": {
                "basis": "bytes read / datasheet bandwidth, batch 1, context 0",
                "seconds": limit,
            },
        }

    def _in_pages(self, tokens: int) -> int:
        return -(-tokens // self.options.page_size) * self.options.page_size


def gigabytes(num_bytes: int) -> str:
    """`51.97 GB`: decimal gigabytes, two digits."""
    return f"{num_bytes / 1e9:.2f} GB"


def plan(
    config: ModelConfig,
    *,
    gpu: Gpu | int,
    quant: QuantConfig | None = None,
    max_model_len: int | None = None,
    **options: Any,
) -> Plan:
    """Plan the memory of `tp` equal GPUs.

    Args:
        gpu: a Gpu of hardware.py, or the usable bytes of one device.
        quant: how the checkpoint is quantised; None: not at all.
        max_model_len: tokens of context that must fit; checked by `Plan.require`, not here.
        options: fields of PlanOptions.

    Raises:
        RequestError: an option out of range. CapacityError: the heads cannot be split over `tp` ranks.
        CheckpointError: quantize="fp8" of a partly quantised checkpoint.
    """
    chosen = PlanOptions(**options)
    dtype = dtype_name(chosen.dtype, config.dtype, FLOAT_BYTES)
    auto_kv = FP8 if quant is not None and quant.kv_cache_fp8 else dtype
    chosen = replace(chosen, dtype=dtype, kv_dtype=dtype_name(chosen.kv_dtype, auto_kv, what="kv_dtype"))
    for name in ("tp", "max_num_seqs", "max_batched_tokens", "page_size"):
        if getattr(chosen, name) < 1:
            raise RequestError(f"{name}={getattr(chosen, name)}, want at least 1")
    if not 0 < chosen.memory_fraction <= 1:
        raise RequestError(f"memory_fraction={chosen.memory_fraction}, want more than 0 and at most 1")
    if max_model_len is not None and max_model_len < 1:
        raise RequestError(f"max_model_len={max_model_len}, want at least 1")
    device = custom_gpu(gpu) if isinstance(gpu, int) else gpu
    budget = int(device.memory_bytes * chosen.memory_fraction)
    ranks = tuple(plan_rank(config, chosen, budget, rank, quant) for rank in range(chosen.tp))
    return Plan(config, device, chosen, max_model_len, budget, ranks, quant)


def _advice(found: Plan, wanted: int | None) -> str:
    """What would fit instead, least change first."""
    fits = []
    if wanted and found.max_context >= found.options.page_size:
        fits.append(f"max_model_len up to {found.max_context}")
    fp8, fp8_kv = {"quantize": FP8}, {"kv_dtype": FP8}
    for name, change in (("FP8 KV", fp8_kv), ("FP8 weights", fp8), ("FP8", fp8 | fp8_kv)):
        if _holds_with(found, wanted, change):
            fits.append(name)
            break
    for ranks in (n for n in (2, 4, 8) if n > found.options.tp):
        if _holds_with(found, wanted, {"tp": ranks}):
            fits.append(f"tensor parallelism over {ranks} GPUs")
            break
        if _holds_with(found, wanted, {"tp": ranks} | fp8):
            fits.append(f"FP8 weights and tensor parallelism over {ranks} GPUs")
            break
    return "would fit: " + ", or ".join(fits) if fits else "neither FP8 nor 8 such GPUs would be enough"


def _holds_with(found: Plan, wanted: int | None, change: dict[str, Any]) -> bool:
    options = asdict(found.options)
    if options | change == options:
        return False
    try:
        return plan(found.config, gpu=found.gpu, quant=found.quant, **(options | change)).holds(wanted)
    except (CapacityError, CheckpointError):  # the heads cannot be split that way; partly quantised already
        return False
