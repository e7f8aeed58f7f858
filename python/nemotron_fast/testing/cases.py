# SPDX-License-Identifier: Apache-2.0
"""The shapes that matter, one frozen dataclass per op family, with what a call costs beside it.

Tests and benchmarks take their shapes from here and nowhere else. A family has `<FAMILY>_TESTS`, small and nasty,
and `<FAMILY>_BENCH`, the shapes of the real models.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from nemotron_fast.config import ModelConfig
from nemotron_fast.sharding import param_plan

BF16_BYTES = 2  # of every activation that a benchmark moves
LLAMA3_VOCAB = 128256


@dataclass(frozen=True)
class Cost:
    """Least traffic and arithmetic of one call: the roofline's two axes."""

    num_bytes: int
    flops: int


class Case(Protocol):
    """What a benchmark needs of a case; str() names it."""

    @property
    def op(self) -> str: ...

    @property
    def cost(self) -> Cost: ...


@dataclass(frozen=True)
class NormCase:
    """rms_norm or, with `add`, add_rms_norm, on x [T, E]; `strided`: inside a tensor of rows twice as wide; `fp8`: to
    e4m3, "_fp8" with a given scale, "_fp8_per_token" with one per token."""

    T: int
    E: int
    add: bool = False
    strided: bool = False
    fp8: str = ""

    def __str__(self) -> str:
        return f"{self.op}-T{self.T}-E{self.E}{'-strided' if self.strided else ''}"

    @property
    def op(self) -> str:
        return ("add_" if self.add else "") + "rms_norm" + self.fp8

    @property
    def cost(self) -> Cost:
        """Reads x and weight, writes out; with `add` also reads and writes the residual."""
        elements = self.T * self.E
        out_bytes = elements * (1 if self.fp8 else BF16_BYTES)
        flops = 4 + self.add + 3 * bool(self.fp8)
        return Cost(out_bytes + ((3 if self.add else 1) * elements + self.E) * BF16_BYTES, flops * elements)


@dataclass(frozen=True)
class RowStatsCase:
    """row_stats of x [T, X] with a norm's weight."""

    T: int
    X: int

    op = "row_stats"

    def __str__(self) -> str:
        return f"{self.op}-T{self.T}-X{self.X}"

    @property
    def cost(self) -> Cost:
        return Cost((self.T + 1) * self.X * BF16_BYTES, 4 * self.T * self.X)


_MANY_ROWS = ((300, 4096), (300, 4112), (600, 5376), (257, 2064))  # whose config is not that of few
NORM_TESTS = (
    *(NormCase(T, E, add) for T, E, add in product((1, 2, 7, 65), (256, 576, 4096, 8192, 16384), (False, True))),
    *(NormCase(T, 8192, add) for T, add in product((0, 64, 1024), (False, True))),
    *(NormCase(5, E, add, strided=True) for E, add in product((576, 8192), (False, True))),
    *(NormCase(T, E, add) for (T, E), add in product(_MANY_ROWS, (False, True))),
    NormCase(3, 8),  # one vector
    NormCase(3, 4104, add=True),  # one vector more than a full CTA
    NormCase(2, 32768),  # the widest row
)
_NORM_KINDS = tuple(product((False, True), ("", "_fp8", "_fp8_per_token")))  # add, fp8
NORM_BENCH = tuple(
    NormCase(T, E, add, fp8=fp8) for E, (add, fp8), T in product((8192, 16384), _NORM_KINDS, (1, 16, 64, 1024, 8192))
)
NORM_BENCH_CPU = tuple(NormCase(T, 8192, add, fp8=fp8) for (add, fp8), T in product(_NORM_KINDS, (1, 64)))


@dataclass(frozen=True)
class LinearCase:
    """x [M, K] @ weight [N, K]^T in BF16 or, with `fp8`, of e4m3 operands; a forward pass has `count` of this shape."""

    M: int
    N: int
    K: int
    fp8: bool
    count: int = 1

    op = "linear"

    def __str__(self) -> str:
        return f"linear-{'fp8' if self.fp8 else 'bf16'}-M{self.M}-N{self.N}-K{self.K}-x{self.count}"

    @property
    def cost(self) -> Cost:
        operands = (self.N + self.M) * self.K * (1 if self.fp8 else BF16_BYTES)
        return Cost(operands + self.M * self.N * BF16_BYTES, 2 * self.M * self.N * self.K)


