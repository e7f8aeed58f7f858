# SPDX-License-Identifier: Apache-2.0
"""rms_norm and add_rms_norm, to e4m3 too (scale given or per token), and row_stats against torch, eager and compiled.

python bench/bench_norm.py [--device cuda|cpu] [--out bench/results/<device>/norm.json]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_fast import ops, reference
from nemotron_fast.testing import cases, compare, runner

EPS = 1e-5


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    residual: Tensor | None
    weight: Tensor
    out: Tensor
    scale: Tensor | None  # of an e4m3 out
    per_token: bool  # is the scale [T] and written, or [1] and read?


def our_norm(s: Inputs) -> Tensor:
    if s.scale is None and s.residual is None:
        ops.rms_norm(s.x, s.weight, EPS, out=s.out)
    elif s.scale is None:
        ops.add_rms_norm(s.x, s.residual, s.weight, EPS, out=s.out)
    elif not s.per_token and s.residual is None:
        ops.rms_norm_fp8(s.x, s.weight, s.scale, EPS, out=s.out)
    elif not s.per_token:
        ops.add_rms_norm_fp8(s.x, s.residual, s.weight, s.scale, EPS, out=s.out)
    elif s.residual is None:
        ops.rms_norm_fp8_per_token(s.x, s.weight, EPS, out=s.out, scale=s.scale)
    else:
        ops.add_rms_norm_fp8_per_token(s.x, s.residual, s.weight, EPS, out=s.out, scale=s.scale)
    return s.out


def torch_norm(s: Inputs) -> Tensor:
    """The same in torch. It allocates its result, which inside a graph costs no time."""
    x = s.x if s.residual is None else s.residual.add_(s.x)
    normed = functional.rms_norm(x, x.shape[-1:], s.weight, EPS)
    if s.scale is None:
        return normed
    if not s.per_token:
        return reference.quantize_fp8(normed, s.scale)
    out, scale = reference.quantize_fp8_per_token(normed)
    s.scale.copy_(scale)
    return out


def check(s: Inputs, call: runner.Call) -> None:
    summed = s.x if s.residual is None else s.x + s.residual
    s = s if s.residual is None else runner.cloned(s, "residual")
    want = reference.rms_norm(summed.double(), s.weight.double(), EPS)
    found = call(s)
    if s.scale is None:
        compare.assert_close(found, want, rtol=2**-6, atol=2**-10)  # two roundings to bf16, and one of slack
    else:  # one step of e4m3: a tie may go either way
        compare.assert_close(found.float() * s.scale.reshape(-1, 1), want, rtol=2**-3, atol=2**-6)
    if s.residual is not None:
        compare.assert_bit_equal(s.residual, summed)


def rows(device: torch.device, quick: bool) -> Iterator[runner.Row]:
    for case in cases.NORM_BENCH_CPU if quick else cases.NORM_BENCH:

        def make(case: cases.NormCase = case) -> Inputs:
            x = runner.randn(case.T, case.E, device=device)
            residual = torch.randn_like(x) if case.add else None
            out = torch.empty_like(x, dtype=reference.FP8 if case.fp8 else x.dtype)
            per_token = case.fp8 == "_fp8_per_token"
            scale = torch.full((case.T if per_token else 1,), 2**-3, device=device) if case.fp8 else None
            return Inputs(x, residual, runner.randn(case.E, device=device), out, scale, per_token)

        yield runner.Row(case, make, our_norm, runner.eager_and_compiled(torch_norm, device), check)
    for T in (1, 8) if quick else (1, 8, 16):
        case = cases.RowStatsCase(T, 8192)

        def make_rows(case: cases.RowStatsCase = case) -> tuple[Tensor, Tensor]:
            return runner.randn(case.T, case.X, device=device), runner.randn(case.X, device=device)

        peers = runner.eager_and_compiled(lambda s: reference.row_stats(*s), device)
        same = runner.equals(lambda s: reference.row_stats(*s), rtol=1e-5, atol=0.0)
        yield runner.Row(case, make_rows, lambda s: ops.row_stats(*s), peers, same)


if __name__ == "__main__":
    runner.main("norm", __doc__, rows)
