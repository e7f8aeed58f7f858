# SPDX-License-Identifier: Apache-2.0
"""`nemotron-fast inspect`: the block list of a model."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PATH", help="checkpoint folder, a config.json, or the name of a model: demo")
    parser.add_argument("--all", action="store_true", help="one line per block; otherwise equal neighbours share one")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the blocks into FILE (.png, .svg or .pdf)")


def run(args: argparse.Namespace) -> int:
    """Print the model at `args.model`.

    Raises:
        ConfigError, CheckpointError: it cannot be read. RequestError: the plot cannot be drawn.
    """
    from nemotron_fast.cli import render
    from nemotron_fast.cli.summary import read_model, summarise

    summary = summarise(read_model(args.model))
    if args.plot is not None:
        from nemotron_fast.cli.block_plot import save_plot

        save_plot(summary, args.plot)
    if args.json:
        render.print_json(summary)
        return 0
    _print_summary(summary, collapse=not args.all)
    if args.plot is not None:
        render.console(stderr=True).print(f"picture written to {args.plot}", soft_wrap=True)
    return 0


def collapse_runs(blocks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbouring blocks of equal shape, together."""
    runs: list[list[dict[str, Any]]] = []
    for block in blocks:
        if runs and _shape(runs[-1][-1]) == _shape(block):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _shape(block: dict[str, Any]) -> tuple[Any, ...]:
    attention, ffn = block["attention"], block["ffn"]
    return attention["kind"], attention.get("kv_heads"), ffn["kind"], ffn.get("width"), block["bytes"]


def _print_summary(summary: dict[str, Any], *, collapse: bool) -> None:
    from nemotron_fast.cli import render

    out = render.console()
    stored = summary["quantization"] or "not quantised"
    out.print(f"[bold]{summary['name']}[/]  {summary['model_type']}, {summary['dtype']}, {stored}")
    out.print(
        f"hidden {summary['hidden_size']}, {summary['num_heads']} query heads of {summary['head_dim']}, "
        f"vocabulary {summary['vocab_size']}, up to {summary['max_position']} tokens\n"
    )
    blocks = summary["blocks"]
    rows = render.table(None, "blocks", "attention", "FFN", "parameters", "bytes", "of all", left=3)
    total = summary["weight_bytes"]
    for run in collapse_runs(blocks) if collapse else [[block] for block in blocks]:
        first, last = run[0]["index"], run[-1]["index"]
        name = f"{first}" if first == last else f"{first}-{last} (x{len(run)})"
        size = sum(b["bytes"] for b in run)
        params = render.count(sum(b["parameters"] for b in run))
        rows.add_row(
            name, _attention_cell(summary, run[0]), _ffn_cell(run[0]), params, render.size(size), f"{size / total:.1%}"
        )
    out.print(rows)
    out.print()
    _print_totals(summary)


def _print_totals(summary: dict[str, Any]) -> None:
    from nemotron_fast.cli import render

    out = render.console()
    out.print(
        f"{summary['num_blocks']} blocks, {summary['empty_blocks']} of them empty; "
        f"{summary['live_sub_blocks']} live sub-blocks"
    )
    for part, key in (("attention", "attention"), ("FFN", "ffn")):
        real, linear, noop = (summary[f"{prefix}{key}_blocks"] for prefix in ("", "linear_", "noop_"))
        out.print(f"  {part:<10} {real} with {part}, {linear} linear, {noop} without")
    widths = ", ".join(f"{int(w):,} (x{n})" for w, n in summary["ffn_widths"].items())
    out.print(f"  FFN widths {widths or '-'}")
    parts = summary["parameters"]
    named = ", ".join(f"{k} {render.count(v)}" for k, v in parts.items() if v and k != "total")
    out.print(f"{parts['total']:,} parameters: {named}")
    as_dtype = ", ".join(f"{render.size(v)} as {k}" for k, v in summary["weight_bytes_as"].items())
    out.print(f"{render.size(summary['weight_bytes'])} of weights as stored ({as_dtype})")
    kv = ", ".join(f"{v:,} bytes as {k}" for k, v in summary["kv_bytes_per_token"].items())
    out.print(f"KV cache per token: {kv}")


def _attention_cell(summary: dict[str, Any], block: dict[str, Any]) -> str:
    attention = block["attention"]
    match attention["kind"]:
        case "attention":
            return f"{summary['num_heads']} heads, {attention['kv_heads']} KV"
        case "linear":
            return "linear"
        case _:
            return "-"


def _ffn_cell(block: dict[str, Any]) -> str:
    ffn = block["ffn"]
    match ffn["kind"]:
        case "ffn":
            return f"{ffn['width']:,}"
        case "linear":
            return "linear"
        case _:
            return "-"
