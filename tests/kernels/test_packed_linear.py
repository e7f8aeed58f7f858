# SPDX-License-Identifier: Apache-2.0
"""Packed weights and the linears that read them: the CPU backend against formulas, the CUDA kernels against both."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nemotron_fast import ops, packing, reference
from nemotron_fast.testing import compare

FP8 = reference.FP8
TYPES = (FP8, torch.bfloat16)
EDGES = [(16, 16), (48, 80), (352, 704), (576, 1536), (1536, 576)]  # N, K
SUPER_49B = [(10240, 8192), (8192, 8192), (5632, 8192), (8192, 2816), (8192, 5632), (8192, 7168), (8192, 17920)]
FEW, MANY = (1, 2, 7, 8, 9, 17, 32, 33, 64), (65, 128, 170, 200, 256, 300, 700)  # tokens; each by a kernel of its own

on_types = pytest.mark.parametrize("dtype", TYPES, ids=str)


@dataclass(frozen=True)
class Inputs:
    """Of a linear with up to 700 tokens, per-token and per-row scales."""

    x: Tensor
    weight: Tensor
    packed: Tensor
    x_scale: Tensor
    weight_scale: Tensor
    workspace: Tensor

    def run(self, tokens: int, out_dtype: torch.dtype = torch.float32) -> Tensor:
        out = compare.poison(tokens, self.weight.shape[0], dtype=out_dtype, device=self.x.device)
        scales = {"x_scale": self.x_scale[:tokens], "weight_scale": self.weight_scale}
        return ops.packed_linear(self.x[:tokens], self.packed, len(self.weight), self.workspace, out=out, **scales)

    def exact(self, tokens: int) -> Tensor:
        product = self.x[:tokens].double() @ self.weight.double().T
        return product * self.x_scale[:tokens, None] * self.weight_scale


def make(N: int, K: int, dtype: torch.dtype, device: str, *, gate_up: bool = False) -> Inputs:
    torch.manual_seed(N + K)
    weight = torch.randn(N, K, device=device).to(dtype)
    packed = packing.packed_shape(N, K, dtype)
    out = torch.full(packed, float("nan"), device=device).to(dtype)
    return Inputs(
        torch.randn(MANY[-1], K, device=device).to(dtype),
        weight,
        ops.pack_weight(weight, gate_up=gate_up, out=out),
        torch.rand(MANY[-1], device=device) + 0.5,
        torch.rand(N, device=device) + 0.5,
        packing.make_workspace(device),
    )


@on_types
@pytest.mark.parametrize("N, K", EDGES)
@pytest.mark.parametrize("gate_up", [False, True])
def test_pack_weight(N: int, K: int, gate_up: bool, dtype: torch.dtype) -> None:
    if gate_up and N % 32:
        pytest.skip("no gate_up weight has such an N")
    weight = torch.randn(N, K).to(dtype)
    packed = ops.pack_weight(weight, gate_up=gate_up)
    assert packed.view(torch.uint8).count_nonzero() == weight.view(torch.uint8).count_nonzero()  # the rest is zero
    compare.assert_bit_equal(packing.unpack_weight(packed, N, K, gate_up=gate_up), weight)


def test_pack_weight_places_chunks_as_specified() -> None:
    """Row 9 of the second block, chunk 2 of k tile 1: see csrc/host/weight_layout.h."""
    weight = torch.zeros(256, 256, dtype=FP8)
    weight[128 + 9, 128 + 2 * 16 + 5] = 1.0
    at = ops.pack_weight(weight).view(torch.uint8).flatten().nonzero().item()
    assert at == (1 * 2 + 1) * 16384 + 9 * 128 + (2 ^ 1) * 16 + 5


def test_packed_shape_rejects() -> None:
    with pytest.raises(ValueError, match=r"\[24, 64\] cannot be packed"):
        packing.packed_shape(24, 64, FP8)


@on_types
@pytest.mark.parametrize("N, K", EDGES)
def test_cpu_backend(N: int, K: int, dtype: torch.dtype) -> None:
    inputs = make(N, K, dtype, "cpu")
    compare.assert_close(inputs.run(7), inputs.exact(7), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("quantised", [False, True])
def test_cpu_epilogues(quantised: bool) -> None:
    check_swiglu(make(96, 80, torch.bfloat16, "cpu", gate_up=True), 5, quantised)
    check_add(make(48, 80, FP8, "cpu"), 5)


def check_swiglu(inputs: Inputs, tokens: int, quantised: bool) -> None:
    width = len(inputs.weight) // 2
    # gates of order 1: silu turns an absolute error of a gate, which grows with the sum, into a relative one
    weight_scale = inputs.weight_scale / inputs.weight.shape[1] ** 0.5
    out_scale = torch.full((1,), 2**-6, device=inputs.x.device) if quantised else None
    dtype = FP8 if quantised else torch.bfloat16
    out = torch.full((tokens, width), float("nan"), device=inputs.x.device).to(dtype)
    scales = {"x_scale": inputs.x_scale[:tokens], "weight_scale": weight_scale, "out_scale": out_scale}
    ops.packed_swiglu(inputs.x[:tokens], inputs.packed, width, inputs.workspace, out=out, **scales)
    exact = inputs.exact(tokens) / inputs.weight.shape[1] ** 0.5
    gate, up = exact.chunk(2, dim=-1)
    want = torch.nn.functional.silu(gate) * up
    if quantised:
        want = (want / out_scale).clamp(-448, 448)
    # two roundings to bf16 of values that are multiplied, one of the product; then half a step of e4m3
    size = want.square().mean().sqrt().item()
    error = 0.04 if inputs.weight.dtype == FP8 and tokens > FEW[-1] else 0.01  # of the gates
    compare.assert_close(out.float(), want, rtol=0.08 if quantised else 2**-6, atol=error * size)


def check_add(inputs: Inputs, tokens: int) -> None:
    residual = torch.randn(tokens, len(inputs.weight), device=inputs.x.device).mul(30).bfloat16()
    want = residual + inputs.run(tokens).bfloat16()
    scales = {"x_scale": inputs.x_scale[:tokens], "weight_scale": inputs.weight_scale}
    ops.packed_linear_add(inputs.x[:tokens], inputs.packed, residual, inputs.workspace, **scales)
    compare.assert_bit_equal(residual, want)


@pytest.mark.gpu
@on_types
@pytest.mark.parametrize("gate_up", [False, True])
def test_cuda_packs_the_same_bytes(gate_up: bool, dtype: torch.dtype) -> None:
    for N, K in [(32, 16), (1536, 576), (352, 704)]:
        weight = torch.randn(N, K).to(dtype)
        found = ops.pack_weight(weight.cuda(), gate_up=gate_up)
        compare.assert_bit_equal(found.cpu(), ops.pack_weight(weight, gate_up=gate_up))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_cuda_linear_right_behind_pack_weight(tokens: int) -> None:
    """Linears read their weight before they wait for the kernel ahead: here that is the one that packs it."""
    inputs = make(8192, 8192, FP8, "cuda")
    weights = [inputs.weight, torch.randn(8192, 8192, device="cuda").to(FP8)]
    scale = torch.ones(1, device="cuda")

    def pack_and_run(weight: Tensor, *, waits: bool = False) -> Tensor:
        packed = ops.pack_weight(weight, out=inputs.packed)
        if waits:
            torch.cuda.synchronize()
        scales = {"x_scale": scale, "weight_scale": scale}
        return ops.packed_linear(inputs.x[:tokens], packed, 8192, inputs.workspace, out_dtype=torch.float32, **scales)

    wanted = [pack_and_run(weight, waits=True) for weight in weights]
    found = [pack_and_run(weights[turn % 2]) for turn in range(20)]
    for turn, out in enumerate(found):
        compare.assert_bit_equal(out, wanted[turn % 2])


@pytest.mark.gpu
@on_types
@pytest.mark.parametrize("N, K", EDGES + SUPER_49B)
def test_cuda_kernel(N: int, K: int, dtype: torch.dtype) -> None:
    """Within its error; the same bits twice, and for a row alone or among others of the same kernel."""
    inputs = make(N, K, dtype, "cuda")
    # of the root of the sum of squared products: tensor cores keep 14 bits of sums in e4m3, of few tokens for 128 of K
    # and of many for 4096
    errors = (2e-3, 2.5e-2) if dtype == FP8 else (1e-4, 1e-4)
    for batches, error in zip((FEW, MANY), errors, strict=True):
        tolerance = 2.25 * error * K**0.5  # products of order 1
        everything = inputs.run(batches[-1])
        compare.assert_close(everything, inputs.exact(batches[-1]), rtol=0, atol=tolerance)
        for tokens in batches:
            out = inputs.run(tokens)
            compare.assert_bit_equal(out, inputs.run(tokens))
            compare.assert_bit_equal(out, everything[:tokens])
            compare.assert_bit_equal(inputs.run(tokens, torch.bfloat16), out.bfloat16())
    assert bool((inputs.workspace == 255).all())


@pytest.mark.gpu
@on_types
def test_cuda_epilogues(dtype: torch.dtype) -> None:
    for tokens in (1, 9, 17, 32, 64, 65, 200, 300):
        check_add(make(1536, 576, dtype, "cuda"), tokens)
        for quantised in (False, True):
            check_swiglu(make(1536, 576, dtype, "cuda", gate_up=True), tokens, quantised)
            check_swiglu(make(5632, 8192, dtype, "cuda", gate_up=True), tokens, quantised)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 100, 200, 300])
def test_cuda_graph_replays_with_new_inputs(tokens: int) -> None:
    """A chain of linears, each on the result of the one before, which overlap; against one at a time."""
    layers = [make(1536, 576, torch.bfloat16, "cuda"), make(576, 1536, torch.bfloat16, "cuda")] * 4
    workspace = layers[0].workspace

    def chain(x: Tensor, *, synchronize: bool) -> Tensor:
        for layer in layers:
            x = ops.packed_linear(x, layer.packed, len(layer.weight), workspace, weight_scale=layer.weight_scale / 30)
            if synchronize:
                torch.cuda.synchronize()
        return x

    x = layers[0].x[:tokens].clone()
    chain(x, synchronize=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x, synchronize=False)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        compare.assert_bit_equal(out, chain(x, synchronize=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [32, 64, 100, 200, 300])
def test_cuda_waits_for_scales_of_the_kernel_before(tokens: int) -> None:
    """A norm gives each row its scale while the linear that reads them has started."""
    inputs, norm = make(1536, 576, FP8, "cuda"), torch.ones(576, dtype=torch.bfloat16, device="cuda")
    rows = torch.randn(tokens, 576, dtype=torch.bfloat16, device="cuda")

    def step(*, synchronize: bool) -> Tensor:
        x, x_scale = ops.rms_norm_fp8_per_token(rows, norm, 1e-5)
        if synchronize:
            torch.cuda.synchronize()
        scales = {"x_scale": x_scale, "weight_scale": inputs.weight_scale}
        return ops.packed_linear(x, inputs.packed, len(inputs.weight), inputs.workspace, **scales)

    step(synchronize=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(synchronize=False)
    for seed in range(3):
        torch.manual_seed(seed)
        rows.copy_(torch.randn_like(rows))
        graph.replay()
        compare.assert_bit_equal(out, step(synchronize=True))


@pytest.mark.gpu
def test_rejects() -> None:
    inputs = make(64, 64, torch.bfloat16, "cuda")
    with pytest.raises(RuntimeError, match="x: dtype is Float, want BFloat16"):
        ops.packed_linear(inputs.x.float(), inputs.packed, 64, inputs.workspace)
    with pytest.raises(RuntimeError, match="workspace: is too small"):
        ops.packed_linear(inputs.x, inputs.packed, 64, inputs.workspace[:4096])
    with pytest.raises(RuntimeError, match="packed: dim 0 is 1, want 2"):
        ops.packed_linear(inputs.x, inputs.packed, 256, inputs.workspace)
