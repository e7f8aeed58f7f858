# SPDX-License-Identifier: Apache-2.0
"""The decode step of a whole model with random weights: what the GPU needs, what the engine makes of it, and where
the time goes.

python bench/bench_decode_step.py --batch 1,8,32,64 --context 1024 --out step.json

    graph    median of back-to-back replays of the whole step's CUDA graph, from the embedding to the sampled token
    engine   median of Engine.step() with all sequences decoding; "host" is the part of it that the GPU does not hide
    read     bytes of weights and KV that a step must read over the graph's time, and that over the read ceiling of
             the same run
    kernels  per name, from torch.profiler, in one step: launches, and by how much they put off its end, largest first
             (of kernels that overlap, and wait for each other, only what comes after the end of the ones before)
    beside   with --beside N: median and p99 of Engine.step() while a prompt of N tokens is computed in chunks beside
             the decoding sequences, and the p99 over the median without

The sequences' KV is random; no prompt is computed. On a CPU: a small model, and the engine's time only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from nemotron_fast import LLM, SamplingParams
from nemotron_fast.async_llm import MIXED_TOKENS
from nemotron_fast.engine import Engine
from nemotron_fast.footprint import kv_bytes_per_token
from nemotron_fast.metrics import Latency
from nemotron_fast.pages import pages_for
from nemotron_fast.prompt_budget import MIN_PROMPT_TOKENS
from nemotron_fast.request import Request, Status
from nemotron_fast.sampling_params import NEUTRAL
from nemotron_fast.testing import timing

CONFIGS = Path(__file__).parents[1] / "tests" / "configs"
WARM_STEPS = 4  # these capture the graph and fill the pipeline


def place(engine: Engine, context: int, max_tokens: int) -> Request:
    """A sequence with `context` tokens in the cache, as if their prompt had been computed."""
    params = SamplingParams(**NEUTRAL | {"temperature": 0.0}, max_tokens=max_tokens, ignore_eos=True)
    prompt = torch.randint(engine.config.vocab_size, (context + 1,)).tolist()
    request = engine.add_request(prompt, params)
    scheduler = engine.scheduler
    scheduler.waiting.remove(request)
    request.pages = scheduler.pages.allocate(pages_for(context + 1))
    request.status, request.num_computed, request.scheduled_at = Status.RUNNING, context, time.perf_counter()
    scheduler.running.append(request)
    return request


def fill_randomly(engine: Engine) -> None:
    for tensor in (*engine.cache.keys, *engine.cache.values):
        for page in tensor.split(256):
            page.copy_(torch.randn(page.shape, device=page.device))


def engine_step_us(engine: Engine, steps: int) -> list[float]:
    for _ in range(WARM_STEPS):
        engine.step()
    return [timed_step_us(engine) for _ in range(steps)]


def timed_step_us(engine: Engine) -> float:
    begin = time.perf_counter()
    engine.step()
    return (time.perf_counter() - begin) * 1e6


def beside_a_prompt(engine: Engine, length: int, without_us: float) -> dict[str, float]:
    """Steps while a prompt of `length` tokens is computed beside the sequences that decode."""
    params = SamplingParams(**NEUTRAL | {"temperature": 0.0}, max_tokens=1)
    request = engine.add_request(torch.randint(engine.config.vocab_size, (length,)).tolist(), params)
    times = []
    while not request.is_finished:
        times.append(timed_step_us(engine))
    p99 = Latency.of(times).p99_s  # the unit is that of the samples
    slowest = sorted(range(len(times)), key=times.__getitem__)[-4:]
    return {
        "prompt": length,
        "steps": len(times),
        "median_us": statistics.median(times),
        "p99_us": p99,
        "p99_over_median_without": p99 / without_us,
        "slowest": [{"step": step, "us": times[step]} for step in slowest],
    }


def graph_step_us(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Replays in groups of four, so that the launch of one hides behind the one before."""
    times = []
    for repeat in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(begin.elapsed_time(end) * 1e3 / 4)
    return statistics.median(times)


