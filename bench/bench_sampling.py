# SPDX-License-Identifier: Apache-2.0
"""sample, penalize and top_logprobs on Llama 3's vocabulary against torch: sorting for sample, the reference else.

python bench/bench_sampling.py [--device cuda|cpu] [--only sample]
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from nemotron_fast import ops, reference_sampling
from nemotron_fast.testing import cases, compare, runner

Inputs = list[Tensor]  # the op's arguments, in the wrapper's order
TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.6, 50, 0.95, 0.01


def make(case: cases.SamplingCase, device: torch.device) -> Inputs:
    rows = partial(torch.full, (case.S,), device=device)
    logits = 4 * torch.randn(case.S, case.V, device=device)
    match case.op:
        case "sample":
            seed = torch.randint(1 << 60, (case.S,), device=device)
            return [
                logits,
                rows(TEMPERATURE),
                rows(TOP_K, dtype=torch.int32),
                rows(TOP_P),
                rows(MIN_P),
                seed,
                seed % 999,
            ]
        case "penalize":
            counts = torch.randint(3, logits.shape, dtype=torch.int32, device=device)
            return [logits, counts, counts == 1, rows(0.1), rows(0.1), rows(1.1)]
        case _:
            return [logits, torch.randint(case.V, (case.S,), device=device)]


def sort_sample(s: Inputs) -> Tensor:
    """What a server in torch does: sort, cut by the three thresholds, draw with noise from torch's generator."""
    logits, temperature, _, top_p, min_p, *_ = s
    values, ids = (logits / temperature[:, None]).sort(-1, descending=True)
    values[:, TOP_K:] = -torch.inf
    p = values.softmax(-1)
    dropped = (p.cumsum(-1) - p >= top_p[:, None]) | (p < min_p[:, None] * p[:, :1])
    p = p.masked_fill(dropped, 0.0)
    return ids.gather(1, (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True))[:, 0]


def check_sample(s: Inputs, call: runner.Call) -> None:
    """Token for token; one row in 20 may differ, where a rounding moves a token across a threshold."""
    same = call(s) == reference_sampling.sample(*s)
    assert int((~same).sum()) * 20 <= len(same), f"{int((~same).sum())} of {len(same)} tokens differ"


def check_drawn(s: Inputs, call: runner.Call) -> None:
    """Another generator draws other tokens: all must be among the largest top_k that reach min_p."""
    scaled = s[0] / s[1][:, None]
    found = scaled.gather(1, call(s)[:, None])
    assert bool((found >= scaled.topk(TOP_K, -1).values[:, -1:]).all()), "a token outside of top_k"
    assert bool((found >= scaled.amax(-1, keepdim=True) + s[4][:, None].log() - 1e-4).all()), "a token under min_p"


def check_penalize(s: Inputs, call: runner.Call) -> None:
    found, want = ([s[0].clone(), *s[1:]] for _ in range(2))
    call(found)
    reference_sampling.penalize(*want)
    compare.assert_close(found[0], want[0], rtol=1e-6, atol=1e-6)


def check_logprobs(s: Inputs, call: runner.Call) -> None:
    """The rank of a token of many: where logits tie in log-probability, peers count otherwise."""
    for found, want in zip(call(s), reference_sampling.top_logprobs(*s, cases.SamplingCase.num_top), strict=True):
        compare.assert_close(found, want, rtol=1e-4, atol=1e-5)


def rows(device: torch.device, quick: bool) -> Iterator[runner.Row]:
    num_top = cases.SamplingCase.num_top
    both = partial(runner.eager_and_compiled, device=device)
    of_op = {
        "sample": (lambda s: ops.sample(*s), {"torch sort": sort_sample}, check_sample, check_drawn),
        "penalize": (lambda s: ops.penalize(*s), both(lambda s: reference_sampling.penalize(*s)), check_penalize),
        "top_logprobs": (
            lambda s: ops.top_logprobs(*s, num_top),
            both(lambda s: reference_sampling.top_logprobs(*s, num_top)),
            check_logprobs,
        ),
    }
    for case in cases.SAMPLING_BENCH_CPU if quick else cases.SAMPLING_BENCH:
        yield runner.Row(case, partial(make, case, device), *of_op[case.op])


if __name__ == "__main__":
    runner.main("sampling", __doc__, rows)
