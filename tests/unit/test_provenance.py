# SPDX-License-Identifier: Apache-2.0
"""What a bench's record says of itself."""

import pytest
import torch

from nemotron_fast.testing import timing


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["bench/bench_norm.py", "--quick"], "python3 bench/bench_norm.py --quick"),
        (["/somewhere/bin/nemotron-fast", "bench", "latency"], "nemotron-fast bench latency"),
        (["/somewhere/nemotron_fast/__main__.py", "doctor"], "python3 -m nemotron_fast doctor"),
        (["bench/bench_norm.py", "--out", "/somewhere/out/norm.json"], "python3 bench/bench_norm.py --out norm.json"),
        (["bench/bench_norm.py", "--out=/somewhere/norm.json"], "python3 bench/bench_norm.py --out=norm.json"),
    ],
)
def test_command_can_be_repeated_elsewhere(argv, command, monkeypatch):
    monkeypatch.setattr("sys.argv", argv)
    assert timing.provenance(torch.device("cpu"))["command"] == command


def test_commit_of_a_copy_without_git(monkeypatch):
    monkeypatch.setenv("NF_COMMIT", "1234567")
    assert timing.provenance(torch.device("cpu"))["commit"] == "1234567"