def kernel_times(graph: torch.cuda.CUDAGraph, replays: int = 3) -> list[dict[str, Any]]:
    """Launches and microseconds per kernel name in one replay; empty if this machine's profiler sees none."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.end, event.time_range.start, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    by_name: dict[str, list[float]] = defaultdict(list)
    done = 0.0
    for end, start, name in sorted(spans):
        if start > done > 0:
            by_name["(idle)"].append(start - done)
        by_name[name].append(end - max(start, done))
        done = end
    rows = [
        {"kernel": name, "launches": len(us) / replays, "total_us": sum(us) / replays, "mean_us": statistics.mean(us)}
        for name, us in by_name.items()
    ]
    return sorted(rows, key=lambda row: -row["total_us"])


def measure(llm: LLM, batch: int, context: int, args: argparse.Namespace) -> dict[str, Any]:
    engine = llm.engine
    for _ in range(batch):
        place(engine, context, num_steps(args))
    row: dict[str, Any] = {"batch": batch, "context": context}
    row["engine_us"] = statistics.median(engine_step_us(engine, args.steps))
    config, kv = llm.config, engine.cache
    kv_width = kv.keys[0].element_size() if kv.keys else 1
    kv_bytes = batch * (context + args.steps // 2) * kv_bytes_per_token(config, "fp8") * kv_width
    row["read_bytes"] = weight_bytes_read(engine) + kv_bytes
    on_gpu = llm.device.type == "cuda"
    if on_gpu:
        graph = engine.executor.decode_graph(batch)
        row["graph_us"] = graph_step_us(graph, args.repeats)
        row["host_us"] = row["engine_us"] - row["graph_us"]
        row["read_gb_per_s"] = row["read_bytes"] / row["graph_us"] / 1e3
    if args.beside:  # before the profiler has been there: it may slow later launches
        row["beside"] = beside_a_prompt(engine, args.beside, row["engine_us"])
    if on_gpu and args.kernels:
        row["kernels"] = kernel_times(graph)
    for request in [*engine.scheduler.running]:
        engine.abort(request)
    return row


def num_steps(args: argparse.Namespace) -> int:
    """More than a sequence decodes here: a prompt beside it advances by at least MIN_PROMPT_TOKENS a step."""
    return WARM_STEPS + args.steps + args.beside // MIN_PROMPT_TOKENS + 8


def weight_bytes_read(engine: Engine) -> int:
    """All weights but the embedding, of which a step reads a row per token."""
    weights = engine.model.weights
    seen: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.data_ptr()] = value.nbytes
        elif hasattr(value, "__dataclass_fields__"):
            for name in value.__dataclass_fields__:
                visit(getattr(value, name))
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit((weights.sub_blocks, weights.norm, weights.lm_head))
    return sum(seen.values())


def show(row: dict[str, Any], ceiling: float | None, num_kernels: int) -> None:
    text = f"batch {row['batch']:<4} context {row['context']:<6} engine {row['engine_us'] / 1e3:8.3f} ms"
    if "graph_us" in row:
        share = 100 * row["read_gb_per_s"] / ceiling
        text += (
            f" | graph {row['graph_us'] / 1e3:8.3f} ms | host {row['host_us'] / 1e3:6.3f} ms"
            f" ({100 * row['host_us'] / row['engine_us']:4.1f} %) | {row['read_bytes'] / 1e9:6.2f} GB"
            f" | {row['read_gb_per_s']:5.0f} GB/s = {share:3.0f} % of read"
        )
    print(f"{text} | {row['batch'] / row['engine_us'] * 1e6:7.0f} tok/s", flush=True)
    if "beside" in row:
        b = row["beside"]
        print(
            f"    beside a prompt of {b['prompt']}: {b['steps']} steps, median {b['median_us'] / 1e3:.2f} ms, "
            f"p99 {b['p99_us'] / 1e3:.2f} ms = {b['p99_over_median_without']:.2f} x the median without; slowest "
            + ", ".join(f"{s['step']}: {s['us'] / 1e3:.2f} ms" for s in b["slowest"])
        )
    kernels = row.get("kernels", [])
    if kernels:
        total = sum(k["total_us"] for k in kernels)
        print(f"    {sum(k['launches'] for k in kernels if k['kernel'] != '(idle)'):.0f} kernels, {total / 1e3:.3f} ms")
    for k in kernels[:num_kernels]:
        print(f"    {k['total_us']:10.1f} us  {k['launches']:6.1f} x {k['mean_us']:8.2f} us  {_short(k['kernel'])}")


def _short(name: str) -> str:
    """A kernel's name without the namespaces around it."""
    return name.replace("(anonymous namespace)::", "").removeprefix("void ").replace("nf::", "")[:90]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, help="a config.json (default: Super-49B; on a CPU a small model)")
    parser.add_argument("--batch", default="1,8,32,64", help="batch sizes (default %(default)s)")
    parser.add_argument("--context", default="1024", help="tokens in the cache per sequence (default %(default)s)")
    parser.add_argument("--quantize", default="fp8", help="fp8 or fp8-static (default %(default)s)")
    parser.add_argument(
        "--random-weights", choices=("normal", "dummy"), default="normal", help="dummy: as vLLM's (default %(default)s)"
    )
    parser.add_argument("--kv-dtype", default="fp8", help="type of the KV cache (default %(default)s)")
    parser.add_argument("--fp8-attention", action="store_true", help="of the prompt beside: products of e4m3")
    parser.add_argument("--steps", type=int, default=24, help="engine steps to time (default %(default)s)")
    parser.add_argument("--beside", type=int, default=0, metavar="N", help="tokens of a prompt computed beside")
    parser.add_argument("--repeats", type=int, default=9, help="groups of replays to time (default %(default)s)")
    parser.add_argument("--kernels", type=int, default=12, help="kernels to print; 0: no profile (default %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write the JSON record")
    args = parser.parse_args()
    batches, contexts = ([int(n) for n in text.split(",")] for text in (args.batch, args.context))
    on_gpu = args.device == "cuda"
    model = args.model or CONFIGS / ("super-49b-v1.json" if on_gpu else "mini-all-blocks.json")
    torch.manual_seed(0)
    ceilings = timing.copy_and_read_ceilings(torch.device(args.device))
    begin = time.perf_counter()
    llm = LLM(
        str(model),
        device=args.device,
        random_weights=args.random_weights,
        quantize=args.quantize,
        kv_dtype=args.kv_dtype,
        fp8_attention=args.fp8_attention,
        max_model_len=max(max(contexts) + num_steps(args), args.beside) + 1,
        max_num_seqs=max(batches) + (args.beside > 0),
        max_mixed_tokens=MIXED_TOKENS,
    )
    print(f"{timing.device_name(llm.device)}: {ceilings}; model ready in {time.perf_counter() - begin:.1f} s")
    fill_randomly(llm.engine)
    if args.beside:  # as AsyncLLM does
        llm.warm_up()
    results = []
    for context in contexts:
        for batch in batches:
            row = measure(llm, batch, context, args)
            show(row, ceilings and ceilings["read_gb_per_s"], args.kernels)
            results.append(row)
    if args.out is not None:
        record = timing.provenance(llm.device) | {
            "model": Path(model).name,
            "quantize": args.quantize,
            "random_weights": args.random_weights,
            "kv_dtype": args.kv_dtype,
            "fp8_attention": args.fp8_attention,
            "ceilings": ceilings,
            "results": results,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
