# SPDX-License-Identifier: Apache-2.0
"""Which tokens each sequence with penalties has seen, kept on the device so that no step waits for another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_fast import ops
from nemotron_fast.request import Request
from nemotron_fast.staging import upload


@dataclass
class _Seat:
    row: int
    num_counted: int  # tokens of the output, the one in flight included


class Penalties:
    """A row of counts for each of the up to `max_num_seqs` sequences of a step: 5 V bytes a row, allocated when first
    needed. A sequence that is not in every step may lose its row to another, and is counted again when it goes on.
    """

    def __init__(self, max_num_seqs: int, vocab: int, device: torch.device) -> None:
        self._max_num_seqs, self._vocab, self._device = max_num_seqs, vocab, device
        self._counts: Tensor | None = None  # [max_num_seqs, V] int32, of output tokens
        self._in_prompt: Tensor | None = None  # [max_num_seqs, V] bool
        self._seats: dict[Request, _Seat] = {}

    def apply(self, logits_SV: Tensor, requests: list[Request]) -> None:
        """Change the logits of the requests with penalties in place."""
        rows = _penalized(requests)
        if not rows:
            return
        params = [requests[s].params for s in rows]
        members = set(requests)
        where, seats = self._upload(rows), self._upload([self._seat(requests[s], members).row for s in rows])
        picked = logits_SV[where]
        ops.penalize(
            picked,
            self._counts[seats],
            self._in_prompt[seats],
            self._upload([p.presence_penalty for p in params], torch.float32),
            self._upload([p.frequency_penalty for p in params], torch.float32),
            self._upload([p.repetition_penalty for p in params], torch.float32),
        )
        logits_SV[where] = picked

    def count(self, tokens_S: Tensor, requests: list[Request]) -> None:
        """The requests' next tokens, all in the vocabulary; `apply` came before."""
        rows = _penalized(requests)
        if not rows:
            return
        seats = [self._seats[requests[s]] for s in rows]
        where = (self._upload([seat.row for seat in seats]), tokens_S[self._upload(rows)])
        self._counts[where] += 1  # no pair occurs twice
        for seat in seats:
            seat.num_counted += 1

    def _seat(self, request: Request, members: set[Request]) -> _Seat:
        """The request's row, with all tokens before the one that the newest step, of `members`, samples."""
        seat = self._seats.get(request)
        if seat is not None and seat.num_counted == request.sample_index:
            return seat
        if self._counts is None:
            shape = (self._max_num_seqs, self._vocab)
            self._counts = torch.empty(shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.empty(shape, dtype=torch.bool, device=self._device)
        assert len(request.output) == request.sample_index, "a sequence starts with a token in flight"
        seat = self._seats[request] = _Seat(self._free_row(members) if seat is None else seat.row, len(request.output))
        output = self._upload(request.output)
        self._counts[seat.row].zero_().scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        self._in_prompt[seat.row].zero_().index_fill_(0, self._upload(request.prompt), True)
        return seat

    def _free_row(self, members: set[Request]) -> int:
        """A row that no running sequence has, or else one that is not of the step's `members`."""
        self._seats = {request: seat for request, seat in self._seats.items() if request.is_running}
        taken = {seat.row for seat in self._seats.values()}
        if len(taken) == self._max_num_seqs:
            return self._seats.pop(next(request for request in self._seats if request not in members)).row
        return next(row for row in range(self._max_num_seqs) if row not in taken)

    def _upload(self, values: list[int] | list[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return upload(values, dtype, self._device)


def _penalized(requests: list[Request]) -> list[int]:
    return [s for s, request in enumerate(requests) if request.params.has_penalties]
