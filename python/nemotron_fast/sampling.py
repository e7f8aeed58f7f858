# SPDX-License-Identifier: Apache-2.0
"""From the logits of a step to its tokens: per-request options as per-row tensors, then the ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_fast import ops
from nemotron_fast.request import Request, TokenLogprob
from nemotron_fast.staging import Column, upload

NAN_TOKEN = -1  # what ops.sample gives for a row of logits with a NaN


@dataclass(frozen=True)
class SamplingRows:
    """The options of ops.sample, one row per sampled token."""

    temperature: Tensor  # [S] float32
    top_k: Tensor  # [S] int32
    top_p: Tensor  # [S] float32
    min_p: Tensor  # [S] float32
    seed: Tensor  # [S] int64
    step: Tensor  # [S] int64

    def sample(self, logits_SV: Tensor, out: Tensor) -> None:
        """One token per row of logits, which may be fewer, into out [S] int64."""
        columns = (self.temperature, self.top_k, self.top_p, self.min_p, self.seed, self.step)
        ops.sample(logits_SV, *(c[: len(logits_SV)] for c in columns), out=out)


def sampling_columns(requests: list[Request], num_padding: int = 0, room: int | None = None) -> list[Column]:
    """The columns of SamplingRows for the tokens that the newest step samples; the padding rows are greedy."""
    params = [r.params for r in requests]
    padding = [0] * num_padding
    columns = (
        ([p.temperature for p in params], torch.float32),
        ([max(p.top_k, 0) for p in params], torch.int32),
        ([p.top_p for p in params], torch.float32),
        ([p.min_p for p in params], torch.float32),
        ([r.seed for r in requests], torch.int64),
        ([r.sample_index for r in requests], torch.int64),
    )
    return [Column([*values, *padding], dtype, room) for values, dtype in columns]


def changes_logits(request: Request) -> bool:
    """Whether the request's next token is not sampled from the logits as they are."""
    return request.params.has_penalties or _has_bias(request)


def final_tokens(tokens_S: Tensor, requests: list[Request]) -> Tensor:
    """A copy, without NAN_TOKEN, in which forced tokens take the place of sampled ones where they are known by now."""
    final_S = tokens_S.clamp(min=0)
    for row, request in enumerate(requests):
        if request.forced and request.in_flight == 1:
            final_S[row].fill_(request.forced[0])
    return final_S


def token_logprobs(
    tokens: list[int],
    num_tops: list[int | None],
    chosen: list[float],
    ranks: list[int],
    values: list[list[float]],
    ids: list[list[int]],
) -> list[TokenLogprob | None]:
    """The results of ops.top_logprobs by token; None where the number of alternatives is."""
    return [
        None
        if num_top is None
        else TokenLogprob(token, chosen[s], ranks[s], tuple(zip(ids[s], values[s], strict=True))[:num_top])
        for s, (token, num_top) in enumerate(zip(tokens, num_tops, strict=True))
    ]


def prompt_logprobs(logits_SV: Tensor, tokens: list[int], num_top: int) -> list[TokenLogprob | None]:
    """The given tokens' log-probabilities, with so many alternatives."""
    targets = torch.tensor(tokens, device=logits_SV.device)
    found = ops.top_logprobs(logits_SV, targets, min(num_top, logits_SV.shape[1]))
    return token_logprobs(tokens, [num_top] * len(tokens), *(t.tolist() for t in found))


def add_biases(logits_SV: Tensor, requests: list[Request]) -> None:
    """Add logit_bias in place, and forbid the stop ids of requests that have not reached min_tokens."""
    rows: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for s, request in enumerate(requests):
        bias = dict(request.params.logit_bias)
        if _below_min_tokens(request):
            bias |= dict.fromkeys(request.stop_ids, -torch.inf)
        rows += [s] * len(bias)
        ids += bias.keys()
        values += bias.values()
    if rows:
        device = logits_SV.device
        where = (upload(rows, torch.int64, device), upload(ids, torch.int64, device))
        logits_SV[where] += upload(values, torch.float32, device)  # no pair occurs twice


def _has_bias(request: Request) -> bool:
    return bool(request.params.logit_bias) or (_below_min_tokens(request) and bool(request.stop_ids))


def _below_min_tokens(request: Request) -> bool:
    return request.sample_index < request.params.min_tokens
