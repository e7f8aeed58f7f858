# SPDX-License-Identifier: Apache-2.0
"""The CUDA backends of embed, silu_mul, rope_append and the quantisation ops, against the CPU reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nemotron_fast import ops
from nemotron_fast.testing.compare import assert_as_good_as, assert_bit_equal, assert_close, poison

pytestmark = pytest.mark.gpu
FP8 = torch.float8_e4m3fn
PAGE = 64
HALF_TYPES = (torch.bfloat16, torch.float16)
on_half_types = pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def assert_replays(run: Callable[[], Tensor], inputs: list[Tensor], new: list[list[Tensor]]) -> None:
    """Captured once, `run` gives for every set of new inputs what it gives uncaptured."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for values in new:
        for tensor, value in zip(inputs, values, strict=True):
            tensor.copy_(value)
        graph.replay()
        found = out.clone()
        for tensor, value in zip(inputs, values, strict=True):
            tensor.copy_(value)
        assert_bit_equal(found, run())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T,V,E", [(0, 10, 16), (1, 100, 576), (7, 128, 8192), (300, 9, 264)])
def test_embed(T: int, V: int, E: int, dtype: torch.dtype) -> None:
    weight_VE = randn(V, E, dtype=dtype)
    ids_T = torch.randint(-2, V + 2, (T,), device="cuda")
    out_TE = ops.embed(ids_T, weight_VE, out=poison(T, E, dtype=dtype, device="cuda"))
    assert_bit_equal(out_TE.cpu(), ops.embed(ids_T.cpu(), weight_VE.cpu()))


@on_half_types
@pytest.mark.parametrize("T,F", [(0, 16), (1, 352), (5, 2816), (65, 28672), (3, 8)])
def test_silu_mul(T: int, F: int, dtype: torch.dtype) -> None:
    x_TX = randn(T, 2 * F, dtype=dtype, scale=4)
    if T:
        x_TX[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -20.0], device="cuda").to(dtype)
    out_TF = ops.silu_mul(x_TX, out=poison(T, F, dtype=dtype, device="cuda"))
    gate, up = x_TX.double()[:, :F], x_TX.double()[:, F:]
    peer = torch.nn.functional.silu(x_TX[:, :F].float()).mul(x_TX[:, F:].float()).to(dtype)
    assert_as_good_as(out_TF, peer, gate / (1 + (-gate).exp()) * up)
    assert_bit_equal(ops.silu_mul(x_TX), out_TF)


def test_silu_mul_in_a_graph_and_in_strided_rows() -> None:
    x = randn(5, 704, dtype=torch.bfloat16)
    wide = torch.cat((x, x), 1)[:, :704]
    assert_bit_equal(ops.silu_mul(wide), ops.silu_mul(x))
    assert_replays(lambda: ops.silu_mul(x), [x], [[randn(5, 704, dtype=torch.bfloat16)] for _ in range(3)])


@on_half_types
@pytest.mark.parametrize("T,X", [(0, 16), (1, 8), (1, 8192), (33, 352), (65, 28672)])
def test_quantize_fp8(T: int, X: int, dtype: torch.dtype) -> None:
    """Bit for bit the reference, saturation and NaN included."""
    x_TX = randn(T, X, dtype=dtype, scale=100)
    if T:
        x_TX[0, :5] = torch.tensor([float("nan"), 6e4, -6e4, 0.0, -0.0], device="cuda").to(dtype)
    scale = torch.tensor([0.37], device="cuda")
    out_TX = ops.quantize_fp8(x_TX, scale, out=poison(T, X, dtype=torch.float32, device="cuda").to(FP8))
    want = ops.quantize_fp8(x_TX.cpu(), scale.cpu())
    assert_bit_equal(out_TX.cpu().float().nan_to_num(999), want.float().nan_to_num(999))


@on_half_types
@pytest.mark.parametrize("T,X", [(0, 16), (1, 8), (1, 8192), (33, 352), (65, 28672), (4, 53248)])
def test_quantize_fp8_per_token(T: int, X: int, dtype: torch.dtype) -> None:
    x_TX = randn(T, X, dtype=dtype, scale=100)
    if T > 1:
        x_TX[1] = 0
    q_TX, scale_T = ops.quantize_fp8_per_token(
        x_TX,
        out=poison(T, X, dtype=torch.float32, device="cuda").to(FP8),
        scale=poison(T, dtype=torch.float32, device="cuda"),
    )
    want_q, want_scale = ops.quantize_fp8_per_token(x_TX.cpu())
    assert_bit_equal(scale_T.cpu(), want_scale)
    assert_bit_equal(q_TX.cpu().view(torch.uint8), want_q.view(torch.uint8))


