# SPDX-License-Identifier: Apache-2.0
"""`nemotron-fast bench latency|throughput`: measurements of a whole model, with the names that vLLM's benches use."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fast.cli import bench_latency, bench_throughput
from nemotron_fast.cli.options import add_model_arguments

if TYPE_CHECKING:
    import torch

KINDS = {
    "latency": (bench_latency, "step time and time to first token"),
    "throughput": (bench_throughput, "many prompts at once, offline"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, (module, summary) in KINDS.items():
        kind = kinds.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add_model_arguments(kind)
        module.add_arguments(kind)
        kind.add_argument("--json", action="store_true", help="print the results as JSON")
        kind.add_argument("--out", metavar="FILE", type=Path, help="write the results to a JSON file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; raises as the kind's `measure`."""
    module = KINDS[args.kind][0]
    device, results = module.measure(args)
    report = _workload(args, device) | results
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.json:
        from nemotron_fast.cli import render

        render.print_json(report)
    else:
        module.show(results)
    return 0


def _workload(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What is needed to repeat the measurement."""
    from nemotron_fast.testing.timing import provenance

    types = ("random_weights", "quantize", "kv_dtype", "fp8_attention", "deterministic", "dtype")
    named = ("model", *types, "max_model_len", "max_num_seqs", "seed")
    return provenance(device) | {name: getattr(args, name) for name in named}
