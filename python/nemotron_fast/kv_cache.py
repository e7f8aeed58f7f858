# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache: one pair of tensors per attention block, none for the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_fast.blocks import Attention
from nemotron_fast.config import ModelConfig
from nemotron_fast.pages import PAGE_SIZE
from nemotron_fast.sharding import head_spans


@dataclass(frozen=True)
class KVCache:
    """Keys and values by KV slot, each [P, K, B, D]; K may differ between slots, the page numbers are shared."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))


def make_kv_cache(
    config: ModelConfig, num_pages: int, *, dtype: torch.dtype, device: torch.device, rank: int = 0, size: int = 1
) -> KVCache:
    """An empty cache of `num_pages` pages of PAGE_SIZE tokens for one tensor-parallel rank."""

    def tensors() -> tuple[Tensor, ...]:
        made = []
        for sub in config.attention_blocks:
            assert isinstance(sub.op, Attention)
            _, kv = head_spans(config.num_heads, sub.op.num_kv_heads, rank, size)
            shape = (num_pages, len(kv), PAGE_SIZE, config.head_dim)
            made.append(torch.empty(shape, dtype=dtype, device=device))
        return tuple(made)

    return KVCache(tensors(), tensors())