@on_half_types
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("H,K,D", [(4, 1, 64), (3, 3, 80), (64, 8, 128), (16, 1, 112)])
@pytest.mark.parametrize("T,num_rotated", [(1, 1), (1, 0), (37, 37), (37, 5)])
def test_rope_append(T: int, num_rotated: int, H: int, K: int, D: int, fp8: bool, dtype: torch.dtype) -> None:
    """The reference on the CPU, to one rounding of the type; k and v land where they belong and nowhere else."""
    num_pages = 5
    cache_dtype = FP8 if fp8 else dtype
    qkv_TX = randn(T, (H + 2 * K) * D, dtype=dtype)
    angles = torch.rand(300, D // 2, device="cuda") * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.randint(0, 300, (T,), device="cuda")
    slots = torch.randperm(num_pages * PAGE, device="cuda")[:T]
    slots[8::9], slots[7::9] = -1, num_pages * PAGE  # outside
    caches = [torch.full((num_pages, K, PAGE, D), -9.0, device="cuda").to(cache_dtype) for _ in "kv"]
    on_cpu = [t.cpu().clone() for t in (qkv_TX, *caches)]
    before, scales = qkv_TX.clone(), {"k_scale": 0.5, "v_scale": 0.13, "num_rotated": num_rotated}
    ops.rope_append(qkv_TX, *caches, cos_sin, positions, slots, **scales)
    ops.rope_append(*on_cpu, cos_sin.cpu(), positions.cpu(), slots.cpu(), **scales)
    rounding = torch.finfo(dtype).eps
    assert_close(qkv_TX.cpu(), on_cpu[0], rtol=rounding, atol=rounding / 4)
    assert_bit_equal(qkv_TX[:, H * D :], before[:, H * D :])
    assert_bit_equal(qkv_TX[num_rotated:], before[num_rotated:])
    assert_bit_equal(caches[1].view(torch.uint8).cpu(), on_cpu[2].view(torch.uint8))
    assert_close(caches[0].float().cpu(), on_cpu[1].float(), rtol=2**-3 if fp8 else rounding, atol=rounding / 4)
    untouched = torch.ones(num_pages * PAGE, dtype=torch.bool)
    untouched[slots[(slots >= 0) & (slots < num_pages * PAGE)].cpu()] = False
    for cache in caches:
        stored = cache.float().cpu().transpose(1, 2).reshape(-1, K, D)
        assert (stored[untouched] == -9.0).all()


def test_rope_append_of_no_tokens() -> None:
    none = torch.zeros(0, dtype=torch.int64, device="cuda")
    caches = [torch.full((1, 1, PAGE, 64), -9.0, device="cuda").bfloat16() for _ in "kv"]
    ops.rope_append(randn(0, 256, dtype=torch.bfloat16), *caches, torch.ones(4, 64, device="cuda"), none, none)
    assert all((cache == -9.0).all() for cache in caches)


def test_rope_append_writes_no_foreign_slot() -> None:
    """Padding rows of a graph's batch may carry a slot outside of the cache."""
    qkv = randn(3, 4 * 64, dtype=torch.bfloat16)
    caches = [torch.full((1, 1, PAGE, 64), -9.0, device="cuda").bfloat16() for _ in "kv"]
    cos_sin = torch.ones(4, 64, device="cuda")
    positions = torch.zeros(3, dtype=torch.int64, device="cuda")
    ops.rope_append(qkv, *caches, cos_sin, positions, torch.tensor([-1, 64, 5], device="cuda"))
    for cache in caches:
        assert ((cache[0, 0] != -9.0).any(-1).nonzero().flatten() == 5).all()


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: ops.silu_mul(randn(2, 20, dtype=torch.bfloat16)[:, :12]), "row stride is 20, want a multiple of 8"),
        (lambda: ops.silu_mul(torch.zeros(2, 16, device="cuda")), "dtype is Float, want BFloat16 or Half"),
        (
            lambda: ops.embed(torch.zeros(1, dtype=torch.int32, device="cuda"), torch.zeros(2, 8, device="cuda")),
            "ids: dtype is Int, want Long",
        ),
        (
            lambda: ops.quantize_fp8(randn(1, 8, dtype=torch.bfloat16), torch.ones(2, device="cuda")),
            "scale: dim 0 is 2, want 1",
        ),
    ],
)
def test_rejects(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_opcheck() -> None:
    library, check = torch.ops.nemotron_fast, torch.library.opcheck
    x = randn(3, 64, dtype=torch.bfloat16)
    check(library.silu_mul.default, (torch.empty_like(x[:, :32]), x))
    check(library.embed.default, (torch.empty_like(x), torch.tensor([0, 2, 9], device="cuda"), x))
    # Not the ops with an e4m3 output: opcheck compares by torch.allclose, which has no e4m3 on CUDA.
