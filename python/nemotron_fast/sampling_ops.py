# SPDX-License-Identifier: Apache-2.0
"""The wrappers of the sampling ops, as ops.py has the others, and there they are too."""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_fast import _C  # noqa: F401  (defines the schemas)

_ops = torch.ops.nemotron_fast


def penalize(
    logits: Tensor, output_counts: Tensor, in_prompt: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor
) -> None:
    """Apply penalties to logits [S, V] float32 in place.

    output_counts [S, V] int32, in_prompt [S, V] bool, the three penalties [S] float32.
    """
    _ops.penalize.default(logits, output_counts, in_prompt, presence, frequency, repetition)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    step: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """out [S] int64: one token per row of logits [S, V] float32.

    temperature, top_p, min_p [S] float32; top_k [S] int32 (0 = off); seed, step [S] int64.
    """
    if out is None:
        out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    _ops.sample.default(out, logits, temperature, top_k, top_p, min_p, seed, step)
    return out


def top_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob [S], rank [S] int64, top values [S, num_top], top ids [S, num_top] int64) of logits [S, V] float32."""
    size, device = logits.shape[0], logits.device
    chosen = torch.empty(size, dtype=torch.float32, device=device)
    rank = torch.empty(size, dtype=torch.int64, device=device)
    width = max(num_top, 1)  # a kernel writes at least one column
    values = torch.empty(size, width, dtype=torch.float32, device=device)
    ids = torch.empty(size, width, dtype=torch.int64, device=device)
    _ops.top_logprobs.default(chosen, rank, values, ids, logits, tokens)
    return chosen, rank, values[:, :num_top], ids[:, :num_top]
