# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the decode step: one per padded batch size, captured when it is first needed."""

from __future__ import annotations

import bisect

import torch
from torch import Tensor

from nemotron_fast.batch import Batch
from nemotron_fast.kv_cache import KVCache
from nemotron_fast.model import Model
from nemotron_fast.pages import PAGE_SIZE
from nemotron_fast.scheduler import Chunk

WARMUP_STEPS = 2  # outside the graph, so that lazy initialisation is not captured


def padded_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes that get a graph: 1, 2, 4, then multiples of 8 up to 64, of 16 up to 256, of 64 beyond."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 64, 64)]
    return [*(s for s in sizes if s < max_num_seqs), max_num_seqs]


class DecodeBatch:
    """Batches of one token per sequence, in buffers that stay where they are.

    Rows beyond the sequences compute token 0 at position 0 of `scratch_page`, which no request owns.
    """

    def __init__(self, max_num_seqs: int, max_pages: int, scratch_page: int, device: torch.device) -> None:
        self._scratch_page = scratch_page
        width = 4 + max_pages  # token, position, slot, KV length, page table
        on_gpu = device.type == "cuda"
        self._host = torch.empty(max_num_seqs, width, dtype=torch.int64, pin_memory=on_gpu)
        self._rows = torch.empty(max_num_seqs, width, dtype=torch.int64, device=device)
        self._columns = torch.empty(4, max_num_seqs, dtype=torch.int64, device=device)
        self._count = torch.arange(max_num_seqs + 1, device=device)

    def buffers(self, size: int) -> Batch:
        """The batch of `size` rows; its tensors are the same memory at every call."""
        token_ids, positions, slots, kv_len = (column[:size] for column in self._columns)
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            page_table=self._rows[:size, 4:],
            q_start=self._count[: size + 1],
            kv_len=kv_len,
            logit_rows=self._count[:size],
            sampled=[],
            prompt_rows=[],
        )

    def load(self, chunks: list[Chunk], size: int) -> None:
        """Fill the first `size` rows from `chunks`, each of one token."""
        rows = self._host[:size].numpy()
        scratch = self._scratch_page
        rows[len(chunks) :, :4] = (0, 0, scratch * PAGE_SIZE, 1)
        rows[len(chunks) :, 4:] = scratch
        for row, chunk in zip(rows, chunks, strict=False):
            request, position = chunk.request, chunk.start
            pages = request.pages
            slot = pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
            row[:4] = (request.tokens(position, position + 1)[0], position, slot, position + 1)
            row[4 : 4 + len(pages)] = pages
            row[4 + len(pages) :] = scratch
        self._rows[:size].copy_(self._host[:size], non_blocking=True)
        self._columns[:, :size] = self._rows[:size, :4].T


class DecodeGraphs:
    """Replays the forward pass of decode steps."""

    def __init__(self, model: Model, cache: KVCache, *, max_num_seqs: int, max_pages: int, scratch_page: int) -> None:
        self._model, self._cache = model, cache
        self._sizes = padded_sizes(max_num_seqs)
        self._batch = DecodeBatch(max_num_seqs, max_pages, scratch_page, model.weights.embed.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def covers(chunks: list[Chunk]) -> bool:
        """Whether the step is pure decode: one token per sequence, and each is to be sampled."""
        return all(c.stop - c.start == 1 and c.samples for c in chunks)

    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Logits [len(chunks), V] float32; overwritten by the next call."""
        size = self._sizes[bisect.bisect_left(self._sizes, len(chunks))]
        self._batch.load(chunks, size)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, logits_SV = self._graphs[size]
        graph.replay()
        return logits_SV[: len(chunks)]

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        batch = self._batch.buffers(size)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                self._model.forward(batch, self._cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_SV = self._model.forward(batch, self._cache)
        return graph, logits_SV
