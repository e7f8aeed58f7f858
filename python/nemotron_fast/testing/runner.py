# SPDX-License-Identifier: Apache-2.0
"""The main loop of every bench/bench_<family>.py.

A bench file says what to call on which cases, as a list of `Row`; everything else (options, timing, the check that
comes before it, printing, the JSON record) is here. On a GPU an op without a CUDA kernel in this build is not timed;
with --peers its peers are, which gives the times that its kernel will have to beat.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_fast import _C
from nemotron_fast.testing import compare, timing
from nemotron_fast.testing.cases import Case

RESULTS = Path("bench/results")

Inputs = Any  # one input set, whatever the row's `make` returns
Call = Callable[[Inputs], Any]
Check = Callable[[Inputs, Call], None]  # calls on a set and raises if what comes out is wrong


@dataclass(frozen=True)
class Row:
    """One case: `ours` and its `peers`, each called on one input set."""

    case: Case
    make: Callable[[], Inputs]  # a fresh input set on the device
    ours: Call
    peers: dict[str, Call]
    check: Check
    check_peer: Check | None = None  # where peers cannot meet `check`


def equals(want: Call, *, rtol: float, atol: float) -> Check:
    """A check: the result of a call is within the tolerance of `want`'s. For ops that change no input."""

    def check(inputs: Inputs, call: Call) -> None:
        compare.assert_close(call(inputs), want(inputs), rtol=rtol, atol=atol)

    return check


def eager_and_compiled(call: Call, device: torch.device) -> dict[str, Call]:
    """The same torch code twice: as it is and, on a GPU, through torch.compile."""
    compiled = {"torch.compile": torch.compile(call, dynamic=False)} if device.type == "cuda" else {}
    return {"torch eager": call} | compiled


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values; e4m3 saturates none of them."""
    return torch.randn(*shape, device=device).to(dtype)


def main(family: str, doc: str, rows: Callable[[torch.device, bool], Iterable[Row]]) -> None:
    """Runs `rows(device, quick)`; writes bench/results/<device>/<family>.json, on a CPU only if --out names a file."""
    args = _parse(doc)
    device = torch.device(args.device)
    torch.manual_seed(0)
    quick = device.type == "cpu" if args.quick is None else args.quick
    name = timing.device_name(device)
    ceilings = timing.copy_and_read_ceilings(device)
    print(f"{name}: {ceilings or 'a CPU: these times say nothing about the kernels'}")

    results: list[timing.Result] = []
    missing: set[str] = set()
    for row in rows(device, quick):
        if args.only not in str(row.case):
            continue
        if device.type == "cuda" and row.case.op not in _C.build_info()["cuda_ops"]:
            missing.add(row.case.op)
            if not args.peers:
                continue
        timed = _time(row, device, with_ours=row.case.op not in missing, repeats=5 if quick else 21)
        for result in timed:
            print(result.line(ceilings and ceilings["copy_gb_per_s"], timed[0]), flush=True)
        results += timed
    for op in sorted(missing):
        print(f"{op}: not timed, this build has no CUDA kernel for it")
    out = args.out or (RESULTS / name.lower().replace(" ", "-") / f"{family}.json" if device.type == "cuda" else None)
    if out is not None and results:
        timing.write_json(out, results, ceilings, device)
        print(f"wrote {out}")


def _parse(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action=argparse.BooleanOptionalAction, help="few small shapes, few repeats (default on a CPU)"
    )
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--peers", action="store_true", help="time the peers of ops that have no kernel yet")
    parser.add_argument("--out", type=Path, help="where to write the JSON record")
    return parser.parse_args()


def _time(row: Row, device: torch.device, *, with_ours: bool, repeats: int) -> list[timing.Result]:
    if device.type == "cuda":
        torch.compiler.reset()  # one compiled kernel per shape
    sets = [row.make() for _ in range(timing.num_sets(row.case.cost.num_bytes, device))]

    def candidate(name: str, call: Call, check: Callable[[Inputs, Call], None]) -> timing.Candidate:
        return timing.Candidate(name, lambda i: call(sets[i]), partial(check, sets[0], call))

    candidates = [candidate("ours", row.ours, row.check)] if with_ours else []
    candidates += [candidate(name, call, row.check_peer or row.check) for name, call in row.peers.items()]
    times = timing.time_candidates(candidates, len(sets), device, repeats=repeats)
    return [timing.Result(row.case.op, str(row.case), name, t, row.case.cost) for name, t in times.items()]


def cloned(inputs: Inputs, *names: str) -> Inputs:
    """The (dataclass) input set with copies of the named tensors, for the check of an op that changes them."""
    return replace(inputs, **{name: getattr(inputs, name).clone() for name in names})
