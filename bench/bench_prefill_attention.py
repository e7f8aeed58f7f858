# SPDX-License-Identifier: Apache-2.0
"""attention of prompts, and of chunks of prompts, against SDPA on contiguous BF16 keys and values.

python bench/bench_prefill_attention.py [--device cuda|cpu] [--only fp8|fp8-products]
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from bench_attention import Paged, make_paged, our_attention
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from nemotron_fast.testing import cases, runner


def sdpa(s: Paged, backend: SDPBackend) -> Tensor:
    q = s.q.view(s.table.shape[0], -1, *s.q.shape[1:]).transpose(1, 2)
    k, v = s.dense
    if q.shape[2] == k.shape[2]:
        mask = {"is_causal": True}
    else:  # FlashAttention only: cuDNN's causal mask begins at the first key
        mask = {"attn_mask": causal_lower_right(q.shape[2], k.shape[2])}
    with sdpa_kernel(backend):
        out = functional.scaled_dot_product_attention(q, k, v, **mask, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def rows_near(s: Paged, call: runner.Call, want: runner.Call) -> None:
    """Of products of e4m3. q and weights change by at most 2^-4 each, 2.6 % typically, which sums over keys average:
    errors are 3.6 % of a row's length, 9 % at most (the reference on 131,072 rows of these inputs)."""
    want_THD = want(s).float()
    error_TH = (call(s).float() - want_THD).norm(dim=-1) / want_THD.norm(dim=-1)
    mean, worst = error_TH.mean().item(), error_TH.max().item()
    if not (mean <= 3 * 2**-6 and worst <= 3 * 2**-4):
        raise AssertionError(
            f"relative errors of rows: mean {mean:.3g}, want <= 0.047, worst {worst:.3g}, want <= 0.19"
        )


def rows(device: torch.device, quick: bool) -> Iterator[runner.Row]:
    flash = partial(sdpa, backend=SDPBackend.FLASH_ATTENTION if device.type == "cuda" else SDPBackend.MATH)
    cudnn = partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION)
    near = runner.equals(flash, rtol=2**-6, atol=2**-6)  # both round the softmax weights to BF16
    near_in_rows = partial(rows_near, want=flash)
    for case in cases.PREFILL_BENCH_CPU if quick else cases.PREFILL_BENCH:
        ours = partial(our_attention, fp8_products=case.fp8_products)
        check = near_in_rows if case.fp8_products else near
        peers = {"sdpa flash": flash}
        if device.type == "cuda" and case.new == case.length:
            peers = {"sdpa cudnn": cudnn} | peers
        yield runner.Row(case, partial(make_paged, case, device), ours, peers, check)


if __name__ == "__main__":
    runner.main("prefill_attention", __doc__, rows)
