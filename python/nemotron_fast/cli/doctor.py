# SPDX-License-Identifier: Apache-2.0
"""`nemotron-fast doctor`: what is installed, what it can use, and whether that works."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import platform
from dataclasses import asdict
from typing import Any

from nemotron_fast.errors import DeviceError

DRIVER_LIBRARY = "libcuda.so.1"  # comes with the driver, not with CUDA
PACKAGES = ("nemotron-fast", "torch", "safetensors", "tokenizers", "numpy", "jinja2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report.

    Raises:
        DeviceError: something that should work does not; the report has been printed by then.
    """
    report = examine()
    if args.json:
        from nemotron_fast.cli import render

        render.print_json(report)
    else:
        _print_report(report)
    failed = [c for c in report["checks"] if c["passed"] is False]
    if failed:
        raise DeviceError(f"{len(failed)} failed: " + "; ".join(f"{c['name']}: {c['detail']}" for c in failed))
    return 0


def examine() -> dict[str, Any]:
    """The whole report, JSON-able."""
    from nemotron_fast.cli.selftest import run_checks

    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    checks = [asdict(check) for check in run_checks()]
    return {
        "versions": versions,
        "torch": _torch_build(),
        "build": _build(),
        "devices": _devices(),
        "checks": checks,
        "ok": all(check["passed"] is not False for check in checks),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_build() -> dict[str, Any] | None:
    """What torch was built for; None if it cannot be imported (the checks say why)."""
    try:
        import torch
    except ImportError:
        return None
    return {"cuda_version": torch.version.cuda, "sees_gpus": torch.cuda.device_count()}


def _extension() -> Any:
    """The compiled module, or None where it cannot be loaded (the checks say why)."""
    try:
        importlib.import_module("torch")
        return importlib.import_module("nemotron_fast._C")
    except ImportError:
        return None


def _build() -> dict[str, Any] | None:
    """What the extension contains, and which ops have no CUDA kernel in it."""
    extension = _extension()
    if extension is None:
        return None
    from nemotron_fast.device import GPU_OPS

    info = dict(extension.build_info())
    return info | {"ops_without_cuda": sorted(GPU_OPS - set(info["cuda_ops"]))}


def _devices() -> dict[str, Any]:
    extension = _extension()
    if extension is None:
        return {"gpus": [], "reason": "the extension is not built or does not load"}
    found = dict(extension.device_info())
    return found | {"reason": _explain_no_gpu(found["reason"], extension.build_info()["cuda_version"])}


def _explain_no_gpu(reason: str | None, cuda_version: str | None) -> str | None:
    """The CUDA runtime has one status for a driver that is missing and one that is too old; tell them apart."""
    if reason is None or "driver version is insufficient" not in reason:  # cudaErrorInsufficientDriver
        return reason
    try:
        ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return "no NVIDIA driver"
    return f"the NVIDIA driver is too old for CUDA {cuda_version}; install a newer one"


def _print_report(report: dict[str, Any]) -> None:
    from nemotron_fast.cli import render

    out = render.console()
    rows = render.table(None, "", "", left=2)
    rows.show_header = False
    for name, version in report["versions"].items():
        rows.add_row(name, version or "not installed")
    torch, build, devices = report["torch"], report["build"], report["devices"]
    if torch is not None:
        rows.add_row("torch built for", f"CUDA {torch['cuda_version']}" if torch["cuda_version"] else "CPU only")
    if build is None:
        rows.add_row("extension", "[red]not built or not loadable[/]")
    else:
        cuda = f"CUDA {build['cuda_version']}, {', '.join(build['archs'])}" if build["cuda_built"] else "CPU only"
        rows.add_row("extension", f"{build['version']}, {cuda}, compiler {build['compiler']}")
        rows.add_row("CUDA kernels", ", ".join(build["cuda_ops"]) or "none")
        if build["cuda_built"] and build["ops_without_cuda"]:
            rows.add_row("without one", ", ".join(build["ops_without_cuda"]))
    for index, gpu in enumerate(devices["gpus"]):
        major, minor = gpu["compute_capability"]
        rows.add_row(f"GPU {index}", f"{gpu['name']}, sm_{major}{minor}, {render.size(gpu['memory_bytes'])}")
    if not devices["gpus"]:
        rows.add_row("GPU", f"none: {devices['reason'] or 'the CUDA runtime counts 0'}")
    rows.columns[1].no_wrap = False
    out.print(rows)
    out.print()
    marks = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "skip"}
    for check in report["checks"]:
        seconds = f" ({check['seconds']:.1f} s)" if check["passed"] is not None else ""
        out.print(f"{marks[check['passed']]}  {check['name']}: ", end="")
        out.print(check["detail"] + seconds, markup=False, soft_wrap=True)
