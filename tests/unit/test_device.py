# SPDX-License-Identifier: Apache-2.0
"""Which device is chosen, and what is said about a GPU that goes unused."""

import pytest
import torch

from nemotron_fast import device
from nemotron_fast.errors import DeviceError


@pytest.fixture(autouse=True)
def a_hopper_gpu_with_every_kernel(monkeypatch):
    info = {"cuda_built": True, "cuda_ops": sorted(device.GPU_OPS)}
    monkeypatch.setattr(device._C, "build_info", lambda: info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return info


def test_cuda_is_taken_when_asked_for():
    assert device.resolve_device("cuda").type == "cuda"
    assert device.resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize("proven", [True, False])
def test_auto_takes_proven_kernels_only(proven, monkeypatch, capsys):
    monkeypatch.setattr(device, "AUTO_TAKES_GPU", proven)
    assert device.resolve_device("auto").type == ("cuda" if proven else "cpu")
    assert ("await their tests" in capsys.readouterr().err) is not proven


def test_a_missing_packed_kernel_is_named(a_hopper_gpu_with_every_kernel):
    a_hopper_gpu_with_every_kernel["cuda_ops"].remove("packed_swiglu")
    with pytest.raises(DeviceError, match="no CUDA kernel for packed_swiglu; use device='cpu'"):
        device.resolve_device("cuda")


def test_another_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(DeviceError, match=r"compute capability \(9, 0\), this GPU has \(8, 0\)"):
        device.resolve_device("cuda")
