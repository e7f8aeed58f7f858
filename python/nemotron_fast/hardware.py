# SPDX-License-Identifier: Apache-2.0
"""The GPUs the planner knows by name: memory, bandwidth, architecture. Data only, nothing is probed."""

from __future__ import annotations

from dataclasses import dataclass

from nemotron_fast.errors import RequestError

MIB = 1 << 20
# What the driver keeps of the memory that NVML reports: 143,771 MiB against a CUDA total of 150,109,880,320
# bytes, measured on an H200 with driver 580. Assumed to be the same on the others.
DRIVER_RESERVED_BYTES = 143_771 * MIB - 150_109_880_320


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Sizes in bytes, bandwidth in bytes per second."""

    name: str  # as typed: "h100-80gb"
    label: str  # as printed
    arch: str  # "sm_90a", "sm_89", "sm_80", ...; "" where it is not known
    memory_bytes: int  # usable by CUDA, before a context exists
    bandwidth: float | None  # bytes/s of device memory; None where it is not known


def _gpu(name: str, label: str, arch: str, nvml_mib: int, gb_per_s: float) -> Gpu:
    return Gpu(name, label, arch, nvml_mib * MIB - DRIVER_RESERVED_BYTES, gb_per_s * 1e9)


# Memory: `memory.total` of nvidia-smi in MiB, ECC on. H200, H100 SXM, A100, L40S, A10, L4: published readings;
# the others: assumed from the same class of part.
# Bandwidth: vendor datasheets. No kernel reaches them: reading alone was measured at 3.1 of an H100's 3.35 TB/s.
_TABLE = (
    _gpu("h200", "H200 141 GB", "sm_90a", 143_771, 4800),
    _gpu("h100-80gb", "H100 SXM 80 GB", "sm_90a", 81_559, 3350),
    _gpu("h100-pcie-80gb", "H100 PCIe 80 GB", "sm_90a", 81_559, 2000),
    _gpu("h100-nvl-94gb", "H100 NVL 94 GB", "sm_90a", 95_830, 3900),
    _gpu("a100-80gb", "A100 SXM 80 GB", "sm_80", 81_920, 2039),
    _gpu("a100-pcie-80gb", "A100 PCIe 80 GB", "sm_80", 81_920, 1935),
    _gpu("a100-40gb", "A100 40 GB", "sm_80", 40_960, 1555),
    _gpu("l40s", "L40S 48 GB", "sm_89", 46_068, 864),
    _gpu("rtx-6000-ada", "RTX 6000 Ada 48 GB", "sm_89", 49_140, 960),
    _gpu("rtx-a6000", "RTX A6000 48 GB", "sm_86", 49_140, 768),
    _gpu("rtx-4090", "RTX 4090 24 GB", "sm_89", 24_564, 1008),
    _gpu("a10", "A10 24 GB", "sm_86", 23_028, 600),
    _gpu("l4", "L4 24 GB", "sm_89", 23_034, 300),
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}
_ALIASES = {"h100": "h100-80gb", "h100-nvl": "h100-nvl-94gb", "a100": "a100-80gb", "h200-141gb": "h200"}


def get_gpu(name: str) -> Gpu:
    """The GPU of that name; upper case, spaces and underscores are accepted.

    Raises:
        RequestError: no such name; the message lists those that exist.
    """
    key = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    gpu = GPUS.get(_ALIASES.get(key, key))
    if gpu is None:
        raise RequestError(f"GPU {name!r} is not known, want one of {', '.join(GPUS)}; or give its memory")
    return gpu


def custom_gpu(memory_bytes: int) -> Gpu:
    """A GPU of which only the usable memory is known.

    Raises:
        RequestError: not a positive number of bytes.
    """
    if memory_bytes <= 0:
        raise RequestError(f"memory is {memory_bytes} bytes, want a positive number")
    return Gpu("custom", f"a GPU with {memory_bytes / 1e9:.1f} GB", "", int(memory_bytes), None)
