# SPDX-License-Identifier: Apache-2.0
"""Linears on packed weights against cuBLASLt through torch: every distinct shape of Super-49B, alone and as one step.

python bench/bench_packed_linear.py; a case's "-x49" is how often a forward pass has the shape. A "step" is all linears
of a forward pass in one CUDA graph, each weight in its own memory (FP8 layers, BF16 LM head; 49.9 GB): the time that
decides. On a CPU: the shapes of a small model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_fast import ops, packing, reference
from nemotron_fast.config import ModelConfig
from nemotron_fast.testing import cases, compare, runner

CONFIGS = Path(__file__).parents[1] / "tests" / "configs"
BATCH_SIZES = (1, 8, 64, 256)
STEP_BATCH_SIZES = (1, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    packed: Tensor
    x_scale: Tensor | None  # [1]; None for BF16
    weight_scale: Tensor | None
    workspace: Tensor
    out: Tensor


def packed_linear(s: Inputs) -> Tensor:
    scales = {"x_scale": s.x_scale, "weight_scale": s.weight_scale}
    return ops.packed_linear(s.x, s.packed, s.out.shape[1], s.workspace, out=s.out, **scales)


def packed_swiglu(s: Inputs) -> Tensor:
    scales = {"x_scale": s.x_scale, "weight_scale": s.weight_scale}
    return ops.packed_swiglu(s.x, s.packed, s.out.shape[1], s.workspace, out=s.out, **scales)


def packed_linear_add(s: Inputs) -> Tensor:
    ops.packed_linear_add(s.x, s.packed, s.out, s.workspace, x_scale=s.x_scale, weight_scale=s.weight_scale)
    return s.out


def torch_linear(s: Inputs) -> Tensor:
    if s.x_scale is None:
        return functional.linear(s.x, s.weight)
    return torch._scaled_mm(s.x, s.weight.T, s.x_scale, s.weight_scale, out_dtype=s.out.dtype, use_fast_accum=True)


def torch_swiglu(s: Inputs) -> Tensor:
    gate, up = torch_linear(s).chunk(2, dim=-1)
    return functional.silu(gate) * up


def want_linear(s: Inputs) -> Tensor:
    scales = (s.x_scale, s.weight_scale) if s.x_scale is not None else (1.0, 1.0)
    return functional.linear(s.x.float() * scales[0], s.weight.float() * scales[1])


def want_swiglu(s: Inputs) -> Tensor:
    return reference.silu_mul(want_linear(s))


def check_add(s: Inputs, call: runner.Call) -> None:
    want = s.out.float() + want_linear(s)
    compare.assert_close(call(s), want, rtol=2**-6, atol=2**-5)


def check_pack(s: Inputs, call: runner.Call) -> None:
    compare.assert_bit_equal(packing.unpack_weight(call(s), *s.weight.shape), s.weight)


def make_inputs(case: cases.PackedCase, device: torch.device) -> Inputs:
    dtype = reference.FP8 if case.fp8 else torch.bfloat16
    weight = (torch.randn(case.N, case.K, device=device) * (1 if case.fp8 else case.K**-0.5)).to(dtype)
    swiglu = case.op == "packed_swiglu"
    return Inputs(
        x=runner.randn(case.M, case.K, device=device, dtype=dtype),
        weight=weight,
        packed=ops.pack_weight(weight, gate_up=swiglu),
        x_scale=torch.full((1,), 0.5, device=device) if case.fp8 else None,
        weight_scale=torch.full((1,), 2 * case.K**-0.5, device=device) if case.fp8 else None,
        workspace=workspace_on(device),
        out=runner.randn(case.M, case.N // 2 if swiglu else case.N, device=device),
    )


@cache
def workspace_on(device: torch.device) -> Tensor:
    return packing.make_workspace(device)


@dataclass(frozen=True)
class StepCase:
    """All linears of a step with M tokens."""

    M: int
    linears: tuple[cases.PackedCase, ...]  # each `count` times

    op = "packed_linear"

    def __str__(self) -> str:
        return f"step-M{self.M}"

    @property
    def cost(self) -> cases.Cost:
        costs = [(c.count, c.cost) for c in self.linears]
        return cases.Cost(sum(n * c.num_bytes for n, c in costs), sum(n * c.flops for n, c in costs))


def make_step(case: StepCase, device: torch.device) -> list[Inputs]:
    """For timing only: the same random memory is read as a weight [N, K] and as a packed one."""
    step = []
    for linear in case.linears:
        one = make_inputs(linear, device)
        for _ in range(linear.count):
            packed = one.packed.clone()
            aligned = linear.N % packing.BLOCK_ROWS == 0 and packed.numel() == one.weight.numel()
            weight = packed.view(linear.N, linear.K) if aligned else one.weight.clone()
            step.append(Inputs(one.x, weight, packed, one.x_scale, one.weight_scale, one.workspace, one.out))
    return step


def step_with(call: runner.Call) -> runner.Call:
    return lambda step: [call(inputs) for inputs in step]


def check_step(step: list[Inputs], call: runner.Call) -> None:
    assert all(bool(out.isfinite().all()) for out in call(step))


# The sum of K products of order 1, rounded to BF16, for sums in e4m3 of some 14 bits.
check_14_bits = runner.equals(want_linear, rtol=2**-6, atol=2**-4)


def linear_check(case: cases.LinearCase) -> runner.Check:
    """Of many tokens in e4m3 up to 4096 products are added in 14 bits; of few 128, the rest is in FP32."""
    return check_14_bits if case.fp8 and case.M > 64 else runner.equals(want_linear, rtol=2**-7, atol=2**-6)


def rows(device: torch.device, quick: bool) -> Iterator[runner.Row]:
    config = ModelConfig.from_path(CONFIGS / ("mini-all-blocks.json" if quick else "super-49b-v1.json"))
    check_swiglu = runner.equals(want_swiglu, rtol=2**-5, atol=2**-5)
    found = [c for c in cases.linear_cases(config, BATCH_SIZES[:2] if quick else BATCH_SIZES) if not (c.N | c.K) % 16]
    for linear in found[-8:] if quick else found:
        case = cases.PackedCase(linear.M, linear.N, linear.K, linear.fp8, linear.count)
        make = lambda c=case: make_inputs(c, device)  # noqa: E731
        yield runner.Row(case, make, packed_linear, {"torch": torch_linear}, linear_check(case), check_14_bits)
    hidden, width = (256, 512) if quick else (8192, 28672)
    for M in BATCH_SIZES:
        case = cases.PackedCase(M, 2 * width, hidden, True, op="packed_swiglu")
        make = lambda c=case: make_inputs(c, device)  # noqa: E731
        yield runner.Row(case, make, packed_swiglu, {"torch": torch_swiglu}, check_swiglu)
        case = cases.PackedCase(M, hidden, width, True, op="packed_linear_add")
        make = lambda c=case: make_inputs(c, device)  # noqa: E731
        peer = {"torch": lambda s: s.out.add_(torch_linear(s))}
        yield runner.Row(case, make, packed_linear_add, peer, check_add)
    case = cases.PackedCase(0, hidden, width, True, op="pack_weight")
    make = lambda c=case: make_inputs(c, device)  # noqa: E731
    yield runner.Row(case, make, lambda s: ops.pack_weight(s.weight, out=s.packed), {}, check_pack)
    for M in STEP_BATCH_SIZES[:1] if quick else STEP_BATCH_SIZES:
        linears = (c for c in cases.linear_cases(config, (M,)) if not (c.N | c.K) % 16)
        # of each shape what a quantised checkpoint has: FP8, and BF16 for the LM head alone
        kept = {(c.N, c.K): cases.PackedCase(M, c.N, c.K, c.fp8, c.count) for c in sorted(linears, key=lambda c: c.fp8)}
        step = StepCase(M, tuple(kept.values())[-2:] if quick else tuple(kept.values()))
        make_once = cache(lambda s=step: make_step(s, device))  # one set is far more than L2
        yield runner.Row(step, make_once, step_with(packed_linear), {"torch": step_with(torch_linear)}, check_step)


if __name__ == "__main__":
    runner.main("packed_linear", __doc__, rows)
