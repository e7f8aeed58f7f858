# SPDX-License-Identifier: Apache-2.0
"""The sampling ops in plain torch, as reference.py has the others."""

from __future__ import annotations

import torch
from torch import Tensor


def penalize(
    logits_SV: Tensor,
    counts_SV: Tensor,
    in_prompt_SV: Tensor,
    presence_S: Tensor,
    frequency_S: Tensor,
    repetition_S: Tensor,
) -> None:
    """Apply the three penalties in place, in the order repetition, frequency, presence.

    Repetition divides a positive logit (and multiplies a negative one) of every token seen in prompt or output;
    frequency subtracts per occurrence in the output, presence once for any.
    """
    seen = (counts_SV > 0) | in_prompt_SV
    factor = torch.where(seen, repetition_S[:, None], 1.0)
    logits_SV.copy_(torch.where(logits_SV > 0, logits_SV / factor, logits_SV * factor))
    logits_SV -= frequency_S[:, None] * counts_SV
    logits_SV -= presence_S[:, None] * (counts_SV > 0)


def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    seed_S: Tensor,
    step_S: Tensor,
) -> Tensor:
    """One token per row, [S] int64; -1 for a row with a NaN. Temperature 0 takes the largest logit (the lowest
    id among equals).

    Otherwise logits are divided by the temperature and kept where they reach three thresholds: the top_k-th
    largest (0 = off); the smallest of the fewest tokens whose probabilities, renormalised over those kept so
    far, sum to top_p; and min_p times the largest probability. Equal logits are kept or dropped together. The
    choice is argmax(p / e) with exponential noise e that depends on (seed, step, token id) alone, so it does
    not depend on the batch or on the order of reduction (the exponential-race form of the Gumbel-max trick).
    """
    largest_S1 = logits_SV.amax(-1, keepdim=True)  # NaN if the row has one
    greedy_S = torch.where(largest_S1[:, 0].isnan(), -1, logits_SV.argmax(-1))
    if not bool(temperature_S.any()):
        return greedy_S
    # relative to the largest, so that a tiny temperature cannot overflow
    scaled_SV = (logits_SV - largest_S1) / torch.where(temperature_S > 0, temperature_S, 1.0)[:, None]
    ordered_SV = scaled_SV.sort(-1, descending=True).values
    size = logits_SV.shape[1]
    last_S = torch.where(top_k_S > 0, top_k_S.clamp(max=size), size).long() - 1
    threshold_S = ordered_SV.gather(1, last_S[:, None])
    p_SV = torch.where(ordered_SV >= threshold_S, ordered_SV, -torch.inf).softmax(-1)
    before_SV = p_SV.cumsum(-1) - p_SV  # probability of all tokens ahead of this one
    num_kept_S = ((before_SV < top_p_S[:, None]) & (p_SV > 0)).sum(-1).clamp(min=1)
    threshold_S = torch.maximum(threshold_S, ordered_SV.gather(1, num_kept_S[:, None] - 1))
    threshold_S = torch.maximum(threshold_S, ordered_SV[:, :1] + min_p_S[:, None].log())
    kept_SV = torch.where(scaled_SV >= threshold_S, scaled_SV, -torch.inf)
    noise_SV = _exponential_noise(seed_S, step_S, size)
    drawn_S = (kept_SV - noise_SV.log()).argmax(-1)
    return torch.where((temperature_S > 0) & (greedy_S >= 0), drawn_S, greedy_S)


def top_logprobs(logits_SV: Tensor, tokens_S: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of log_softmax(logits): the tokens' values and ranks (1 = largest) [S], the largest values and ids [S, N]."""
    logprobs_SV = logits_SV.log_softmax(-1)
    chosen_S = logprobs_SV.gather(1, tokens_S[:, None])
    rank_S = 1 + (logprobs_SV > chosen_S).sum(-1)
    values_SN, ids_SN = logprobs_SV.topk(num_top, dim=-1)
    return chosen_S[:, 0], rank_S, values_SN, ids_SN


def _exponential_noise(seed_S: Tensor, step_S: Tensor, size: int) -> Tensor:
    """Exponential(1) noise [S, size] from a counter-based hash (the SplitMix64 finaliser, applied in turn to
    the seed, the step and the token id), 24 random bits each."""
    key_S = _mix(_mix(seed_S.long()) + step_S.long())
    bits_SV = _mix(key_S[:, None] + torch.arange(size, device=seed_S.device))
    uniform = (((bits_SV >> 40) & 0xFFFFFF).float() + 0.5) / (1 << 24)
    return -uniform.clamp(max=1 - 2.0**-24).log()  # all bits set round up to 1, which would be no noise at all


def _mix(x: Tensor) -> Tensor:
    """SplitMix64: add the golden-ratio increment, then xor-shift-multiply twice (arithmetic modulo 2^64)."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    return x ^ ((x >> 31) & ((1 << 33) - 1))
