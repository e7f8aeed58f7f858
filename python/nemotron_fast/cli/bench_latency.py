# SPDX-License-Identifier: Apache-2.0
"""Step time per batch size, and time to the first token per prompt length.

Definitions: time to first token is that of one prompt and one generated token. The step time of a batch is
(time of n + 1 tokens - time of 1) / n, so that the prompts' own time drops out; avg_latency, latencies and percentiles
are of the runs of n + 1 tokens, in seconds. Prompts are random token ids and nothing is taken from the prefix cache.
A batch whose prompts need several steps of --max-batched-tokens does not start together, which its step time includes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from nemotron_fast.cli.options import load_llm
from nemotron_fast.errors import RequestError

if TYPE_CHECKING:
    import torch

    from nemotron_fast.llm import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", metavar="N,N", type=_integers, default=[1, 8], help="batch sizes (default 1,8)")
    parser.add_argument("--input-len", metavar="N", type=_integers, default=[128], help="prompt lengths (default 128)")
    parser.add_argument(
        "--output-len", metavar="N", type=int, default=32, help="steps that are timed (default 32); 0: none"
    )
    parser.add_argument("--repeats", metavar="N", type=int, default=3, help="medians are of this many (default 3)")
    parser.add_argument("--max-batched-tokens", metavar="N", type=int, help="tokens of one step")


def measure(args: argparse.Namespace) -> tuple[torch.device, dict[str, Any]]:
    """The device, and what was measured on it.

    Raises:
        RequestError: a size that is too small, or does not fit in the context or in --max-num-seqs.
    """
    sizes = [*args.batch, *args.input_len, args.repeats]
    if min(sizes) < 1:
        raise RequestError(f"sizes {sizes}: want all of them at least 1")
    if args.output_len < 0:
        raise RequestError(f"--output-len is {args.output_len}, want at least 0")
    if args.max_num_seqs is None:
        args.max_num_seqs = max(args.batch)
    elif args.max_num_seqs < max(args.batch):
        raise RequestError(f"--max-num-seqs is {args.max_num_seqs}, want at least the largest batch, {max(args.batch)}")
    start = time.perf_counter()
    with load_llm(args, prefix_caching=False, max_batched_tokens=args.max_batched_tokens) as llm:
        load_s = time.perf_counter() - start
        rows = [_first_token(llm, length, args.repeats) for length in args.input_len]
        first_s = time.perf_counter() - start
        if args.output_len:
            rows += [_step(llm, b, length, args) for b in args.batch for length in args.input_len]
        times = {"load_s": load_s, "start_to_first_results_s": first_s}
        return llm.device, {"max_batched_tokens": llm.engine.options.max_batched_tokens, **times, "results": rows}


def show(results: dict[str, Any]) -> None:
    for row in results["results"]:
        size = f"batch {row['batch_size']:<4} input {row['input_len']:<7}"
        print(f"{size} {row['metric']:<20} {row['median_ms']:10.3f} ms  {row['tokens_per_s']:10.1f} tok/s")
    print(f"weights ready after {results['load_s']:.1f} s", file=sys.stderr)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _first_token(llm: LLM, length: int, repeats: int) -> dict[str, Any]:
    _timed(llm, 1, length, 1)  # warm-up
    return _row("time_to_first_token", 1, length, [_timed(llm, 1, length, 1) for _ in range(repeats)], length)


def _step(llm: LLM, batch: int, length: int, args: argparse.Namespace) -> dict[str, Any]:
    _timed(llm, batch, length, 2)  # warm-up
    n = args.output_len
    times, latencies = [], []
    for _ in range(args.repeats):
        one, more = _timed(llm, batch, length, 1), _timed(llm, batch, length, n + 1)
        times.append((more - one) / n)
        latencies.append(more)
    return _row("step", batch, length, times, batch) | {
        "output_len": n + 1,
        "avg_latency": statistics.mean(latencies),
        "latencies": latencies,
        "percentiles": {str(p): _percentile(latencies, p) for p in (10, 25, 50, 75, 90, 99)},
    }


def _percentile(values: list[float], percent: int) -> float:
    """By linear interpolation."""
    ordered = sorted(values)
    whole, part = divmod((len(ordered) - 1) * percent, 100)
    return ordered[whole] + (ordered[min(whole + 1, len(ordered) - 1)] - ordered[whole]) * part / 100


def _row(metric: str, batch: int, length: int, times: list[float], tokens: int) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "metric": metric,
        "batch_size": batch,
        "input_len": length,
        "median_ms": median * 1e3,
        "min_ms": min(times) * 1e3,
        "max_ms": max(times) * 1e3,
        "tokens_per_s": tokens / median,
    }


def _timed(llm: LLM, batch: int, length: int, num_tokens: int) -> float:
    """Seconds to generate `num_tokens` for each of `batch` prompts of `length` tokens."""
    from nemotron_fast import SamplingParams

    rng = random.Random(length)
    prompts: list = [[rng.randrange(llm.config.vocab_size) for _ in range(length)] for _ in range(batch)]
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params, progress=False)
    return time.perf_counter() - start
