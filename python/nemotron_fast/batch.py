# SPDX-License-Identifier: Apache-2.0
"""Batch: the tensors of one step, built from the scheduler's chunks. All sequences lie flattened in T tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_fast.pages import PAGE_SIZE
from nemotron_fast.request import Request
from nemotron_fast.scheduler import Chunk


@dataclass(frozen=True)
class PromptRows:
    """Logits rows [row, row + count) predict the prompt tokens at positions [position, position + count)."""

    request: Request
    position: int
    row: int
    count: int


@dataclass(frozen=True)
class Batch:
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, of the token in its sequence
    slots: Tensor  # [T] int64, page * PAGE_SIZE + offset
    page_table: Tensor  # [S, most pages] int64, rows padded with 0
    q_start: Tensor  # [S + 1] int64, first token of each sequence
    kv_len: Tensor  # [S] int64, cached tokens including this step's
    logit_rows: Tensor  # [R] int64, tokens whose logits are wanted: the sampled ones first, then prompt_rows
    sampled: list[Request]  # one per leading row of logit_rows
    prompt_rows: list[PromptRows]


def build_batch(chunks: list[Chunk], device: torch.device) -> Batch:
    """The step that computes `chunks`; every chunk's pages must already cover its tokens."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    q_start = [0]
    sampled, last_rows = [], []
    prompt_rows: list[PromptRows] = []
    wanted: list[int] = []
    for chunk in chunks:
        request, start, stop = chunk.request, chunk.start, chunk.stop
        base = q_start[-1]
        token_ids += request.tokens(start, stop)
        positions += range(start, stop)
        slots += [request.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, stop)]
        q_start.append(base + stop - start)
        if chunk.samples:
            sampled.append(request)
            last_rows.append(q_start[-1] - 1)
        first, end = _prompt_targets(chunk)
        if first < end:
            prompt_rows.append(PromptRows(request, first, len(wanted), end - first))
            wanted += range(base + first - 1 - start, base + end - 1 - start)
    offset = len(last_rows)
    prompt_rows = [PromptRows(r.request, r.position, r.row + offset, r.count) for r in prompt_rows]
    widest = max(len(c.request.pages) for c in chunks)
    table = [c.request.pages + [0] * (widest - len(c.request.pages)) for c in chunks]

    def tensor(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Batch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        slots=tensor(slots),
        page_table=tensor(table),
        q_start=tensor(q_start),
        kv_len=tensor([c.stop for c in chunks]),
        logit_rows=tensor(last_rows + wanted),
        sampled=sampled,
        prompt_rows=prompt_rows,
    )


def _prompt_targets(chunk: Chunk) -> tuple[int, int]:
    """Prompt positions whose log-probability this chunk's logits give and that are still wanted."""
    request = chunk.request
    if request.params.prompt_logprobs is None:
        return 0, 0
    first = max(chunk.start + 1, len(request.prompt_logprobs))  # a recomputed chunk has given some already
    return first, min(chunk.stop + 1, len(request.prompt))
