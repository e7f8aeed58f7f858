# SPDX-License-Identifier: Apache-2.0
"""`doctor`: what it finds in a sound installation, and in broken ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from nemotron_fast.cli import doctor, selftest
from nemotron_fast.cli.main import main


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["versions"]["torch"]
    passed = {c["name"]: c["passed"] for c in report["checks"]}
    for name in ("op rms_norm", "op linear in FP8", "op attention", "demo model"):
        assert passed[f"{name}, cpu"] is True


@pytest.mark.parametrize(
    ("library", "want"),
    [("libno-such-driver.so.1", "no NVIDIA driver"), ("libc.so.6", "the NVIDIA driver is too old for CUDA 13.0")],
)
def test_doctor_tells_a_missing_driver_from_an_old_one(
    monkeypatch: pytest.MonkeyPatch, library: str, want: str
) -> None:
    monkeypatch.setattr(doctor, "DRIVER_LIBRARY", library)
    status = "CUDA driver version is insufficient for CUDA runtime version"  # of cudaErrorInsufficientDriver
    extension = SimpleNamespace(
        device_info=lambda: {"gpus": [], "reason": status}, build_info=lambda: {"cuda_version": "13.0"}
    )
    monkeypatch.setattr(doctor, "_extension", lambda: extension)
    assert doctor._devices()["reason"].startswith(want)
    assert doctor._explain_no_gpu("no CUDA-capable device is detected", "13.0").startswith("no CUDA-capable")
    assert doctor._explain_no_gpu(None, None) is None


def test_doctor_without_the_extension(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemotron_fast._C", None)
    monkeypatch.delattr("nemotron_fast._C")
    assert main(["doctor"]) == 6
    out, err = capsys.readouterr()
    assert "not built" in out
    assert "extension" in err.splitlines()[-1]


def scaled(op: Callable) -> Callable:
    """The op with its result 5% too large."""
    return lambda *args, **options: op(*args, **options) * 1.05


@pytest.mark.parametrize(
    ("op", "title"), [("rms_norm", "rms_norm"), ("linear", "linear in FP8"), ("attention", "attention")]
)
def test_doctor_finds_wrong_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, op: str, title: str
) -> None:
    from nemotron_fast import ops

    monkeypatch.setattr(ops, op, scaled(getattr(ops, op)))
    monkeypatch.setattr(selftest, "_check_demo", lambda device: "")
    assert main(["doctor"]) == 6
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: 1 failed: op {title}, cpu: relative error")
