# SPDX-License-Identifier: Apache-2.0
"""Timing of ops, and the record of it.

Method on a GPU. A candidate is captured into a CUDA graph that calls it once on each of `num_sets` input sets, which
together exceed three times the L2 cache: so every call finds its inputs cold, and launch overhead of the host is not
in the time. No memory goes back to the driver on the way: where it did, an H100 had up to a fifth less bandwidth for a
while (the driver seems to clear what it gets). Replays of the candidates alternate (A B A B ...), so that clocks and
temperature affect all alike. A time is that of one replay divided by `num_sets`; reported are the median, p10 and p90
over the replays. The bandwidth ceilings are measured in the same run. On a CPU one call per replay is timed with
time.perf_counter, and the record says "cpu". A candidate whose result is wrong is never timed: `verify` raises first.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nemotron_fast.testing.cases import Cost

FLOPS_PER_BYTE = (
    100  # a call with more is bound by arithmetic, not by bandwidth (a Hopper GPU's balance is 200 in BF16)
)
MAX_SETS = 16384  # nodes of one graph; a case that wants more is too small to be timed cold


@dataclass(frozen=True)
class Candidate:
    name: str
    run: Callable[[int], object]  # calls the op on input set i
    verify: Callable[[], None]  # raises if the op's result is wrong


@dataclass(frozen=True)
class Timing:
    """Of one call, in microseconds."""

    median_us: float
    p10_us: float
    p90_us: float


@dataclass(frozen=True)
class Result:
    """One line of a benchmark."""

    op: str
    case: str
    candidate: str
    timing: Timing
    cost: Cost

    @property
    def gb_per_s(self) -> float:
        return self.cost.num_bytes / self.timing.median_us / 1e3

    @property
    def tflop_per_s(self) -> float:
        return self.cost.flops / self.timing.median_us / 1e6

    def line(self, copy_gb_per_s: float | None, first: Result) -> str:
        """Bandwidth, or arithmetic where that is the limit; and the time as a multiple of the first candidate's."""
        text = f"{self.case:<44} {self.candidate:<14} | {self.timing.median_us:9.2f} us"
        if self.cost.flops > FLOPS_PER_BYTE * self.cost.num_bytes:
            text += f" | {self.tflop_per_s:7.1f} TFLOP/s"
        else:
            text += f" | {self.gb_per_s:7.0f} GB/s"
            if copy_gb_per_s is not None:
                text += f" | {100 * self.gb_per_s / copy_gb_per_s:3.0f}% of copy"
        return f"{text} | {self.timing.median_us / first.timing.median_us:5.2f}x {first.candidate}"


def num_sets(bytes_per_set: int, device: torch.device) -> int:
    """Input sets to rotate through, so that none is in L2 when its turn comes."""
    if device.type == "cpu":
        return 1
    wanted = math.ceil(3 * torch.cuda.get_device_properties(device).L2_cache_size / bytes_per_set) + 1
    assert wanted <= MAX_SETS, f"{bytes_per_set} bytes a call need {wanted} input sets, more than {MAX_SETS}"
    return wanted


def time_candidates(
    candidates: list[Candidate], num_sets: int, device: torch.device, *, repeats: int = 21
) -> dict[str, Timing]:
    """Times by candidate name. The method is in the docstring of this module."""
    for candidate in candidates:
        candidate.verify()
    time_once = {c.name: (_cpu_timer(c) if device.type == "cpu" else _graph_timer(c, num_sets)) for c in candidates}
    samples: dict[str, list[float]] = {name: [] for name in time_once}
    for repeat in range(-3, repeats):  # three rounds to warm up
        for name, timer in time_once.items():
            us = timer()
            if repeat >= 0:
                samples[name].append(us)
    return {name: _summary(us) for name, us in samples.items()}


def copy_and_read_ceilings(device: torch.device) -> dict[str, float] | None:
    """GB/s of a device-to-device copy (bytes read plus bytes written) and of a sum that only reads; None on a CPU.

    The copy is the better of a memcpy and a kernel: in a graph a memcpy may get a copy engine, which is slower.
    """
    if device.type == "cpu":
        return None
    source = torch.randn(1 << 29, dtype=torch.float32, device=device)  # 2 GiB, far beyond L2
    target = torch.empty_like(source)
    copy = Candidate("memcpy", lambda _: target.copy_(source), lambda: None)
    kernel = Candidate("kernel", lambda _: torch.neg(source, out=target), lambda: None)
    read = Candidate("read", lambda _: source.sum(), lambda: None)
    times = time_candidates([copy, kernel, read], 1, device)
    num_bytes = source.numel() * source.element_size()
    return {
        "copy_gb_per_s": 2 * num_bytes / min(times["memcpy"].median_us, times["kernel"].median_us) / 1e3,
        "read_gb_per_s": num_bytes / times["read"].median_us / 1e3,
    }


def write_json(path: Path, results: list[Result], ceilings: dict[str, float] | None, device: torch.device) -> None:
    """Writes the results with everything needed to repeat them."""
    record = provenance(device) | {
        "ceilings": ceilings,
        "results": [asdict(r) | {"gb_per_s": r.gb_per_s, "tflop_per_s": r.tflop_per_s} for r in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def provenance(device: torch.device) -> dict[str, Any]:
    """What is needed to repeat a measurement. NF_COMMIT names the commit of a copy without .git."""
    return {
        "command": _command(sys.argv),
        "commit": os.environ.get("NF_COMMIT") or _output_of("git", "describe", "--always", "--dirty"),
        "device": device_name(device),
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def _command(argv: list[str]) -> str:
    """As it was typed, but for where Python, the package and files that are named from the root lie."""
    script = Path(argv[0])
    arguments = [re.sub(r"(^|=)/.*/", r"\1", argument) for argument in argv[1:]]
    if script.name == "__main__.py":
        return " ".join(["python3 -m", script.parent.name, *arguments])
    if script.is_absolute():  # installed
        return " ".join([script.name, *arguments])
    return " ".join(["python3", argv[0], *arguments])


def device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _graph_timer(candidate: Candidate, num_sets: int) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs are there
    with torch.cuda.stream(stream):
        for i in range(min(num_sets, 3)):  # compiles and allocates outside of the capture
            candidate.run(i)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # not torch.cuda.graph, which gives back what memory is not in use
        graph.capture_begin()
        results = [candidate.run(i) for i in range(num_sets)]  # all alive: each call writes to memory of its own
        graph.capture_end()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timer() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / num_sets

    del results  # the graph keeps their memory
    return timer


def _cpu_timer(candidate: Candidate) -> Callable[[], float]:
    def timer() -> float:
        begin = time.perf_counter()
        candidate.run(0)
        return (time.perf_counter() - begin) * 1e6

    return timer


def _summary(samples_us: list[float]) -> Timing:
    deciles = statistics.quantiles(samples_us, n=10, method="inclusive")
    return Timing(statistics.median(samples_us), deciles[0], deciles[-1])


def _output_of(*command: str) -> str | None:
    """What the command prints; None where it is not installed or fails (a copy without .git, a machine without GPU)."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
