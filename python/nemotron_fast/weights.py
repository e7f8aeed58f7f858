# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder -> the weights of one rank on one device, fused as the forward pass uses them.

Each runtime tensor is allocated once and filled in chunks of a few MB from the mapped files: host memory beyond
the final weights and the page cache stays below about 32 MB, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_fast.blocks import Attention, GatedMLP, SubBlock
from nemotron_fast.checkpoint import Checkpoint
from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CheckpointError, RequestError
from nemotron_fast.inventory import kv_scale_names, scheme_of
from nemotron_fast.param_loader import LinearWeight, ParamLoader, read_scale
from nemotron_fast.quant_config import QuantConfig
from nemotron_fast.sharding import Param, param_plan

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class AttentionWeights:
    norm: Tensor  # [E]
    qkv: LinearWeight  # [(H + 2K) * D, E]: q, then k, then v
    o: LinearWeight  # [E, H * D]
    k_scale: float  # an FP8 cache holds k / k_scale
    v_scale: float


@dataclass(frozen=True)
class LinearBlockWeights:
    norm: Tensor  # [E]
    linear: LinearWeight  # [E, E of this rank]


@dataclass(frozen=True)
class MLPWeights:
    norm: Tensor  # [E]
    gate_up: LinearWeight  # [2 * F, E]: gate, then up
    down: LinearWeight  # [E, F]


SubBlockWeights = AttentionWeights | LinearBlockWeights | MLPWeights


@dataclass(frozen=True)
class ModelWeights:
    """The weights of one rank."""

    embed: Tensor  # [V, E]
    sub_blocks: list[SubBlockWeights]  # aligned with config.sub_blocks
    norm: Tensor  # [E]
    lm_head: LinearWeight  # [V, E]; the storage of `embed` if the two are tied

    @property
    def nbytes(self) -> int:
        """Bytes on the device, scales included, shared storage once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(self)}
        return sum(storages.values())


def load_weights(
    folder: str | Path,
    config: ModelConfig,
    quant: QuantConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    quantize: str | None = None,
    rank: int = 0,
    size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    verify: bool = True,
) -> ModelWeights:
    """Load one rank's share; every tensor of the checkpoint is accounted for before memory is allocated.

    Args:
        quant: from `read_quant_config`; its FP8 linears stay FP8. Fused linears with unequal weight scales get
            one per row, which is exact; of unequal input scales the largest serves all.
        dtype: of activations, embedding, norms and unquantised linears: one of DTYPES.
        quantize: "fp8" quantises the linears per output row (not embedding, norms, lm_head) as they are read.
            Nothing changes if all of them are FP8 already. Scales are of whole rows, so that a rank's share of a
            row is quantised as the row would be on one rank.
        progress: called with (bytes loaded, bytes to load), counted as they are on the device.
        verify: look for NaN and infinity in every weight.

    Raises:
        CheckpointError: broken or unexpected files; NaN, infinity, or an overflow of `dtype`; a scale that is not
            finite and positive; quantize="fp8" of a partly quantised checkpoint.
        CapacityError: the model cannot be split over `size` ranks.
        RequestError: `dtype` or `quantize` is not one of the values above.
    """
    if dtype not in DTYPES or quantize not in (None, "fp8"):
        raise RequestError(f"dtype={dtype}, quantize={quantize!r}: want one of {DTYPES}, and None or 'fp8'")
    plan = param_plan(config, rank, size)
    to_fp8 = quantize == "fp8" and not _is_fp8(plan, quant)
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.check(config, quant)
        loader = ParamLoader(checkpoint, quant, torch.device(device), dtype, to_fp8, verify)
        loader.report(plan, progress)
        loaded = {param.name: loader.load(param) for param in plan}
        return assemble(config, loaded, lambda layer, which: _kv_scale(checkpoint, layer, which))


def assemble(
    config: ModelConfig, loaded: dict[str, LinearWeight], kv_scale: Callable[[int, str], float]
) -> ModelWeights:
    """The runtime's weights from its parameters by name; `kv_scale(layer, "k" or "v")` gives an FP8 cache's scales."""
    sub_blocks = [_sub_block(sub, loaded, kv_scale) for sub in config.sub_blocks]
    embed = loaded["embed"].weight
    lm_head = LinearWeight(embed) if config.tie_word_embeddings else loaded["lm_head"]
    return ModelWeights(embed, sub_blocks, loaded["norm"].weight, lm_head)


def _is_fp8(plan: tuple[Param, ...], quant: QuantConfig | None) -> bool:
    """Whether all linears are FP8 in the checkpoint; False if none is, and an error in between."""
    linears = [(param, piece) for param in plan if param.kind == "linear" for piece in param.pieces]
    count = sum(scheme_of(quant, *pair) is not None for pair in linears)
    if 0 < count < len(linears):
        raise CheckpointError(
            f"quantize='fp8' on a checkpoint with {count} of {len(linears)} linears in FP8 already; "
            "leave quantize out, or give the unquantised checkpoint"
        )
    return count > 0


def _sub_block(
    sub: SubBlock, loaded: dict[str, LinearWeight], kv_scale: Callable[[int, str], float]
) -> SubBlockWeights:
    name = f"blocks.{sub.index}.{sub.role}"
    norm = loaded[f"{name}.norm"].weight
    if isinstance(sub.op, Attention):
        k_scale, v_scale = kv_scale(sub.index, "k"), kv_scale(sub.index, "v")
        return AttentionWeights(norm, loaded[f"{name}.qkv"], loaded[f"{name}.o"], k_scale, v_scale)
    if isinstance(sub.op, GatedMLP):
        return MLPWeights(norm, loaded[f"{name}.gate_up"], loaded[f"{name}.down"])
    return LinearBlockWeights(norm, loaded[f"{name}.linear"])


def _kv_scale(checkpoint: Checkpoint, layer: int, which: str) -> float:
    """1 if the checkpoint has none: what ModelOpt means by leaving it out."""
    found = [name for name in kv_scale_names(layer, which) if name in checkpoint]
    return read_scale(checkpoint, found[0]).item() if found else 1.0


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, list) else []
    if is_dataclass(value):
        parts = [getattr(value, field.name) for field in fields(value)]
    return [tensor for part in parts for tensor in _tensors(part)]
