# SPDX-License-Identifier: Apache-2.0
"""nemotron_fast: an inference engine for NVIDIA's NAS-derived ("Puzzle") Llama models.

The names below are loaded on first use, so that planning and inspecting never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron_fast.async_llm import AsyncLLM
    from nemotron_fast.llm import LLM
    from nemotron_fast.sampling_params import SamplingParams

__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "nemotron_fast.llm",
    "AsyncLLM": "nemotron_fast.async_llm",
    "SamplingParams": "nemotron_fast.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("nemotron-fast")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nemotron_fast' has no attribute {name!r}")
