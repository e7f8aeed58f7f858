# SPDX-License-Identifier: Apache-2.0
"""What LLM(deterministic=True) promises, for any model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nemotron_fast import LLM, SamplingParams


def assert_same_bits_in_any_company(
    options: dict[str, Any],
    prompt: str,
    others: list[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    most_tokens: int = 200,
) -> None:
    """Alone, in a crowd, in small chunks, behind a cached beginning, or one that another request of the same step
    computes, preempted (on a GPU): of the prompt, too.

    `options` are of an LLM without limits of its steps; the prompt has between 65 and 300 tokens, and at most
    `most_tokens` are generated.
    """
    options = options | {"deterministic": True, "max_model_len": 512}
    on_gpu = options["device"] == "cuda"
    params = SamplingParams(
        max_tokens=min(most_tokens, 70), temperature=0.8, seed=3, logprobs=0, prompt_logprobs=0, ignore_eos=True
    )
    plain = options | {"prefix_caching": False}

    def bits(result):
        return [e.logprob for e in (*(result.prompt_logprobs or [])[1:], *result.outputs[0].logprobs)]

    with LLM(**plain) as llm:
        want, crowd = (llm.generate([prompt, *company], params)[0] for company in ([], others))
    assert 65 <= len(want.prompt_token_ids) <= 300
    with LLM(**plain, max_batched_tokens=7 if on_gpu else 1, max_num_seqs=2) as llm:
        assert bits(llm.generate(prompt, params)[0]) == bits(crowd) == bits(want)
    several = [  # which may end early: what surely needs more pages than there are would not start
        dataclasses.replace(params, seed=i, prompt_logprobs=None, max_tokens=most_tokens, ignore_eos=False)
        for i in range(6 if on_gpu else 2)
    ]
    with LLM(**options) as llm:
        alone, cached = ([llm.generate(prompt, p)[0] for p in several] for _ in range(2))
        assert llm.metrics().prefix_hit_rate > 0
    with LLM(**options) as llm:
        together = llm.generate([prompt] * len(several), several)
        assert llm.metrics().prefix_hit_rate > 0
    monkeypatch.setattr("nemotron_fast.llm.size_cache", lambda *_: (512, 12))  # pages too few for all
    with LLM(**plain) as llm:
        preempted = llm.generate([prompt] * len(several), several)
        assert llm.metrics().preemptions > 0 or not on_gpu
    for results in zip(alone, cached, together, preempted, strict=True):
        assert len({tuple(bits(r)) for r in results}) == 1
