# SPDX-License-Identifier: Apache-2.0
"""From the logits of a step to its tokens: per-request options as per-row tensors, then the ops."""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_fast import ops
from nemotron_fast.request import Request, TokenLogprob

NAN_TOKEN = -1  # what ops.sample gives for a row of logits with a NaN


def sample_tokens(logits_SV: Tensor, requests: list[Request]) -> tuple[list[int], list[TokenLogprob | None]]:
    """The next token of each request, and its log-probability where asked for. `logits_SV` may be changed.

    A request's pending forced token takes the place of the sampled one.
    """
    raw_SV = logits_SV
    if any(r.params.logprobs is not None for r in requests):
        raw_SV = logits_SV.clone()
    _apply_biases(logits_SV, requests)
    _apply_penalties(logits_SV, requests)
    tokens = _sample(logits_SV, requests).tolist()
    for s, request in enumerate(requests):
        if request.forced and tokens[s] != NAN_TOKEN:
            tokens[s] = request.forced.popleft()
    if NAN_TOKEN in tokens:
        return tokens, [None] * len(tokens)
    return tokens, token_logprobs(raw_SV, tokens, [r.params.logprobs for r in requests])


def token_logprobs(logits_SV: Tensor, tokens: list[int], num_tops: list[int | None]) -> list[TokenLogprob | None]:
    """Per row, the token's log-probability with that many alternatives; None where the number is None."""
    rows = [s for s, top in enumerate(num_tops) if top is not None]
    found: list[TokenLogprob | None] = [None] * len(tokens)
    if not rows:
        return found
    device = logits_SV.device
    picked = torch.tensor([tokens[s] for s in rows], device=device)
    num_top = min(max(num_tops[s] for s in rows), logits_SV.shape[1])
    chosen, rank, values, ids = (
        t.tolist() for t in ops.top_logprobs(logits_SV[torch.tensor(rows, device=device)], picked, num_top)
    )
    for i, s in enumerate(rows):
        top = tuple(zip(ids[i], values[i], strict=True))[: num_tops[s]]
        found[s] = TokenLogprob(tokens[s], chosen[i], rank[i], top)
    return found


def _sample(logits_SV: Tensor, requests: list[Request]) -> Tensor:
    device = logits_SV.device
    params = [r.params for r in requests]

    def column(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return ops.sample(
        logits_SV,
        column([p.temperature for p in params], torch.float32),
        column([max(p.top_k, 0) for p in params], torch.int32),
        column([p.top_p for p in params], torch.float32),
        column([p.min_p for p in params], torch.float32),
        column([r.seed for r in requests], torch.int64),
        column([len(r.output) for r in requests], torch.int64),
    )


def _apply_biases(logits_SV: Tensor, requests: list[Request]) -> None:
    """Add logit_bias, and forbid the stop ids of requests that have not reached min_tokens."""
    rows: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for s, request in enumerate(requests):
        bias = dict(request.params.logit_bias)
        if len(request.output) < request.params.min_tokens:
            bias |= dict.fromkeys(request.stop_ids, -torch.inf)
        rows += [s] * len(bias)
        ids += bias.keys()
        values += bias.values()
    if rows:
        device = logits_SV.device
        where = (torch.tensor(rows, device=device), torch.tensor(ids, device=device))
        logits_SV.index_put_(where, torch.tensor(values, device=device), accumulate=True)


def _apply_penalties(logits_SV: Tensor, requests: list[Request]) -> None:
    rows = [s for s, r in enumerate(requests) if r.params.has_penalties]
    if not rows:
        return
    device, vocab = logits_SV.device, logits_SV.shape[1]
    counts = torch.zeros(len(rows), vocab, dtype=torch.int32)
    in_prompt = torch.zeros(len(rows), vocab, dtype=torch.bool)
    for i, s in enumerate(rows):
        output = torch.tensor(requests[s].output, dtype=torch.int64)
        counts[i] = torch.bincount(output, minlength=vocab).int()
        in_prompt[i, torch.tensor(requests[s].prompt)] = True
    params = [requests[s].params for s in rows]
    where = torch.tensor(rows, device=device)
    picked = logits_SV[where]
    ops.penalize(
        picked,
        counts.to(device),
        in_prompt.to(device),
        torch.tensor([p.presence_penalty for p in params], dtype=torch.float32, device=device),
        torch.tensor([p.frequency_penalty for p in params], dtype=torch.float32, device=device),
        torch.tensor([p.repetition_penalty for p in params], dtype=torch.float32, device=device),
    )
    logits_SV[where] = picked
