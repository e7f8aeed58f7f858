# SPDX-License-Identifier: Apache-2.0
"""Build of the extension `nemotron_fast._C`; everything else about the package is in pyproject.toml.

Environment switches:
    NF_CUDA        unset: with kernels if nvcc is found; 0: without; 1: with, and an error if there is no nvcc
    NF_CUDA_ARCHS  CMake's syntax, default "80;90a-real": "80" is machine code and PTX, "90a-real" machine code only
    CUDA_HOME      the toolkit to use (default: the nvcc on PATH)
    MAX_JOBS       compile jobs at a time
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pybind11
import torch.utils.cpp_extension as cpp
from setuptools import setup

ROOT = Path(__file__).parent
CUDA_ARCHS = os.environ.get("NF_CUDA_ARCHS", "80;90a-real")


def read_list(path: str) -> list[str]:
    lines = (ROOT / path).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def find_cuda_home() -> Path | None:
    """The toolkit to build with, or None for a CPU-only build."""
    wanted = os.environ.get("NF_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"NF_CUDA={wanted!r}, want 0 or 1, or leave it unset")
    if wanted == "0":
        return None
    home = Path(os.environ["CUDA_HOME"]) if "CUDA_HOME" in os.environ else home_of_nvcc_on_path()
    if home is not None and (home / "bin" / "nvcc").exists():
        return home
    if wanted == "1":
        raise SystemExit("NF_CUDA=1, but there is no nvcc in CUDA_HOME/bin or on PATH")
    return None


def home_of_nvcc_on_path() -> Path | None:
    """Asks nvcc itself: the program on PATH may be a wrapper that lies outside the toolkit."""
    if (nvcc := shutil.which("nvcc")) is None:
        return None
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else None


def gencode(arch: str) -> str:
    number, _, kind = arch.partition("-")
    code = {"": f"[sm_{number},compute_{number}]", "real": f"sm_{number}", "virtual": f"compute_{number}"}[kind]
    return f"-gencode=arch=compute_{number},code={code}"


def extension(cuda_home: Path | None) -> cpp.CppExtension:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    layers = {"any"} if cuda_home is None else {"any", "cuda"}
    sources = [f"csrc/{path}" for need, path in map(str.split, read_list("csrc/SOURCES")) if need in layers]
    include_dirs = [str(ROOT / "csrc"), pybind11.get_include()]
    cxx = ["-O2", "-std=c++20", "-Wall", "-fvisibility=hidden", f'-DNF_VERSION="{version}"']
    cxx += [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DTORCH_STABLE_ONLY",
    ]  # torch's stable ABI as of 2.11
    link = ["-Wl,--exclude-libs,ALL", "-s"]
    nvcc: list[str] = []
    library_dirs: list[str] = []
    if cuda_home is not None:
        cpp.CUDA_HOME = str(cuda_home)  # CPU-only torch leaves it None even where a toolkit is installed
        include_dirs += [str(cuda_home / "include")]
        library_dirs += [str(cuda_home / folder) for folder in ("lib64", "lib")]  # toolkit installer, pip wheel
        cxx += ["-DNF_WITH_CUDA", f'-DNF_CUDA_ARCHS="{CUDA_ARCHS.replace(";", ",")}"']
        nvcc = [*read_list("csrc/NVCC_FLAGS"), *map(gencode, CUDA_ARCHS.split(";"))]
        link += [
            "-lcudart_static",
            "-ldl",
            "-lrt",
            "-lpthread",
        ]  # static: the wheel imports where there is no CUDA
    return cpp.CppExtension(  # CUDAExtension wants torch's CUDA libraries; .cu goes to nvcc here too
        "nemotron_fast._C",
        sources,
        include_dirs=include_dirs,
        library_dirs=library_dirs,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
    )


setup(
    ext_modules=[extension(find_cuda_home())],
    cmdclass={"build_ext": cpp.BuildExtension.with_options(use_ninja=True)},
)
