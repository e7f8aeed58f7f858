# SPDX-License-Identifier: Apache-2.0
"""Rows with statistics: made, and read and left by the packed linears, on both backends."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nemotron_fast import ops, packing, reference
from nemotron_fast.ops import RowStats
from nemotron_fast.testing import compare

EPS = 1e-5
FP8, BF16 = reference.FP8, torch.bfloat16
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
on_devices = pytest.mark.parametrize("device", DEVICES)
on_types = pytest.mark.parametrize("dtype", (FP8, BF16), ids=str)
TOKENS = (1, 2, 5, 8, 9, 16)
SHAPES = [(48, 80), (576, 1536), (1536, 576), (5632, 8192), (8192, 2816)]  # N, K


def make_rows(T: int, X: int, device: str, *, norm: bool = True) -> tuple[Tensor, Tensor | None]:
    """x [T, X] inside wider rows, some of them far from unit size, and the norm's weight."""
    size = torch.tensor([1.0, 30.0, 0.01], device=device)[torch.arange(T, device=device) % 3, None]
    x = (torch.randn(T, X + 16, device=device) * size).bfloat16()[:, :X]
    return x, torch.randn(X, device=device).bfloat16() if norm else None


@on_devices
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("T,X", [(0, 64), (1, 8), (3, 136), (7, 8192), (64, 2816)])
def test_stats(T: int, X: int, norm: bool, device: str) -> None:
    x, weight = make_rows(T, X, device, norm=norm)
    out = compare.poison(T, -(-X // 128), 2, dtype=torch.float32, device=device)
    ops.row_stats(x, weight, out=out)
    largest = x.double().abs() if weight is None else (x.double() * weight.double()).abs()
    for block, columns in enumerate(torch.arange(X).split(128)):
        compare.assert_close(out[:, block, 0], x[:, columns].double().square().sum(-1), rtol=1e-6)
        compare.assert_close(out[:, block, 1], largest[:, columns].amax(-1), rtol=1e-6)


@dataclass(frozen=True)
class Layer:
    """A packed weight with scales of order K^-1/2, for results of order 1."""

    weight: Tensor
    packed: Tensor
    scale: Tensor  # [N]
    workspace: Tensor


def make_layer(N: int, K: int, dtype: torch.dtype, device: str, *, gate_up: bool = False) -> Layer:
    torch.manual_seed(N + K)
    weight = torch.randn(N, K, device=device).to(dtype)
    scale = (torch.rand(N, device=device) + 0.5) * K**-0.5
    return Layer(weight, ops.pack_weight(weight, gate_up=gate_up), scale, packing.make_workspace(device))


def ready(x: Tensor, rows: RowStats, dtype: torch.dtype, static: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the linear makes of x, by the norm and quantise ops."""
    zeros, x = torch.zeros_like(x), x.clone()
    if rows.norm_weight is None:
        if dtype == BF16:
            return x, None
        return ops.quantize_fp8_per_token(x) if static is None else (ops.quantize_fp8(x, static), static)
    if dtype == BF16:
        return ops.add_rms_norm(zeros, x, rows.norm_weight, EPS), None
    if static is None:
        return ops.add_rms_norm_fp8_per_token(zeros, x, rows.norm_weight, EPS)
    return ops.add_rms_norm_fp8(zeros, x, rows.norm_weight, static, EPS), static


@on_devices
@on_types
@pytest.mark.parametrize("N,K", SHAPES)
def test_linear_reads_rows(N: int, K: int, dtype: torch.dtype, device: str) -> None:
    """The same bits as the norm or quantise op and the linear one after the other."""
    if device == "cpu" and N * K > 1 << 20:
        pytest.skip("a large shape")
    layer = make_layer(N, K, dtype, device)
    statics = (None,) if dtype == BF16 else (None, torch.full((1,), 2**-5, device=device))
    for T, norm, static in ((T, norm, static) for T in TOKENS for norm in (False, True) for static in statics):
        x, weight = make_rows(T, K, device, norm=norm)
        rows = RowStats(ops.row_stats(x, weight), weight, EPS)
        out = compare.poison(T, N, dtype=torch.float32, device=device)
        weights = (layer.packed, N, layer.workspace)
        ops.packed_linear(x, *weights, x_scale=static, weight_scale=layer.scale, x_rows=rows, out=out)
        y, y_scale = ready(x, rows, dtype, static)
        want = ops.packed_linear(y, *weights, x_scale=y_scale, weight_scale=layer.scale, out=torch.empty_like(out))
        compare.assert_bit_equal(out, want)


@on_devices
@on_types
@pytest.mark.parametrize("T", [1, 7, 9, 16])
def test_epilogues_leave_stats(T: int, dtype: torch.dtype, device: str) -> None:
    """The statistics that packed_linear_add and packed_swiglu leave are those of what they wrote."""
    N, K = 1536, 576
    x, _ = make_rows(T, K, device, norm=False)
    args = {"x_scale": None, "weight_scale": None}
    layer = make_layer(N, K, dtype, device)
    args["weight_scale"] = layer.scale
    if dtype == FP8:
        x, args["x_scale"] = ops.quantize_fp8_per_token(x)
    residual, weight = make_rows(T, N, device)
    residual = residual.contiguous()
    stats = compare.poison(T, N // 128, 2, dtype=torch.float32, device=device)
    ops.packed_linear_add(x, layer.packed, residual, layer.workspace, out_stats=stats, next_norm_weight=weight, **args)
    compare.assert_close(stats, reference.row_stats(residual, weight), rtol=1e-5)

    layer = make_layer(N, K, dtype, device, gate_up=True)
    args["weight_scale"] = layer.scale
    stats = compare.poison(T, N // 128, 2, dtype=torch.float32, device=device)
    h = ops.packed_swiglu(x, layer.packed, N // 2, layer.workspace, out_stats=stats, **args)
    compare.assert_close(stats, reference.row_stats(h, None, 64), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 7, 16])
def test_cuda_chain_in_a_graph(T: int) -> None:
    """Layers on each other's rows, overlapping, against one kernel at a time."""
    E, F = 2816, 5632
    ups = [make_layer(2 * F, E, FP8, "cuda", gate_up=True) for _ in range(2)]
    downs = [make_layer(E, F, FP8, "cuda") for _ in range(2)]
    norm = torch.rand(E, device="cuda").add(0.5).bfloat16()
    workspace = ups[0].workspace

    def chain(residual: Tensor, *, synchronize: bool) -> Tensor:
        stats = ops.row_stats(residual, norm)
        for up, down in zip(ups * 3, downs * 3, strict=True):
            h_stats = torch.empty(T, F // 64, 2, device="cuda")
            h = ops.packed_swiglu(
                residual, up.packed, F, workspace, weight_scale=up.scale, x_rows=RowStats(stats, norm, EPS),
                out_stats=h_stats,
            )  # fmt: skip
            if synchronize:
                torch.cuda.synchronize()
            stats = torch.empty(T, E // 128, 2, device="cuda")
            ops.packed_linear_add(
                h, down.packed, residual, workspace, weight_scale=down.scale, x_rows=RowStats(h_stats),
                out_stats=stats, next_norm_weight=norm,
            )  # fmt: skip
            if synchronize:
                torch.cuda.synchronize()
        return residual

    static = torch.randn(T, E, device="cuda").bfloat16()
    chain(static.clone(), synchronize=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(static, synchronize=False)
    for seed in range(3):
        torch.manual_seed(seed)
        start = torch.randn(T, E, device="cuda").bfloat16()
        static.copy_(start)
        graph.replay()
        torch.cuda.synchronize()
        found = static.clone()
        compare.assert_bit_equal(found, chain(start, synchronize=True))


@pytest.mark.gpu
def test_rejects() -> None:
    layer = make_layer(64, 64, FP8, "cuda")
    x, weight = make_rows(17, 64, "cuda")
    rows = RowStats(ops.row_stats(x, weight), weight, EPS)
    with pytest.raises(RuntimeError, match="x: dim 0 is 17, want at most 16"):
        ops.packed_linear(x, layer.packed, 64, layer.workspace, x_rows=rows)
    with pytest.raises(RuntimeError, match="x_scale: is one per token"):
        one = RowStats(rows.stats[:2], weight, EPS)
        ops.packed_linear(x[:2], layer.packed, 64, layer.workspace, x_rows=one, x_scale=torch.ones(2, device="cuda"))
    with pytest.raises(RuntimeError, match="stats: dim 0 is 17, want 2"):
        ops.packed_linear(x[:2], layer.packed, 64, layer.workspace, x_rows=rows)
    with pytest.raises(RuntimeError, match="out_stats: dim 1 is 2, want 1"):
        stats = torch.empty(1, 2, 2, device="cuda")
        y = torch.zeros(1, 64, device="cuda").to(FP8)
        ops.packed_linear_add(y, layer.packed, x[:1].contiguous(), layer.workspace, out_stats=stats)
