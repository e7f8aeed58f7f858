# SPDX-License-Identifier: Apache-2.0
"""Linears of many tokens against cuBLASLt through torch: every layer shape of Super-49B, and a whole gated MLP.

python bench/bench_gemm.py; a case's "-x49" is how often a forward pass has the shape. FP8 has three peers: per-tensor
scales with fast and with full accumulation, and scales of rows. On a CPU: the shapes of a small model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import bench_packed_linear as packed
import torch
from torch import Tensor

from nemotron_fast import ops, reference
from nemotron_fast.config import ModelConfig
from nemotron_fast.testing import cases, runner

BATCH_SIZES = (128, 256, 2048, 8192)
MLP_BATCH_SIZES = (2048, 8192)


@dataclass(frozen=True)
class Inputs(packed.Inputs):
    """With the same scales once per token and row too; None for BF16."""

    x_scales: Tensor | None  # [M, 1]
    weight_scales: Tensor | None  # [1, N]


def make_inputs(case: cases.PackedCase, device: torch.device) -> Inputs:
    s = packed.make_inputs(case, device)
    if not case.fp8:
        return Inputs(**vars(s), x_scales=None, weight_scales=None)
    x_scales, weight_scales = s.x_scale.expand(case.M, 1).contiguous(), s.weight_scale.expand(1, case.N).contiguous()
    return Inputs(**vars(s), x_scales=x_scales, weight_scales=weight_scales)


def scaled_mm(s: Inputs, *, fast: bool) -> Tensor:
    return torch._scaled_mm(s.x, s.weight.T, s.x_scale, s.weight_scale, out_dtype=s.out.dtype, use_fast_accum=fast)


def scaled_mm_rowwise(s: Inputs) -> Tensor:
    return torch._scaled_mm(s.x, s.weight.T, s.x_scales, s.weight_scales, out_dtype=s.out.dtype, use_fast_accum=True)


FP8_PEERS = {
    "cuBLASLt fast": partial(scaled_mm, fast=True),
    "cuBLASLt": partial(scaled_mm, fast=False),
    "cuBLASLt rowwise": scaled_mm_rowwise,
}


@dataclass(frozen=True)
class MLPCase:
    """gate_up, SwiGLU, quantisation and down of M tokens, all operands FP8."""

    M: int
    width: int
    hidden: int

    op = "packed_swiglu"

    def __str__(self) -> str:
        return f"mlp-M{self.M}-F{self.width}"

    @property
    def cost(self) -> cases.Cost:
        linears = [cases.PackedCase(self.M, *shape, True) for shape in self.shapes]
        return cases.Cost(sum(c.cost.num_bytes for c in linears), sum(c.cost.flops for c in linears))

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """N, K of gate_up and of down."""
        return (2 * self.width, self.hidden), (self.hidden, self.width)


@dataclass(frozen=True)
class MLP:
    gate_up: packed.Inputs
    down: packed.Inputs
    h_scale: Tensor  # [1], of down's input


def make_mlp(case: MLPCase, device: torch.device) -> MLP:
    (up_rows, hidden), (_, width) = case.shapes
    gate_up = packed.make_inputs(cases.PackedCase(case.M, up_rows, hidden, True, op="packed_swiglu"), device)
    down = packed.make_inputs(cases.PackedCase(case.M, hidden, width, True), device)
    return MLP(gate_up, down, torch.full((1,), 0.01, device=device))


def packed_mlp(s: MLP) -> Tensor:
    up, down = s.gate_up, s.down
    scales = {"x_scale": up.x_scale, "weight_scale": up.weight_scale, "out_scale": s.h_scale}
    h = ops.packed_swiglu(up.x, up.packed, down.x.shape[1], up.workspace, out=down.x, **scales)
    scales = {"x_scale": s.h_scale, "weight_scale": down.weight_scale}
    return ops.packed_linear(h, down.packed, len(down.weight), down.workspace, out=down.out, **scales)


def torch_mlp(s: MLP, silu_mul_fp8: runner.Call) -> Tensor:
    up, down = s.gate_up, s.down
    scale, fast = torch._scaled_mm, {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    gate_up = scale(up.x, up.weight.T, up.x_scale, up.weight_scale, **fast)
    return scale(silu_mul_fp8((gate_up, s.h_scale)), down.weight.T, s.h_scale, down.weight_scale, **fast)


def silu_mul_fp8(inputs: tuple[Tensor, Tensor]) -> Tensor:
    """One elementwise kernel once compiled."""
    gate_up, scale = inputs
    return reference.quantize_fp8(reference.silu_mul(gate_up).bfloat16(), scale)


def check_mlp(s: MLP, call: runner.Call) -> None:
    out = call(s).float()
    gate_up = packed.want_linear(s.gate_up).bfloat16()
    h = silu_mul_fp8((gate_up, s.h_scale)).float() * s.h_scale
    want = h @ (s.down.weight.float() * s.down.weight_scale).T
    error = (out - want).norm() / want.norm()  # a value of h that rounds the other way is a whole e4m3 step off
    assert error < 0.02, f"relative error {error.item():.3g}, want < 0.02"


def rows(device: torch.device, quick: bool) -> Iterator[runner.Row]:
    name = "mini-all-blocks.json" if quick else "super-49b-v1.json"
    config = ModelConfig.from_path(packed.CONFIGS / name)
    on_gpu = device.type == "cuda"
    layers = [c for c in cases.linear_cases(config, (4, 70) if quick else BATCH_SIZES) if c.fp8 or c.count > 1]
    found = [c for c in layers if not (c.N | c.K) % 16 and (c.fp8 or quick or c.M > 256)]
    for linear in found[-4:] if quick else found:
        case = cases.PackedCase(linear.M, linear.N, linear.K, linear.fp8, linear.count)
        peers = (FP8_PEERS if on_gpu else {}) if linear.fp8 else {"torch": packed.torch_linear}
        make = partial(make_inputs, case, device)
        check = packed.linear_check(case)
        yield runner.Row(case, make, packed.packed_linear, peers, check, packed.check_14_bits)
    fused = torch.compile(silu_mul_fp8, dynamic=False) if on_gpu else silu_mul_fp8
    for M in (8,) if quick else MLP_BATCH_SIZES:
        case = MLPCase(M, 512, 256) if quick else MLPCase(M, 28672, 8192)
        peers = {"cuBLASLt + one kernel": partial(torch_mlp, silu_mul_fp8=fused)} if on_gpu else {}
        yield runner.Row(case, partial(make_mlp, case, device), packed_mlp, peers, check_mlp)


if __name__ == "__main__":
    runner.main("gemm", __doc__, rows)
