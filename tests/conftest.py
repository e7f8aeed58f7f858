# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from nemotron_fast import _C

torch.set_num_threads(1)  # shapes are small, and several test processes may share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where they cannot run."""
    if not torch.cuda.is_available():
        reason = "no GPU"
    elif not _C.build_info()["cuda_built"]:
        reason = "this build has no kernels"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
