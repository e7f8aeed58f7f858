# SPDX-License-Identifier: Apache-2.0
"""rms_norm and add_rms_norm against torch, eager and compiled.

python bench/bench_norm.py [--device cuda|cpu] [--out bench/results/<device>/norm.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_fast import ops, reference
from nemotron_fast.testing import cases, compare, timing

EPS = 1e-5
DTYPE = torch.bfloat16


def torch_norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> Tensor:
    """The same in torch; the residual, where there is one, is updated in place."""
    if residual is not None:
        x = residual.add_(x)
    return functional.rms_norm(x, x.shape[-1:], weight, EPS)


def our_norm(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor) -> Tensor:
    if residual is None:
        return ops.rms_norm(x, weight, EPS, out=out)
    return ops.add_rms_norm(x, residual, weight, EPS, out=out)


def bench_case(case: cases.NormCase, device: torch.device) -> list[timing.Result]:
    cost = case.cost(DTYPE.itemsize)
    num_sets = timing.num_sets(cost.num_bytes, device)
    make = partial(torch.randn, dtype=DTYPE, device=device)
    weight = make(case.E)
    xs = [make(case.T, case.E) for _ in range(num_sets)]
    outs = [torch.empty_like(x) for x in xs]
    residuals = [make(case.T, case.E) if case.add else None for _ in range(num_sets)]

    def candidate(name: str, norm: Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]) -> timing.Candidate:
        def verify() -> None:
            residual = residuals[0].clone() if case.add else None
            summed = xs[0] + residual if case.add else xs[0]
            want = reference.rms_norm(summed.double(), weight.double(), EPS)
            found = norm(xs[0], residual, weight, outs[0])
            compare.assert_close(found, want, rtol=2**-6, atol=2**-10)  # two roundings to bf16, and one of slack
            if case.add:
                compare.assert_bit_equal(residual, summed)

        return timing.Candidate(name, lambda i: norm(xs[i], residuals[i], weight, outs[i]), verify)

    # Eager torch allocates its result: inside a graph that costs no time.
    candidates = [
        candidate("ours", our_norm),
        candidate("torch eager", lambda x, residual, weight, _: torch_norm(x, residual, weight)),
    ]
    if device.type == "cuda":
        compiled = torch.compile(torch_norm, dynamic=False)
        candidates.append(candidate("torch.compile", lambda x, residual, weight, _: compiled(x, residual, weight)))
    times = timing.time_candidates(candidates, num_sets, device)
    return [timing.Result(case.op, str(case), name, t, cost) for name, t in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    name = timing.device_name(device)
    ceilings = timing.copy_and_read_ceilings(device)
    print(f"{name}: {ceilings or 'a CPU: these times say nothing about the kernels'}")

    results: list[timing.Result] = []
    for case in cases.NORM_BENCH if device.type == "cuda" else cases.NORM_BENCH_CPU:
        torch.compiler.reset()  # one compiled kernel per shape
        rows = bench_case(case, device)
        for row in rows:
            print(row.line(ceilings and ceilings["copy_gb_per_s"], row.timing.median_us / rows[0].timing.median_us))
        results += rows
    out = args.out or Path(__file__).parent / "results" / name.lower().replace(" ", "-") / "norm.json"
    timing.write_json(out, results, ceilings, device)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
