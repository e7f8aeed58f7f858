# SPDX-License-Identifier: Apache-2.0
"""Which device and types the engine runs with, and how much memory is left there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from nemotron_fast import _C, cpu_backend, reference
from nemotron_fast.errors import DeviceError, RequestError

HOPPER = (9, 0)
GPU_OPS = frozenset({*cpu_backend.OP_NAMES} - {"linear"})  # there, linears are packed

# Whether "auto" may choose a GPU: only while `pytest -m gpu` passes on the kernels as they are.
AUTO_TAKES_GPU = True

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KV_DTYPES = DTYPES | {"fp8": reference.FP8}


def resolve_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda". "auto" takes a GPU that this build has every (proven) kernel for, else
    the CPU, and says on stderr why a GPU that is present goes unused.

    Raises:
        DeviceError: "cuda" was asked for and cannot run.
        RequestError: any other name.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise RequestError(f"device={name!r}, want 'auto', 'cpu' or 'cuda'")
    obstacle = _cuda_obstacle()
    if name == "cuda" and obstacle is not None:
        raise DeviceError(f"device='cuda' cannot run: {obstacle}; use device='cpu'")
    if name == "auto" and not AUTO_TAKES_GPU:
        obstacle = obstacle or "its kernels await their tests (pytest -m gpu); device='cuda' takes them as they are"
    if obstacle is None:
        return torch.device("cuda")
    if torch.cuda.is_available():
        print(f"nemotron_fast: using the CPU although a GPU is present: {obstacle}", file=sys.stderr)
    return torch.device("cpu")


def resolve_dtype(name: str, auto: str, choices: dict[str, torch.dtype], what: str) -> torch.dtype:
    """The torch type for `name`, or for `auto` where the name is "auto"."""
    if name != "auto" and name not in choices:
        raise RequestError(f"{what}={name!r}, want 'auto' or one of {', '.join(choices)}")
    return choices[auto if name == "auto" else name]


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_system_free_bytes()]
    group = Path("/sys/fs/cgroup")  # a container's own limit
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text().strip()) != "max":
        limits.append(int(most) - int((group / "memory.current").read_text()))
    return max(0, min(limits))


def _system_free_bytes() -> int:
    """Memory that can be had without swapping; where the system does not tell, all of it."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024  # the file counts KiB
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cuda_obstacle() -> str | None:
    info = _C.build_info()
    if not info["cuda_built"]:
        return "this build has no CUDA kernels (no nvcc was found when it was built)"
    if missing := sorted(GPU_OPS - set(info["cuda_ops"])):
        return f"this build has no CUDA kernel for {', '.join(missing)}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if (capability := torch.cuda.get_device_capability()) != HOPPER:
        return f"the linear kernels are for compute capability {HOPPER}, this GPU has {capability}"
    return None
