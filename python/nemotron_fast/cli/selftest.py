# SPDX-License-Identifier: Apache-2.0
"""The doctor's checks: does what this installation holds compute the right thing?"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from nemotron_fast.cli.op_checks import OP_CHECKS, CheckFailed
from nemotron_fast.models import demo_folder

GREEDY_TOKENS = 24  # of the demo's recorded sample; enough to pass every kind of block and a page of KV cache


@dataclass(frozen=True)
class Check:
    """One check: `passed` is None where it did not apply, and `detail` says why."""

    name: str
    passed: bool | None
    detail: str
    seconds: float = 0.0


def run_checks() -> list[Check]:
    """Every check that this machine allows. What raises has failed; nothing is raised from here."""
    checks = [_timed("extension", _check_extension)]
    if not checks[0].passed:
        return checks
    checks += [_timed(f"op {name}, cpu", lambda c=check: c("cpu")) for name, (_, check) in OP_CHECKS.items()]
    checks.append(_timed("demo model, cpu", lambda: _check_demo("cpu")))
    obstacle = _gpu_obstacle()
    if obstacle is not None:
        return [*checks, Check("cuda", None, obstacle)]
    for name, (op, check) in OP_CHECKS.items():
        obstacle = _op_obstacle(op)
        title = f"op {name}, cuda"
        checks.append(Check(title, None, obstacle) if obstacle else _timed(title, lambda c=check: c("cuda")))
    obstacle = _engine_obstacle()
    title = "demo model, cuda"
    return [*checks, Check(title, None, obstacle) if obstacle else _timed(title, lambda: _check_demo("cuda"))]


def _timed(name: str, check: Callable[[], str]) -> Check:
    start = time.perf_counter()
    try:
        detail, passed = check(), True
    except CheckFailed as error:
        detail, passed = str(error), False
    except Exception as error:  # a doctor reports whatever is broken and goes on
        detail, passed = f"{type(error).__name__}: {error}", False
    return Check(name, passed, " ".join(detail.split()), time.perf_counter() - start)


def _check_extension() -> str:
    """The compiled part loads, and belongs to this package."""
    import torch  # noqa: F401  its libraries must be loaded before the extension's

    try:
        from nemotron_fast import _C
    except ImportError as error:
        if "_C" in str(error) and "cannot import name" in str(error):
            raise CheckFailed("not built; run: pip install .") from None
        raise
    built = _C.build_info()["version"]
    try:
        installed = importlib.metadata.version("nemotron-fast")
    except importlib.metadata.PackageNotFoundError:
        return f"version {built}, running from source"
    if built != installed:
        raise CheckFailed(f"it was built as version {built}, the package is {installed}; reinstall")
    return f"version {built}"


def _gpu_obstacle() -> str | None:
    """Why nothing can run on a GPU here; None if something can."""
    import torch

    from nemotron_fast import _C

    if not _C.build_info()["cuda_built"]:
        return "this build has no CUDA kernels"
    if not torch.cuda.is_available():
        return "torch sees no GPU" if torch.version.cuda else "torch is a CPU-only build"
    return None


def _op_obstacle(op: str) -> str | None:
    from nemotron_fast import _C

    return None if op in _C.build_info()["cuda_ops"] else f"this build has no CUDA kernel for {op}"


def _engine_obstacle() -> str | None:
    from nemotron_fast.device import resolve_device
    from nemotron_fast.errors import DeviceError

    try:
        resolve_device("cuda")
    except DeviceError as error:
        return str(error)
    return None


def _check_demo(device: str) -> str:
    """Greedy tokens of the demo model equal those recorded when it was trained."""
    from nemotron_fast.llm import LLM
    from nemotron_fast.sampling_params import SamplingParams

    recorded = json.loads((demo_folder() / "training.json").read_text(encoding="utf-8"))["greedy_sample"]
    with LLM("demo", device=device, generation_config="none") as llm:
        params = SamplingParams(max_tokens=GREEDY_TOKENS, temperature=0.0)
        result = llm.generate(recorded["prompt"], params)[0]
    text = recorded["prompt"] + result.text
    if result.usage.completion_tokens != GREEDY_TOKENS or not recorded["text"].startswith(text):
        raise CheckFailed(f"generated {result.text!r}, recorded was {recorded['text'][len(recorded['prompt']) :]!r}")
    return f"{GREEDY_TOKENS} greedy tokens as recorded, {result.timings.tokens_per_s:.1f} tok/s"
