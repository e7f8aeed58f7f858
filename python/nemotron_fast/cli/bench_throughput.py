# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of many prompts that are all there at the start.

The prompts are random token ids, or those of a JSONL file: one object a line with "prompt" (text or token ids) or
"messages", and optionally "max_tokens". Every answer has exactly as many tokens as asked for. The clock starts when
the model is loaded and warm; times per request count from then on, so that they contain the wait for a place.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fast.cli.options import load_llm
from nemotron_fast.errors import RequestError

if TYPE_CHECKING:
    import torch

    from nemotron_fast.llm import LLM
    from nemotron_fast.metrics import Latency
    from nemotron_fast.outputs import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-prompts", metavar="N", type=int, help="default: 100, or all of --dataset")
    parser.add_argument("--input-len", metavar="N", type=int, default=128, help="tokens of a prompt (default 128)")
    parser.add_argument("--output-len", metavar="N", type=int, default=128, help="tokens of an answer (default 128)")
    parser.add_argument("--dataset", metavar="FILE", type=Path, help="prompts as JSONL, in place of random ones")
    parser.add_argument("--prefix-caching", action="store_true", help="share the KV of equal beginnings")
    parser.add_argument("--max-batched-tokens", metavar="N", type=int, help="tokens of one step")
    parser.add_argument("--max-mixed-tokens", metavar="N", type=int, help="tokens of one step in which some decode")


def measure(args: argparse.Namespace) -> tuple[torch.device, dict[str, Any]]:
    """The device, and what was measured on it.

    Raises:
        RequestError: a size that is not positive or does not fit, or a dataset that cannot be read.
    """
    from nemotron_fast.sampling_params import SamplingParams

    if min(args.input_len, args.output_len, args.num_prompts or 1) < 1:
        raise RequestError("--input-len, --output-len and --num-prompts: want all of them at least 1")
    entries = None if args.dataset is None else _read_dataset(args.dataset)[: args.num_prompts]
    start = time.perf_counter()
    with load_llm(
        args,
        prefix_caching=args.prefix_caching,
        max_batched_tokens=args.max_batched_tokens,
        max_mixed_tokens=args.max_mixed_tokens,
    ) as llm:
        llm.warm_up()
        load_s = time.perf_counter() - start
        if entries is None:
            entries = _random_entries(llm, args.num_prompts or 100, args.input_len, args.seed)
        prompts = [llm.prepare(e.get("messages", e.get("prompt"))).token_ids for e in entries]
        params = [
            SamplingParams(max_tokens=e.get("max_tokens", args.output_len), temperature=0, ignore_eos=True)
            for e in entries
        ]
        llm.generate(prompts[:1], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True), progress=False)
        begin = time.perf_counter()
        results = llm.generate(prompts, params, progress=None if not args.json else False)
        elapsed = time.perf_counter() - begin
        workload = {
            "dataset": None if args.dataset is None else str(args.dataset),
            "input_len": None if args.dataset is not None else args.input_len,
            "output_len": args.output_len,
            "prefix_caching": args.prefix_caching,
            "max_batched_tokens": llm.engine.options.max_batched_tokens,
            "max_mixed_tokens": llm.engine.options.max_mixed_tokens,
            "max_num_seqs": llm.engine.options.max_num_seqs,
            "kv_cache_pages": llm.engine.options.num_pages,
            "load_s": load_s,
        }
        return llm.device, workload | _summary(llm, results, elapsed)


def show(results: dict[str, Any]) -> None:
    print(
        f"{results['num_requests']} requests in {results['elapsed_time']:.2f} s: "
        f"{results['requests_per_second']:.2f} requests/s, {results['output_throughput']:.1f} output tok/s, "
        f"{results['tokens_per_second']:.1f} total tok/s"
    )
    for name in ("ttft", "tpot", "itl"):
        figures = "  ".join(f"{what} {results[f'{what}_{name}_ms']:10.2f} ms" for what in ("mean", "median", "p99"))
        print(f"{name:<5} {figures}")
    print(f"prefix hits {100 * results['prefix_hit_rate']:.1f} %, preemptions {results['preemptions']}")


def _summary(llm: LLM, results: list[Result], elapsed: float) -> dict[str, Any]:
    from nemotron_fast.metrics import Latency

    sent = sum(r.usage.prompt_tokens for r in results)
    made = sum(r.usage.completion_tokens for r in results)
    metrics = llm.metrics()
    per_token = [r.timings.decode_s / (r.usage.completion_tokens - 1) for r in results if r.usage.completion_tokens > 1]
    return {
        "elapsed_time": elapsed,
        "num_requests": len(results),
        "total_num_tokens": sent + made,
        "total_input_tokens": sent,
        "total_output_tokens": made,
        "requests_per_second": len(results) / elapsed,
        "tokens_per_second": (sent + made) / elapsed,
        "output_throughput": made / elapsed,
        **_milliseconds("ttft", Latency.of(r.timings.ttft_s for r in results)),
        **_milliseconds("tpot", Latency.of(per_token)),
        **_milliseconds("itl", metrics.inter_token),
        "prefix_hit_rate": metrics.prefix_hit_rate,
        "preemptions": metrics.preemptions,
    }


def _milliseconds(name: str, latency: Latency) -> dict[str, float]:
    return {
        f"mean_{name}_ms": latency.mean_s * 1e3,
        f"median_{name}_ms": latency.p50_s * 1e3,
        f"p99_{name}_ms": latency.p99_s * 1e3,
    }


def _random_entries(llm: LLM, count: int, length: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"prompt": rng.choices(range(llm.config.vocab_size), k=length)} for _ in range(count)]


def _read_dataset(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--dataset {path}: {error}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"--dataset {path}, line {number}: {error}") from None
        if not isinstance(entry, dict) or not ("prompt" in entry or "messages" in entry):
            raise RequestError(f'--dataset {path}, line {number}: want an object with "prompt" or "messages"')
        entries.append(entry)
    if not entries:
        raise RequestError(f"--dataset {path} holds no prompts")
    return entries
