# SPDX-License-Identifier: Apache-2.0
"""The RoPE table: cos and sin of every position, with the llama3 frequency rescale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemotron_fast.config import ModelConfig


def rope_table(config: ModelConfig, num_positions: int, device: torch.device) -> Tensor:
    """[num_positions, D] float32: cos, then sin, D/2 each. Angles are computed in float64.

    llama3 rescale (Llama 3.1 reference code): with wavelength w, frequencies of w > original/low are divided by
    factor, those of w < original/high are kept, and in between the two are blended linearly in original/w.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents  # radians per position
    if config.rope_scaling is not None:
        s = config.rope_scaling
        turns = s.original_max_position * frequencies / (2 * math.pi)  # original / wavelength
        keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / s.factor)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device=device, dtype=torch.float32)
