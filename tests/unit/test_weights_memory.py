# SPDX-License-Identifier: Apache-2.0
"""load_weights needs next to no host memory beyond the mapped files and the weights themselves."""

import pathlib
import subprocess
import sys

import oracle
import pytest
import torch

MEASURE = """
import sys, threading, torch
from nemotron_fast.config import ModelConfig
from nemotron_fast.weights import load_weights
def anonymous():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
folder, dtype, quantize = sys.argv[1:]
config, dtype, quantize = ModelConfig.from_path(folder), getattr(torch, dtype), quantize or None
tiny = torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)  # starts the thread pool
before, peak, stop = anonymous(), 0, threading.Event()
def sample():
    global peak
    while not stop.wait(0.0005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=sample)
thread.start()
weights = load_weights(folder, config, dtype=dtype, quantize=quantize)
stop.set()
thread.join()
print(max(peak, anonymous()) - before - weights.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")
@pytest.mark.parametrize(
    "stored,wanted,quantize",
    [
        ("bfloat16", "bfloat16", ""),
        ("float32", "bfloat16", ""),
        ("bfloat16", "bfloat16", "fp8"),
        ("float32", "bfloat16", "fp8"),
    ],
)
def test_peak_memory(tmp_path, stored, wanted, quantize):
    """Beyond the mapped files and the final weights: less than twice the largest tensor (and in fact 32 MB)."""
    config, _ = oracle.random_checkpoint(0, tmp_path, blocks=[(2, 256)], heads=16)
    config["block_configs"][0]["ffn"]["intermediate_size"] = 1 << 15  # three matrices of 33 million elements
    weights = {n: torch.full(s, 0.5, dtype=getattr(torch, stored)) for n, s in oracle.parameter_shapes(config).items()}
    oracle.write_checkpoint(tmp_path, config, weights)
    args = [sys.executable, "-c", MEASURE, str(tmp_path), wanted, quantize]
    excess = int(subprocess.run(args, check=True, capture_output=True, text=True).stdout)
    largest = max(w.nbytes for w in weights.values())
    print(f"{excess / 1e6:.1f} MB beside tensors of {largest / 1e6:.1f} MB")
    assert excess < min(2 * largest, 32 << 20)
