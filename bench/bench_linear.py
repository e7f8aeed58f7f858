# SPDX-License-Identifier: Apache-2.0
"""linear on every distinct shape of Super-49B, BF16 and FP8, against cuBLAS through torch.

python bench/bench_linear.py; a case's "-x49" is how often a forward pass has the shape.
On a CPU: the shapes of a small model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_fast import ops, reference
from nemotron_fast.config import ModelConfig
from nemotron_fast.testing import cases, runner

CONFIGS = Path(__file__).parents[1] / "tests" / "configs"
BATCH_SIZES = (1, 8, 64, 256)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    x_scale: Tensor | None  # [1]; None for BF16
    weight_scale: Tensor | None
    out: Tensor


def our_linear(s: Inputs) -> Tensor:
    return ops.linear(s.x, s.weight, x_scale=s.x_scale, weight_scale=s.weight_scale, out=s.out)


def torch_linear(s: Inputs) -> Tensor:
    if s.x_scale is None:
        return functional.linear(s.x, s.weight)
    return torch._scaled_mm(s.x, s.weight.T, s.x_scale, s.weight_scale, out_dtype=s.out.dtype)


def want(s: Inputs) -> Tensor:
    scales = (s.x_scale, s.weight_scale) if s.x_scale is not None else (1.0, 1.0)
    return functional.linear(s.x.float() * scales[0], s.weight.float() * scales[1])


def rows(device: torch.device, quick: bool) -> Iterator[runner.Row]:
    config = ModelConfig.from_path(CONFIGS / ("mini-all-blocks.json" if quick else "super-49b-v1.json"))
    # The sum of K products of order 1 in FP32, rounded to BF16; the absolute part is for sums that cancel.
    check = runner.equals(want, rtol=2**-7, atol=2**-6)
    found = cases.linear_cases(config, BATCH_SIZES[:2] if quick else BATCH_SIZES)
    for case in found[-8:] if quick else found:

        def make(case: cases.LinearCase = case) -> Inputs:
            dtype = reference.FP8 if case.fp8 else torch.bfloat16
            x = runner.randn(case.M, case.K, device=device, dtype=dtype)
            weight = (torch.randn(case.N, case.K, device=device) * (1 if case.fp8 else case.K**-0.5)).to(dtype)
            x_scale = torch.full((1,), 0.5, device=device) if case.fp8 else None
            weight_scale = torch.full((1,), 2 * case.K**-0.5, device=device) if case.fp8 else None
            out = torch.empty(case.M, case.N, dtype=torch.bfloat16, device=device)
            return Inputs(x, weight, x_scale, weight_scale, out)

        yield runner.Row(case, make, our_linear, {"torch": torch_linear}, check)


if __name__ == "__main__":
    runner.main("linear", __doc__, rows)
