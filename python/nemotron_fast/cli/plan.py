# SPDX-License-Identifier: Apache-2.0
"""`nemotron-fast plan`: what a model takes on a GPU, and what fits. Needs no GPU and no weights."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nemotron_fast.dtypes import DTYPE_BYTES, FLOAT_BYTES
from nemotron_fast.errors import RequestError

if TYPE_CHECKING:
    from nemotron_fast.planner import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PATH", help="checkpoint folder, a config.json, or the name of a model: demo")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpu", metavar="NAME", help="h100-80gb, h200, a100-80gb, ...; a wrong name lists all")
    where.add_argument("--memory-gb", metavar="X", type=float, help="usable memory of one GPU in units of 1e9 bytes")
    parser.add_argument("--tp", metavar="N", type=int, default=1, help="GPUs to split every block over (default 1)")
    parser.add_argument(
        "--dtype",
        choices=("auto", *FLOAT_BYTES),
        default="auto",
        help="of activations and unquantised weights (default: the checkpoint's)",
    )
    parser.add_argument("--quantize", choices=("fp8",), help="quantise the linears while loading")
    parser.add_argument(
        "--kv-dtype",
        choices=("auto", *DTYPE_BYTES),
        default="auto",
        help="of the KV cache (default: fp8 if the checkpoint says so, else --dtype)",
    )
    parser.add_argument("--max-model-len", metavar="N", type=int, help="tokens of context that must fit")
    parser.add_argument("--max-num-seqs", metavar="N", type=int, default=256, help="sequences at once (default 256)")
    parser.add_argument(
        "--max-batched-tokens", metavar="N", type=int, default=2048, help="tokens of a prefill chunk (default 2048)"
    )
    parser.add_argument(
        "--memory-fraction", metavar="F", type=float, default=0.95, help="part of the memory to use (default 0.95)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan, then refuse if it does not fit.

    Raises:
        CapacityError: the weights or `--max-model-len` do not fit; the plan has been printed by then.
        ConfigError, CheckpointError, RequestError: the model or an option cannot be read.
    """
    from nemotron_fast.cli import render
    from nemotron_fast.cli.summary import read_model
    from nemotron_fast.hardware import custom_gpu, get_gpu
    from nemotron_fast.planner import plan

    model = read_model(args.model)
    if args.gpu is None and not 0 < args.memory_gb < 1e6:
        raise RequestError(f"--memory-gb is {args.memory_gb}, want a positive number of gigabytes")
    made = plan(
        model.config,
        gpu=get_gpu(args.gpu) if args.gpu is not None else custom_gpu(round(args.memory_gb * 1e9)),
        quant=model.quant,
        tp=args.tp,
        dtype=args.dtype,
        quantize=args.quantize,
        kv_dtype=args.kv_dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_batched_tokens=args.max_batched_tokens,
        memory_fraction=args.memory_fraction,
    )
    if args.json:
        render.print_json({"model": model.name, **made.to_dict()})
    else:
        _print_memory(model.name, made)
        if made.weights_fit:
            _print_capacity(made)
    made.require()
    return 0


def _print_memory(name: str, made: Plan) -> None:
    """Per rank: every part of the memory, and its share of the device."""
    from nemotron_fast.cli import render
    from nemotron_fast.planner import gigabytes

    out, options = render.console(), made.options
    devices = f"{options.tp} x {made.gpu.label}" if options.tp > 1 else made.gpu.label
    out.print(f"[bold]{name}[/] on {devices}: {made.weight_dtype} weights, {options.kv_dtype} KV cache\n")
    ranks = _distinct_ranks(made)
    heads = [f"rank {r.rank}" if len(ranks) > 1 else "each GPU" if options.tp > 1 else "bytes" for r in ranks]
    rows = render.table(None, "memory", *heads, "of it" if len(ranks) == 1 else "", "what it is", left=1)
    rows.columns[-1].justify = "left"
    scales = "at most one per output row" if any(r.scales for r in ranks) else ""
    for label, key, note in (
        ("weights", "weights", "linears, embedding, lm_head, norms"),
        ("scales", "scales", scales),
        ("activations", "activations", f"{options.max_batched_tokens} tokens in a step"),
        ("logits", "logits", f"{options.max_num_seqs} sequences"),
        ("tables", "tables", "RoPE and page tables"),
        ("reserve", "reserve", "CUDA context, graphs" + (", NCCL" if options.tp > 1 else "")),
        ("left for KV", "free_for_kv", "" if made.weights_fit else "so much is missing"),
    ):
        values = [getattr(r, key) for r in ranks]
        share = f"{values[0] / made.budget:.1%}" if len(ranks) == 1 else ""
        rows.add_row(label, *(f"{v:,}" for v in values), share, note)
    used = f"{made.options.memory_fraction:.0%} of {gigabytes(made.gpu.memory_bytes)} usable"
    rows.add_row("budget", *(f"{made.budget:,}" for _ in ranks), "", used, style="bold")
    out.print(rows)


def _distinct_ranks(made: Plan) -> list:
    """The most loaded rank, and the least loaded where it differs."""
    by_load = sorted(made.ranks, key=lambda rank: (-rank.total, rank.rank))
    return by_load[:1] if by_load[0].total == by_load[-1].total else [by_load[0], by_load[-1]]


def _print_capacity(made: Plan) -> None:
    from nemotron_fast.cli import render
    from nemotron_fast.planner import TABLE_CONTEXTS

    out = render.console()
    out.print()
    if made.kv_tokens is None:
        out.print("no block has attention: there is no KV cache, context costs nothing")
    else:
        limit = made.config.max_position
        per_token = f"{made.ranks[0].kv_per_token:,} bytes a token" + (" and GPU" if made.options.tp > 1 else "")
        out.print(f"KV cache    {made.kv_tokens:,} tokens in {made.num_pages:,} pages, {per_token}")
        out.print(f"context     up to {made.max_context:,} tokens for one sequence (the model's limit is {limit:,})")
        contexts = [c for c in TABLE_CONTEXTS if c <= made.config.max_position]
        fits = ", ".join(f"{made.sequences_at(c):,} of {_tokens(c)}" for c in contexts)
        if fits:
            out.print(f"sequences   {fits}")
    if made.options.tp > 1:
        out.print(f"balance     {made.rank_ratio:.3f} times as much on the fullest GPU as on the emptiest")
    seconds = made.decode_limit_s()
    if seconds is not None:
        read = max(r.read_per_step for r in made.ranks)
        out.print(
            f"decode      limit {seconds * 1e3:.4g} ms = {1 / seconds:.1f} tok/s for one sequence: {render.size(read)} "
            f"read at the datasheet's {made.gpu.bandwidth / 1e12:.2f} TB/s",
            soft_wrap=True,
        )


def _tokens(count: int) -> str:
    return f"{count // 1024}K"
