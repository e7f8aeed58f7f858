# SPDX-License-Identifier: Apache-2.0
"""One step on the device: launched without waiting for it, its tokens fetched later.

Sampled tokens stay on the device, in `_sampled`, and feed the next step from there. Steps in which every sequence
computes one token run on buffers that stay where they are, so that on a GPU they are replayed as CUDA graphs from
the embedding to the sampled tokens; their rows are padded to a few sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemotron_fast import ops
from nemotron_fast.batch import Batch, PromptRows, Rows, gather_rows
from nemotron_fast.graphs import StepGraphs, padded_size, padded_sizes
from nemotron_fast.kv_cache import KVCache
from nemotron_fast.model import Model
from nemotron_fast.penalties import Penalties
from nemotron_fast.prompt_warm_up import warm_up_rows, warm_up_sizes
from nemotron_fast.request import Request, TokenLogprob
from nemotron_fast.sampling import (
    SamplingRows,
    add_biases,
    changes_logits,
    final_tokens,
    sampling_columns,
    token_logprobs,
)
from nemotron_fast.scheduler import Chunk
from nemotron_fast.staging import Column, Fetch, Staging

TOKEN_WORDS, SEQ_WORDS = 5, 9  # 64-bit words of a step per token, and per sequence besides its pages, at most


@dataclass(frozen=True)
class Launch:
    """A step in flight."""

    sampled: list[Request]  # one per token
    prompt_rows: list[PromptRows]
    logits_RV: Tensor  # as the model gave them, until the next launch
    _results: Fetch  # the tokens, and the results of ops.top_logprobs if anybody asked for them

    def wait(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """The sampled tokens, and their log-probabilities where asked for; waits for the step."""
        tokens, *found = self._results.wait()
        wanted = [r.params.logprobs for r in self.sampled]
        return tokens, token_logprobs(tokens, wanted, *found) if found else [None] * len(tokens)


@dataclass(frozen=True)
class Inputs:
    """A step on the device: the batch without its token ids, and where those come from."""

    feed: Tensor  # [max_num_seqs + T] int64: the tokens that the last step sampled, then those known to the host
    sources: Tensor  # [T] int64, of each token in `feed`
    positions: Tensor | None
    slots: Tensor | None
    page_table: Tensor
    q_start: Tensor
    kv_len: Tensor
    logit_rows: Tensor
    num_few: int
    decodes: bool
    sampling: SamplingRows

    def batch(self) -> Batch:
        return Batch(
            self.feed.gather(0, self.sources),
            self.positions,
            self.slots,
            self.page_table,
            self.q_start,
            self.kv_len,
            self.logit_rows,
            self.num_few,
            self.decodes,
        )


class Executor:
    """Computes steps of at most `max_num_seqs` sequences of at most `max_pages` pages, and `max_tokens` tokens.

    With `pad_decode`, decode steps are padded, and on a GPU become graphs.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_tokens: int,
        max_pages: int,
        pad_decode: bool,
    ) -> None:
        self.model, self.cache = model, cache
        self._max_num_seqs, self._pad_decode = max_num_seqs, pad_decode
        device = model.weights.embed.device
        on_gpu = device.type == "cuda"
        self._max_tokens = max_tokens = max(max_tokens, max_num_seqs)
        capacity = max_tokens * TOKEN_WORDS + max_num_seqs * (SEQ_WORDS + max_pages)
        self._staging = Staging(max_num_seqs, capacity, device)
        self._sampled = self._staging.memory[:max_num_seqs]
        self._sizes = padded_sizes(max_num_seqs)
        self._page_table = torch.zeros(max_num_seqs, max_pages, dtype=torch.int64, device=device)
        self._count = torch.arange(max_num_seqs, device=device)
        self._penalties = Penalties(max_num_seqs, model.config.vocab_size, device)
        self._graphs = StepGraphs(self._sampled) if on_gpu and pad_decode else None

    def launch(self, chunks: list[Chunk]) -> Launch:
        """Start computing the chunks; the tokens of all launches but the last must have been fetched."""
        rows = gather_rows(chunks, self._max_num_seqs)
        sampled = rows.sampled
        num_rows = len(sampled)
        if self._pad_decode and rows.decodes and num_rows == len(chunks):
            size = padded_size(self._sizes, num_rows)
            inputs = self._load_padded(rows, size)
            logits_RV = self._replay(size, inputs)
        else:
            inputs = self._load(rows)
            logits_RV = self._compute(inputs)
        for row, request in enumerate(sampled):
            request.sample_row = row
        return Launch(sampled, rows.prompt_rows, logits_RV, Fetch(*self._sample_again(inputs, logits_RV, sampled)))

    def _sample_again(self, inputs: Inputs, logits_RV: Tensor, requests: list[Request]) -> list[Tensor]:
        """What options beyond those of ops.sample make of the step: its tokens, and log-probabilities if wanted."""
        raw_SV, tokens_S = logits_RV[: len(requests)], self._sampled[: len(requests)]
        num_top = max((r.params.logprobs for r in requests if r.params.logprobs is not None), default=None)
        changed = any(map(changes_logits, requests))
        if changed:
            logits_SV = raw_SV if num_top is None else raw_SV.clone()
            add_biases(logits_SV, requests)
            self._penalties.apply(logits_SV, requests)
            inputs.sampling.sample(logits_SV, tokens_S)
        if not changed and num_top is None:
            return [tokens_S]
        final_S = final_tokens(tokens_S, requests)
        self._penalties.count(final_S, requests)
        if num_top is None:
            return [tokens_S]
        return [tokens_S, *ops.top_logprobs(raw_SV, final_S, min(num_top, raw_SV.shape[1]))]

    def warm_up(self) -> None:
        """Compute steps for nobody: of all padded sizes, which captures their graphs, and of prompts, which loads their
        kernels. The largest come first: their memory serves all.

        Of the KV cache nothing changes. No step may be in flight. On a CPU there is nothing to do, unless with padding.
        """
        if not (self._pad_decode or self._sampled.is_cuda):
            return
        for size in reversed(self._sizes):
            self._replay(size, self._load_padded(Rows(), size))
            Fetch(self._sampled).wait()  # the staging buffers are free again
        for size in reversed(warm_up_sizes(self._max_tokens)):
            self._compute(self._load(warm_up_rows(size, self.model.max_model_len, self._max_num_seqs)))
            Fetch(self._sampled).wait()

    def decode_graph(self, num_seqs: int) -> torch.cuda.CUDAGraph:
        """The graph of decode steps of so many sequences, which must have run before; for benches."""
        return self._graphs.graph(padded_size(self._sizes, num_seqs))

    def _replay(self, size: int, inputs: Inputs) -> Tensor:
        """_compute on the buffers of a padded size."""
        if self._graphs is None:
            return self._compute(inputs)
        return self._graphs.replay(size, lambda: self._compute(inputs))

    def _compute(self, inputs: Inputs) -> Tensor:
        """Logits [R, V] float32; the tokens of the sampled rows go to _sampled."""
        logits_RV = self.model.forward(inputs.batch(), self.cache)
        num_rows = len(inputs.sampling.seed)
        inputs.sampling.sample(logits_RV[:num_rows], self._sampled[:num_rows])
        return logits_RV

    def _load(self, rows: Rows) -> Inputs:
        width = max(len(pages) for pages in rows.pages)
        columns = (rows.sources, rows.positions, rows.slots, rows.q_start, rows.kv_len, rows.logit_rows)
        token_ids, sources, positions, slots, q_start, kv_len, logit_rows, table, *sampling = self._staging.load(
            [
                Column(rows.token_ids),  # first, so that it lies behind _sampled
                *map(Column, columns),
                Column(_table(rows.pages, width).ravel()),
                *sampling_columns(rows.sampled),
            ]
        )
        return Inputs(
            self._feed(len(token_ids)),
            sources,
            positions,
            slots,
            table.view(len(kv_len), width),
            q_start,
            kv_len,
            logit_rows,
            rows.num_few,
            rows.decodes,
            SamplingRows(*sampling),
        )

    def _load_padded(self, rows: Rows, size: int) -> Inputs:
        """A step of one token per sequence, and up to `size` of sequences without any: rows of token 0 that attend to
        nothing and write no KV.

        The tensors are the same memory for the same size. What decode_attention reads before the kernels ahead of it
        have finished is written here, outside of the graph.
        """
        room, extra = self._max_num_seqs, size - len(rows.sampled)
        width = max((len(pages) for pages in rows.pages), default=1)
        table = _table([*rows.pages, *[[]] * extra], width)
        _, sources, q_start, kv_len, *rest = self._staging.load(
            [
                Column([*rows.token_ids, *[0] * extra], room=room),
                Column([*rows.sources, *range(room + size - extra, room + size)], room=room),
                Column([*rows.q_start, *rows.q_start[-1:] * extra], room=room + 1),
                Column([*rows.kv_len, *[0] * extra], room=room),
                *sampling_columns(rows.sampled, extra, room),
                Column(table.ravel()),
            ]
        )
        *sampling, table = rest
        self._page_table[:size, :width] = table.view(size, width)
        return Inputs(
            self._feed(size),
            sources,
            None,
            None,
            self._page_table[:size],
            q_start,
            kv_len,
            self._count[:size],
            size,
            True,
            SamplingRows(*sampling),
        )

    def _feed(self, num_tokens: int) -> Tensor:
        return self._staging.memory[: self._max_num_seqs + num_tokens]


def _table(pages: list[list[int]], width: int) -> np.ndarray:
    table = np.zeros((len(pages), width), dtype=np.int64)
    for row, owned in zip(table, pages, strict=True):
        row[: len(owned)] = owned
    return table
