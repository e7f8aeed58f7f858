# SPDX-License-Identifier: Apache-2.0
"""How many tokens a step has, and what LLM(deterministic=True) wants of it."""

import re
from pathlib import Path

import pytest

from nemotron_fast.errors import RequestError
from nemotron_fast.step_size import GPU_DETERMINISTIC_TOKENS, check_deterministic, step_tokens


def test_step_tokens():
    assert step_tokens(7, on_gpu=True, deterministic=True) == 7
    assert step_tokens(None, on_gpu=False, deterministic=False) == 512
    assert step_tokens(None, on_gpu=True, deterministic=False) == 2048
    assert step_tokens(None, on_gpu=True, deterministic=True) == GPU_DETERMINISTIC_TOKENS
    assert step_tokens(None, on_gpu=False, deterministic=True) == 1


def test_the_linears_of_such_steps_are_those_of_few_tokens():
    header = Path(__file__).parents[2] / "csrc/host/linear_schedule.h"
    assert re.search(rf"kMaxFewTokens = {GPU_DETERMINISTIC_TOKENS}\b", header.read_text())


def test_what_deterministic_refuses():
    check_deterministic(64, 64, on_gpu=True, fp8_attention=False)
    check_deterministic(1, 256, on_gpu=False, fp8_attention=False)
    with pytest.raises(
        RequestError, match="deterministic=True: 1 problem: max_batched_tokens=65, want at most 64; lower it"
    ):
        check_deterministic(65, 64, on_gpu=True, fp8_attention=False)
    with pytest.raises(
        RequestError, match="deterministic=True: 1 problem: max_batched_tokens=2, want at most 1; lower it"
    ):
        check_deterministic(2, 64, on_gpu=False, fp8_attention=False)
    message = "deterministic=True: 3 problems: max_batched_tokens=2048.*max_num_seqs=256.*fp8_attention=True"
    with pytest.raises(RequestError, match=message):
        check_deterministic(2048, 256, on_gpu=True, fp8_attention=True)
