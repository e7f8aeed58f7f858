# SPDX-License-Identifier: Apache-2.0
"""The shapes that matter, one frozen dataclass per op family, with what a call costs beside it.

Tests and benchmarks take their shapes from here and nowhere else. A family has `<FAMILY>_TESTS`, small and nasty,
and `<FAMILY>_BENCH`, the shapes of the real models.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

HIDDEN_SIZES = {"SmolLM2-135M": 576, "Nano-8B": 4096, "Super-49B, 51B": 8192, "Ultra-253B": 16384}


@dataclass(frozen=True)
class Cost:
    """Least traffic and arithmetic of one call: the roofline's two axes."""

    num_bytes: int
    flops: int


@dataclass(frozen=True)
class NormCase:
    """rms_norm or, with `add`, add_rms_norm, on x [T, E]; `strided`: inside a tensor of rows twice as wide."""

    T: int
    E: int
    add: bool = False
    strided: bool = False

    def __str__(self) -> str:
        return f"{self.op}-T{self.T}-E{self.E}{'-strided' if self.strided else ''}"

    @property
    def op(self) -> str:
        return "add_rms_norm" if self.add else "rms_norm"

    def cost(self, element_size: int) -> Cost:
        """Reads x and weight, writes out; with `add` also reads and writes the residual."""
        matrices = 4 if self.add else 2
        return Cost((matrices * self.T * self.E + self.E) * element_size, (5 if self.add else 4) * self.T * self.E)


NORM_TESTS = (
    *(NormCase(T, E, add) for T, E, add in product((1, 2, 7, 65), (256, 576, 4096, 8192, 16384), (False, True))),
    *(NormCase(T, 8192, add) for T, add in product((0, 64, 1024), (False, True))),
    *(NormCase(5, E, add, strided=True) for E, add in product((576, 8192), (False, True))),
    NormCase(3, 8),  # one vector
    NormCase(3, 4104, add=True),  # one vector more than a full CTA
    NormCase(2, 32768),  # the widest row
)
NORM_BENCH = tuple(NormCase(T, E, add) for E, add, T in product((8192, 16384), (False, True), (1, 16, 64, 1024, 8192)))
NORM_BENCH_CPU = tuple(NormCase(T, 8192, add) for add, T in product((False, True), (1, 64)))