def linear_cases(config: ModelConfig, batch_sizes: tuple[int, ...]) -> list[LinearCase]:
    """Every distinct linear of the model (FP8 leaves the LM head in BF16), the largest share of the bytes first."""
    params = [p for p in param_plan(config) if p.kind in ("linear", "lm_head")]
    shapes = Counter((*p.shape, p.kind) for p in params)
    ordered = sorted(shapes.items(), key=lambda item: -item[0][0] * item[0][1] * item[1])
    return [
        LinearCase(M, N, K, fp8, count)
        for (N, K, kind), count in ordered
        for fp8, M in product((True, False) if kind == "linear" else (False,), batch_sizes)
    ]


@dataclass(frozen=True)
class PackedCase(LinearCase):
    """An op on a packed weight: packed_linear, packed_linear_add, packed_swiglu (N is then twice the width)."""

    op: str = "packed_linear"

    def __str__(self) -> str:
        return super().__str__().replace("linear", self.op, 1)


@dataclass(frozen=True)
class AttentionCase:
    """S sequences of `length` cached tokens each, of which the last `new` are the queries; Super's heads by default.
    `fp8_products`: of e4m3, with an FP8 cache."""

    S: int
    length: int
    new: int = 1
    H: int = 64
    K: int = 8
    D: int = 128
    fp8_kv: bool = False
    fp8_products: bool = False

    op = "attention"

    def __str__(self) -> str:
        kv = ("fp8" if self.fp8_kv else "bf16") + "-products" * self.fp8_products
        return f"attention-{kv}-S{self.S}-L{self.length}-new{self.new}-H{self.H}-K{self.K}"

    @property
    def cost(self) -> Cost:
        """Reads q and the keys and values once, writes out; two products per query and visible key."""
        kv_bytes = 2 * self.S * self.K * self.length * self.D * (1 if self.fp8_kv else BF16_BYTES)
        visible = self.new * self.length - self.new * (self.new - 1) // 2
        q_and_out = 2 * self.S * self.new * self.H * self.D * BF16_BYTES
        return Cost(kv_bytes + q_and_out, 4 * self.S * self.H * self.D * visible)


ATTENTION_BENCH = (
    *(AttentionCase(S, length, fp8_kv=fp8) for fp8, S, length in product((False, True), (8, 16, 64), (2048, 8192))),
    *(AttentionCase(1, length, fp8_kv=fp8) for fp8, length in product((False, True), (128, 1024, 2048, 8192, 131072))),
    *(AttentionCase(1, length, K=4) for length in (1024, 8192)),
)
ATTENTION_BENCH_CPU = (AttentionCase(2, 300, H=8, K=1), AttentionCase(1, 200, H=8, K=2, fp8_kv=True))
_PREFILL_FP8 = (*((1, n, n) for n in (512, 2048, 8192, 32768)), (1, 8192, 2048), (1, 32768, 256), (16, 512, 512))
PREFILL_BENCH = (
    *(AttentionCase(1, n, n) for n in (512, 2048, 4096, 8192, 32768)),
    *(AttentionCase(1, n, n, fp8_kv=True) for n in (2048, 8192)),
    *(AttentionCase(1, 8192, 2048, fp8_kv=fp8) for fp8 in (False, True)),
    AttentionCase(1, 32768, 256),
    AttentionCase(16, 512, 512),
    AttentionCase(1, 8192, 8192, H=128),
    AttentionCase(1, 8192, 8192, H=32, D=64),
    *(AttentionCase(*shape, fp8_kv=True, fp8_products=True) for shape in _PREFILL_FP8),
)
PREFILL_BENCH_CPU = (
    AttentionCase(1, 128, 128, 8, 1),
    AttentionCase(2, 100, 40, 8, 2),
    AttentionCase(2, 300, 40, 8, 2, fp8_kv=True, fp8_products=True),
)


