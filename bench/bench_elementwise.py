# SPDX-License-Identifier: Apache-2.0
"""embed, silu_mul, quantize_fp8 and quantize_fp8_per_token against torch, eager and compiled.

python bench/bench_elementwise.py [--device cuda|cpu] [--only silu_mul]
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_fast import ops, reference
from nemotron_fast.testing import cases, compare, runner

VOCAB = 16384  # rows of the table, 268 MB: random ones are not in L2
Inputs = tuple[Tensor, ...]  # the op's arguments, in the wrapper's order

OURS = {
    "embed": lambda s: ops.embed(*s),
    "silu_mul": lambda s: ops.silu_mul(*s),
    "quantize_fp8": lambda s: ops.quantize_fp8(*s),
    "quantize_fp8_per_token": lambda s: ops.quantize_fp8_per_token(*s),
}
PEERS = {
    "embed": lambda s: functional.embedding(*s),
    "silu_mul": lambda s: reference.silu_mul(*s).to(s[0].dtype),
    "quantize_fp8": lambda s: reference.quantize_fp8(*s),
    "quantize_fp8_per_token": lambda s: reference.quantize_fp8_per_token(*s),
}


def dequantized(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0].float() * result[1][:, None]


def check(op: str, s: Inputs, call: runner.Call) -> None:
    step = 2**-3 if op.startswith("quantize") else 2**-7  # of e4m3 (a tie may go either way) and of BF16
    exact = PEERS[op]((s[0].float(), *s[1:])) if op != "embed" else s[1][s[0]]
    compare.assert_close(dequantized(call(s)), dequantized(exact), rtol=step, atol=2**-9)


def rows(device: torch.device, quick: bool) -> Iterator[runner.Row]:
    table = runner.randn(VOCAB, cases.ELEMENTWISE_WIDTHS["embed"], device=device)
    for case in cases.ELEMENTWISE_BENCH_CPU if quick else cases.ELEMENTWISE_BENCH:

        def make(case: cases.ElementwiseCase = case) -> Inputs:
            if case.op == "embed":
                return torch.randint(VOCAB, (case.T,), device=device), table
            x = runner.randn(case.T, case.X * (2 if case.op == "silu_mul" else 1), device=device)
            return (x, torch.full((1,), 0.01, device=device)) if case.op == "quantize_fp8" else (x,)

        peers = runner.eager_and_compiled(PEERS[case.op], device)
        yield runner.Row(case, make, OURS[case.op], peers, partial(check, case.op))


if __name__ == "__main__":
    runner.main("elementwise", __doc__, rows)
