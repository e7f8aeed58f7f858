# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend of decode_attention: bit for bit rope_append, attention and quantize_fp8, caches included."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nemotron_fast import ops
from nemotron_fast.testing.compare import assert_bit_equal, poison

pytestmark = pytest.mark.gpu
FP8 = torch.float8_e4m3fn
PAGE = 64
LENGTHS = [(1, 1), (1, 64), (1, 65), (1, 256), (1, 257), (1, 2048), (1, 5000)]  # new tokens, all tokens
SPECULATIVE = [(8, 8), (2, 65), (1, 300), (3, 3), (5, 4097), (7, 130)]


@dataclass
class Step:
    """One decode step; in the caches NaN wherever nothing is cached yet."""

    shape: list[tuple[int, int]]
    H: int
    K: int
    D: int = 128
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator("cuda").manual_seed(self.seed)
        pages = [-(-length // PAGE) for _, length in self.shape]
        order = torch.randperm(sum(pages) + 2, generator=g, device="cuda")
        self.table = torch.zeros(len(pages), max(pages), dtype=torch.int64, device="cuda")
        old = torch.zeros(len(order), PAGE, dtype=torch.bool, device="cuda")
        positions, slots, used = [], [], 0
        for s, (count, (new, length)) in enumerate(zip(pages, self.shape, strict=True)):
            mine = order[used : used + count]
            used += count
            self.table[s, :count] = mine
            old[mine] = torch.arange(count * PAGE, device="cuda").view(count, PAGE) < length - new
            mine_positions = torch.arange(length - new, length, device="cuda")
            positions.append(mine_positions)
            slots.append(mine[mine_positions // PAGE] * PAGE + mine_positions % PAGE)
        self.positions, self.slots = torch.cat(positions), torch.cat(slots)
        size = (len(order), self.K, PAGE, self.D)
        caches = [torch.randn(size, generator=g, device="cuda") * 2 for _ in "kv"]
        self.caches = [torch.where(old[:, None, :, None], c, float("nan")).to(self.kv_dtype) for c in caches]
        new = [n for n, _ in self.shape]
        width = (self.H + 2 * self.K) * self.D
        self.qkv = (torch.randn(sum(new), width, generator=g, device="cuda") * 2).to(self.dtype)
        angles = torch.rand(max(length for _, length in self.shape), self.D // 2, generator=g, device="cuda") * 6
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        self.q_start = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], device="cuda")
        self.kv_len = torch.tensor([n for _, n in self.shape], device="cuda")
        self.scales = {"k_scale": 0.5, "v_scale": 0.25} if self.kv_dtype == FP8 else {}
        # What the op reads early must be complete before it is launched.
        torch.cuda.synchronize()

    @property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.table, self.q_start, self.kv_len

    def composed(self) -> tuple[Tensor, list[Tensor]]:
        qkv, caches = self.qkv.clone(), [c.clone() for c in self.caches]
        ops.rope_append(qkv, *caches, self.cos_sin, self.positions, self.slots, **self.scales)
        q = qkv.view(len(qkv), -1, self.D)[:, : self.H]
        return ops.attention(q, *caches, *self.sequences, softmax_scale=self.D**-0.5, **self.scales), caches

    def fused(self, out_scale: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        caches = [c.clone() for c in self.caches]
        torch.cuda.synchronize()
        out = poison(len(self.qkv), self.H, self.D, dtype=self.dtype if out_scale is None else FP8, device="cuda")
        rest = {"softmax_scale": self.D**-0.5, "out_scale": out_scale, "out": out, **self.scales}
        return ops.decode_attention(self.qkv, *caches, self.cos_sin, *self.sequences, **rest), caches


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8 if x.dtype == FP8 else torch.int16)


def check(step: Step) -> None:
    want, want_caches = step.composed()
    got, caches = step.fused()
    assert got.isfinite().all()
    assert_bit_equal(got, want)
    for cache, want_cache in zip(caches, want_caches, strict=True):
        assert_bit_equal(bits(cache), bits(want_cache))


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("H,K", [(64, 8), (128, 8), (9, 3), (5, 1)])
@pytest.mark.parametrize("shape", [LENGTHS, SPECULATIVE], ids=["one token", "several tokens"])
def test_equals_its_parts(shape: list[tuple[int, int]], H: int, K: int, D: int, kv_dtype: torch.dtype) -> None:
    check(Step(shape, H, K, D, kv_dtype=kv_dtype))


@pytest.mark.parametrize("kv_dtype", [torch.float16, FP8], ids=str)
def test_half(kv_dtype: torch.dtype) -> None:
    for count in (1, 8):  # few pairs and many
        check(Step(LENGTHS * count, 16, 2, dtype=torch.float16, kv_dtype=kv_dtype))


@pytest.mark.parametrize("length", [1, 128, 1024, 8192])
def test_one_sequence(length: int) -> None:
    check(Step([(1, length)], 64, 8))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("padding", [1, 300])
def test_padding_rows_are_zero(padding: int, scaled: bool) -> None:
    """Sequences without tokens, and rows of NaN for them, as a padded step has."""
    step, scale = Step(LENGTHS, 64, 8), torch.tensor([0.01], device="cuda") if scaled else None
    want, want_caches = step.fused(scale)
    step.qkv = torch.nn.functional.pad(step.qkv, (0, 0, 0, padding), value=float("nan"))
    step.table = torch.nn.functional.pad(step.table, (0, 0, 0, padding))
    step.kv_len = torch.nn.functional.pad(step.kv_len, (0, padding))
    step.q_start = torch.cat((step.q_start, step.q_start[-1:].expand(padding)))
    got, caches = step.fused(scale)
    assert_bit_equal(bits(got[: len(want)]), bits(want))
    assert not bits(got[len(want) :]).any()
    for cache, want_cache in zip(caches, want_caches, strict=True):
        assert_bit_equal(bits(cache), bits(want_cache))


def test_fp8_output() -> None:
    step = Step(LENGTHS, 64, 8)
    scale = torch.tensor([0.01], device="cuda")
    want = ops.quantize_fp8(step.composed()[0].flatten(1), scale)
    got, _ = step.fused(scale)
    assert_bit_equal(bits(got).flatten(1), bits(want))


def test_many_replays_in_a_chain() -> None:
    """Launches that overlap, twenty in a graph, each with caches and an output of its own."""
    step = Step([(1, 900)], 64, 8)
    want, _ = step.composed()
    step.fused()  # takes the workspace
    caches = [[c.clone() for c in step.caches] for _ in range(20)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rest = {"softmax_scale": 128**-0.5}
        outs = [ops.decode_attention(step.qkv, *c, step.cos_sin, *step.sequences, **rest) for c in caches]
    for _ in range(50):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        for out in outs:
            assert_bit_equal(out, want)


def test_rejects() -> None:
    step = Step([(1, 5)], 8, 1)
    with pytest.raises(RuntimeError, match="T=9 of S=1"):
        ops.decode_attention(step.qkv.repeat(9, 1), *step.caches, step.cos_sin, *step.sequences, softmax_scale=1.0)
    with pytest.raises(RuntimeError, match="dim 1 is 256, want"):
        ops.decode_attention(step.qkv[:, :256], *step.caches, step.cos_sin, *step.sequences, softmax_scale=1.0)


def test_opcheck() -> None:
    step = Step([(1, 70)], 8, 1)
    out = torch.empty(1, 8, 128, dtype=torch.bfloat16, device="cuda")
    args = (out, step.qkv, *step.caches, step.cos_sin, *step.sequences, 0.1, 1.0, 1.0, None)
    torch.library.opcheck(torch.ops.nemotron_fast.decode_attention.default, args)