@dataclass(frozen=True)
class DecodeCase(AttentionCase):
    """decode_attention: RoPE and KV append as well; the bytes that these add are a few per mille."""

    op: str = "decode_attention"

    def __str__(self) -> str:
        return f"decode_{super().__str__()}"


DECODE_BENCH = tuple(
    DecodeCase(S, length, fp8_kv=fp8)
    for fp8, (S, length) in product((False, True), [*product((1,), (128, 1024, 2048, 8192)), (16, 2048), (64, 1024)])
)
DECODE_BENCH_CPU = (DecodeCase(2, 300, H=8, K=1), DecodeCase(1, 200, H=8, K=2, fp8_kv=True))


@dataclass(frozen=True)
class RopeCase:
    """rope_append of T tokens, each of another sequence."""

    T: int
    H: int = 64
    K: int = 8
    D: int = 128
    fp8_kv: bool = False

    op = "rope_append"

    def __str__(self) -> str:
        return f"rope_append-{'fp8' if self.fp8_kv else 'bf16'}-T{self.T}-H{self.H}-K{self.K}"

    @property
    def cost(self) -> Cost:
        """Reads q, k, v, a row of the table and two indices, writes q and both caches."""
        q, kv = self.H * self.D, 2 * self.K * self.D
        per_token = (2 * q + kv) * BF16_BYTES + kv * (1 if self.fp8_kv else BF16_BYTES) + 4 * self.D + 16
        return Cost(self.T * per_token, 3 * self.T * (q + kv // 2))


ROPE_BENCH = tuple(RopeCase(T, fp8_kv=fp8) for fp8, T in product((False, True), (1, 64, 1024, 8192)))
ROPE_BENCH_CPU = (RopeCase(1), RopeCase(16, fp8_kv=True))


@dataclass(frozen=True)
class SamplingCase:
    """sample, penalize or top_logprobs (20 of them) on FP32 logits [S, V]."""

    op: str
    S: int
    V: int = LLAMA3_VOCAB

    num_top = 20

    def __str__(self) -> str:
        return f"{self.op}-S{self.S}-V{self.V}"

    @property
    def cost(self) -> Cost:
        """One pass over the logits; penalize also writes them and reads a count and a flag of each token."""
        bytes_each, flops_each = {"sample": (4, 4), "penalize": (13, 4), "top_logprobs": (4, 3)}[self.op]
        return Cost(self.S * self.V * bytes_each, self.S * self.V * flops_each)


SAMPLING_OPS = ("sample", "penalize", "top_logprobs")
SAMPLING_BENCH = tuple(SamplingCase(op, S) for op, S in product(SAMPLING_OPS, (1, 8, 64, 256)))
SAMPLING_BENCH_CPU = tuple(SamplingCase(op, S) for op, S in product(SAMPLING_OPS, (1, 4)))


@dataclass(frozen=True)
class ElementwiseCase:
    """embed, silu_mul, quantize_fp8 or quantize_fp8_per_token, with an output of [T, X]."""

    op: str
    T: int
    X: int

    def __str__(self) -> str:
        return f"{self.op}-T{self.T}-X{self.X}"

    @property
    def cost(self) -> Cost:
        """The inputs once, the output once; ids, scales and the unused rows of the table count nothing."""
        bytes_each, flops_each = {
            "embed": (2 * BF16_BYTES, 0),
            "silu_mul": (3 * BF16_BYTES, 5),
            "quantize_fp8": (BF16_BYTES + 1, 2),
            "quantize_fp8_per_token": (BF16_BYTES + 1, 3),
        }[self.op]
        return Cost(self.T * self.X * bytes_each, self.T * self.X * flops_each)


ELEMENTWISE_WIDTHS = {"embed": 8192, "silu_mul": 28672, "quantize_fp8": 8192, "quantize_fp8_per_token": 8192}
ELEMENTWISE_BENCH = tuple(
    ElementwiseCase(op, T, X) for (op, X), T in product(ELEMENTWISE_WIDTHS.items(), (1, 64, 1024, 8192))
)
ELEMENTWISE_BENCH_CPU = tuple(ElementwiseCase(op, T, X) for (op, X), T in product(ELEMENTWISE_WIDTHS.items(), (1, 16)))
