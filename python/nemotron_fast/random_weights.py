# SPDX-License-Identifier: Apache-2.0
"""Random weights in place of a checkpoint: the shapes and types of the real thing, made on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_fast.config import ModelConfig
from nemotron_fast.param_loader import FP8, LinearWeight
from nemotron_fast.sharding import Param, param_plan
from nemotron_fast.weights import ModelWeights, assemble

CHUNK_ELEMENTS = 1 << 26  # made at a time in float32: 256 MB beyond the weights


def random_weights(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    quantize: str | None = None,
    rank: int = 0,
    size: int = 1,
    seed: int = 0,
) -> ModelWeights:
    """Weights of `config` for one rank: norms are 1, matrices normal with the variance that keeps activations
    near 1. With quantize="fp8" the linears are e4m3 with one weight scale and per-token activations.
    """
    generator = torch.Generator(device).manual_seed(seed)
    loaded = {p.name: _make(p, generator, dtype, quantize == "fp8") for p in param_plan(config, rank, size)}
    return assemble(config, loaded, lambda layer, which: 1.0)


def _make(param: Param, generator: torch.Generator, dtype: torch.dtype, to_fp8: bool) -> LinearWeight:
    device = generator.device
    if param.kind == "norm":
        return LinearWeight(torch.ones(param.shape, dtype=dtype, device=device))
    deviation = 1.0 if param.kind == "embed" else param.shape[1] ** -0.5
    if param.kind != "linear" or not to_fp8:
        return LinearWeight(_normal(param, generator, dtype, deviation))
    scale = torch.full((1,), deviation, dtype=torch.float32, device=device)
    return LinearWeight(_normal(param, generator, FP8, 1.0), scale)


def _normal(param: Param, generator: torch.Generator, dtype: torch.dtype, deviation: float) -> Tensor:
    out = torch.empty(param.shape, dtype=dtype, device=generator.device)
    rows = max(1, CHUNK_ELEMENTS // param.shape[1]) if param.shape[1] else len(out)
    for part in out.split(rows):
        part.copy_(torch.randn(part.shape, generator=generator, device=part.device) * deviation)
    return out
