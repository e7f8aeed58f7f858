# SPDX-License-Identifier: Apache-2.0
"""Batch: the tensors of one step, built from the scheduler's chunks. All sequences lie flattened in T tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from nemotron_fast.pages import PAGE_SIZE
from nemotron_fast.reference_attention import MOST_DECODE_QUERIES
from nemotron_fast.request import Request
from nemotron_fast.scheduler import Chunk


@dataclass(frozen=True)
class Batch:
    """What the model reads.

    A page may be in the tables of several sequences, also of the one whose tokens of this step fill it: in each
    block the KV of all tokens is appended before any attention. Only if it `decodes` does no sequence attend to what
    another computes in this step (Scheduler._plan), so that one kernel may append and attend.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor | None  # [T] int64, of the token in its sequence; None if padded
    slots: Tensor | None  # [T] int64, page * PAGE_SIZE + offset; None if padded
    page_table: Tensor  # [S, most pages] int64, rows padded with any page
    q_start: Tensor  # [S + 1] int64, first token of each sequence; tokens behind the last are padding
    kv_len: Tensor  # [S] int64, cached tokens including this step's
    logit_rows: Tensor  # [R] int64, tokens whose logits are wanted: the sampled ones first, then prompt_rows
    num_few: int  # tokens of sequences with at most MOST_DECODE_QUERIES in this step, which come first, or of padding
    decodes: bool  # every sequence computes one token, its last, or in a padded batch none


@dataclass(frozen=True)
class PromptRows:
    """Logits rows [row, row + count) predict the prompt tokens at positions [position, position + count)."""

    request: Request
    position: int
    row: int
    count: int


@dataclass
class Rows:
    """The numbers of a batch on the host.

    `sources` says where a token comes from: row `sources[t]` of the tokens that the last step sampled, or, from
    `num_seqs` on, `token_ids[sources[t] - num_seqs]`.
    """

    token_ids: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    q_start: list[int] = field(default_factory=lambda: [0])
    kv_len: list[int] = field(default_factory=list)
    pages: list[list[int]] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)
    sampled: list[Request] = field(default_factory=list)  # one per leading row of logit_rows
    prompt_rows: list[PromptRows] = field(default_factory=list)

    @property
    def num_few(self) -> int:
        counts = (end - start for start, end in pairwise(self.q_start))
        return sum(count for count in counts if count <= MOST_DECODE_QUERIES)

    @property
    def decodes(self) -> bool:
        return len(self.token_ids) == len(self.kv_len)


def gather_rows(chunks: list[Chunk], num_seqs: int) -> Rows:
    """The rows of `chunks`, whose pages must cover their tokens; at most `num_seqs` sequences were sampled before.

    The chunks of few tokens come first.
    """
    rows = Rows()
    wanted: list[int] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.stop - chunk.start > MOST_DECODE_QUERIES):
        request, start, stop = chunk.request, chunk.start, chunk.stop
        base = len(rows.token_ids)
        rows.sources += range(num_seqs + base, num_seqs + base + stop - start)
        rows.token_ids += request.tokens(start, stop)
        if stop > request.num_tokens:  # the last one is in flight, or about to be replaced
            if request.forced:
                rows.token_ids.append(request.forced[0])
            else:
                rows.token_ids.append(0)
                rows.sources[-1] = request.sample_row
        rows.positions += range(start, stop)
        rows.slots += [request.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, stop)]
        rows.q_start.append(len(rows.token_ids))
        rows.kv_len.append(stop)
        rows.pages.append(request.pages)
        if chunk.samples:
            rows.sampled.append(request)
            rows.logit_rows.append(len(rows.token_ids) - 1)
        first, end = _prompt_targets(chunk)
        if first < end:
            rows.prompt_rows.append(PromptRows(request, first, len(wanted), end - first))
            wanted += range(base + first - 1 - start, base + end - 1 - start)
    offset = len(rows.logit_rows)
    rows.prompt_rows = [PromptRows(r.request, r.position, r.row + offset, r.count) for r in rows.prompt_rows]
    rows.logit_rows += wanted
    return rows


def _prompt_targets(chunk: Chunk) -> tuple[int, int]:
    """Prompt positions whose log-probability this chunk's logits give and that are still wanted."""
    request = chunk.request
    if request.params.prompt_logprobs is None:
        return 0, 0
    first = max(chunk.start + 1, len(request.prompt_logprobs))  # a recomputed chunk has given some already
    return first, min(chunk.stop + 1, len(request.prompt))
