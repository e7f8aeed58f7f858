# SPDX-License-Identifier: Apache-2.0
"""attention of prompts, and of chunks of prompts, against SDPA on contiguous BF16 keys and values.

python bench/bench_prefill_attention.py [--device cuda|cpu] [--only fp8]
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


def rows(device: torch.device, quick: bool) -> Iterator[runner.Row]:
    flash = partial(sdpa, backend=SDPBackend.FLASH_ATTENTION if device.type == "cuda" else SDPBackend.MATH)
    cudnn = partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION)
    near = runner.equals(flash, rtol=2**-6, atol=2**-6)  # both round the softmax weights to BF16
    for case in cases.PREFILL_BENCH_CPU if quick else cases.PREFILL_BENCH:
        peers = {"sdpa flash": flash}
        if device.type == "cuda" and case.new == case.length:
            peers = {"sdpa cudnn": cudnn} | peers
        yield runner.Row(case, partial(make_paged, case, device), our_attention, peers, near)


if __name__ == "__main__":
    runner.main("prefill_attention", __doc__, rows)
