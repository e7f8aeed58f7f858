# SPDX-License-Identifier: Apache-2.0
"""How many tokens a step may have."""

from __future__ import annotations

from nemotron_fast.errors import Problems, RequestError

GPU_TOKENS, CPU_TOKENS = 2048, 512
# Up to so many on a GPU, no linear's result depends on the others: kMaxFewTokens of csrc/host/linear_schedule.h.
DETERMINISTIC_TOKENS = 64


def step_tokens(wanted: int | None, *, on_gpu: bool, deterministic: bool) -> int:
    """`wanted`, or else what suits."""
    if wanted is not None:
        return wanted
    if not on_gpu:
        return CPU_TOKENS
    return DETERMINISTIC_TOKENS if deterministic else GPU_TOKENS


def check_deterministic(max_batched_tokens: int, max_num_seqs: int, *, fp8_attention: bool) -> None:
    """What LLM(deterministic=True) wants on a GPU.

    Raises:
        RequestError: something else.
    """
    problems = Problems()
    for name, value in {"max_batched_tokens": max_batched_tokens, "max_num_seqs": max_num_seqs}.items():
        wanted = f"want at most {DETERMINISTIC_TOKENS}; lower it or leave it out"
        problems.require(value <= DETERMINISTIC_TOKENS, f"{name}={value}, {wanted}")
    problems.require(not fp8_attention, "fp8_attention=True computes many queries together; leave it out")
    problems.raise_if_any(RequestError, "deterministic=True")
