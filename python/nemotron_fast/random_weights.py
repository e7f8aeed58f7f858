# SPDX-License-Identifier: Apache-2.0
"""Random weights in place of a checkpoint: the shapes and types of the real thing, made on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import RequestError
from nemotron_fast.footprint import scheme_of
from nemotron_fast.param_loader import FP8, LinearWeight
from nemotron_fast.quant_config import Fp8Scheme, QuantConfig
from nemotron_fast.sharding import Param, param_plan
from nemotron_fast.weights import ModelWeights, assemble

CHUNK_ELEMENTS = 1 << 26  # made at a time in float32: 256 MB beyond the weights
NORMAL, DUMMY = "normal", "dummy"  # values
DUMMY_LIMIT = 1e-3
PER_TOKEN = Fp8Scheme("tensor", "dynamic")  # what quantize="fp8" makes of a linear here
INPUT_SCALE = 2**-4  # static: e4m3 then ends at 28, beyond what rows near 1 and the products of an FFN reach


def random_weights(
    config: ModelConfig,
    quant: QuantConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    quantize: str | None = None,
    values: str = NORMAL,
    rank: int = 0,
    size: int = 1,
    seed: int = 0,
) -> ModelWeights:
    """Weights of `config` for one rank: norms are 1, matrices normal with the variance that keeps activations
    near 1. What `quant` says is e4m3 is so, in its layout; with quantize="fp8" all linears are, with one weight scale
    and per-token activations where `quant` says nothing.

    With values="dummy" matrices are uniform within 1e-3 of 0 before the cast to their type, as vLLM's
    `--load-format dummy` makes them (initialize_single_dummy_weight of its weight_utils.py), for comparisons with its
    figures only: e4m3's smallest number is 2**-9, so 98 % of such weights are zero, products of zeros take little
    power, and a GPU at its power limit multiplies them faster than a checkpoint's.

    Raises:
        RequestError: other `values`.
    """
    if values not in (NORMAL, DUMMY):
        raise RequestError(f"random weights {values!r}, want '{NORMAL}' or '{DUMMY}'")
    generator = torch.Generator(device).manual_seed(seed)
    loaded = {}
    for param in param_plan(config, rank, size):
        scheme = scheme_of(quant, param, param.pieces[0])
        if scheme is None and quantize == "fp8" and param.kind == "linear":
            scheme = PER_TOKEN
        loaded[param.name] = _make(param, generator, dtype, scheme, values)
    return assemble(config, loaded, lambda layer, which: 1.0)


def _make(
    param: Param, generator: torch.Generator, dtype: torch.dtype, scheme: Fp8Scheme | None, values: str
) -> LinearWeight:
    device = generator.device
    if param.kind == "norm":
        return LinearWeight(torch.ones(param.shape, dtype=dtype, device=device))
    deviation = 1.0 if param.kind == "embed" else param.shape[1] ** -0.5
    if scheme is None:
        return LinearWeight(_matrix(param, generator, dtype, values, deviation))
    num_scales = 1 if scheme.weight == "tensor" else param.shape[0]
    scale = torch.full((num_scales,), deviation, dtype=torch.float32, device=device)
    input_scale = None
    if scheme.activation == "static":
        input_scale = torch.full((1,), INPUT_SCALE, dtype=torch.float32, device=device)
    return LinearWeight(_matrix(param, generator, FP8, values, 1.0), scale, input_scale)


def _matrix(param: Param, generator: torch.Generator, dtype: torch.dtype, values: str, deviation: float) -> Tensor:
    """`deviation`: of normal values."""
    out = torch.empty(param.shape, dtype=dtype, device=generator.device)
    rows = max(1, CHUNK_ELEMENTS // param.shape[1]) if param.shape[1] else len(out)
    chunk = torch.empty((min(rows, len(out)), *param.shape[1:]), dtype=torch.float32, device=out.device)
    for part in out.split(rows):
        made = chunk[: len(part)]
        if values == DUMMY:
            made.uniform_(-DUMMY_LIMIT, DUMMY_LIMIT, generator=generator)
        else:
            made.normal_(std=deviation, generator=generator)
        part.copy_(made)
    return out
