# SPDX-License-Identifier: Apache-2.0
"""How many tokens a step may have."""

from __future__ import annotations

from nemotron_fast.errors import Problems, RequestError

GPU_TOKENS, CPU_TOKENS = 2048, 512
# Up to so many no linear's result depends on the others. On a GPU: kMaxFewTokens of csrc/host/linear_schedule.h. On a
# CPU libraries choose by the number of rows.
GPU_DETERMINISTIC_TOKENS, CPU_DETERMINISTIC_TOKENS = 64, 1


def step_tokens(wanted: int | None, *, on_gpu: bool, deterministic: bool) -> int:
    """`wanted`, or else what suits."""
    if wanted is not None:
        return wanted
    if deterministic:
        return deterministic_tokens(on_gpu)
    return GPU_TOKENS if on_gpu else CPU_TOKENS


def deterministic_tokens(on_gpu: bool) -> int:
    return GPU_DETERMINISTIC_TOKENS if on_gpu else CPU_DETERMINISTIC_TOKENS


def check_deterministic(max_batched_tokens: int, max_num_seqs: int, *, on_gpu: bool, fp8_attention: bool) -> None:
    """What LLM(deterministic=True) wants. On a CPU sequences take turns, so that they may be many.

    Raises:
        RequestError: something else.
    """
    problems = Problems()
    most = deterministic_tokens(on_gpu)
    limited = {"max_batched_tokens": max_batched_tokens} | ({"max_num_seqs": max_num_seqs} if on_gpu else {})
    for name, value in limited.items():
        problems.require(value <= most, f"{name}={value}, want at most {most}; lower it or leave it out")
    problems.require(not fp8_attention, "fp8_attention=True computes many queries together; leave it out")
    problems.raise_if_any(RequestError, "deterministic=True")
