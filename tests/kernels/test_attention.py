# SPDX-License-Identifier: Apache-2.0
"""attention over paged KV against a loop over queries and heads in FP64."""

import pytest
import torch

from nemotron_fast import ops
from nemotron_fast.testing.compare import assert_close, poison

FP8 = torch.float8_e4m3fn
PAGE = 64


def dense_attention(q_HD, k_KSD, v_KSD, scale):
    """One query against all given keys, each head on its own."""
    group = q_HD.shape[0] // k_KSD.shape[0]
    rows = []
    for h, q_D in enumerate(q_HD):
        weights = torch.softmax(k_KSD[h // group] @ q_D * scale, dim=0)
        rows.append(weights @ v_KSD[h // group])
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("H,K,D", [(4, 4, 64), (9, 3, 64), (8, 1, 128), (16, 1, 80)])
def test_attention(H, K, D, dtype):
    """Mixed batch: a decode step, a whole prompt, a chunk after a cached prefix, a single first token."""
    shape = [(1, 130), (65, 65), (7, 200), (1, 1)]  # new tokens, all tokens
    num_pages = 16
    order = torch.randperm(num_pages)
    caches = [1e4 * torch.randn(num_pages, K, PAGE, D) for _ in "kv"]  # garbage beyond the valid tokens
    table = torch.zeros(len(shape), 4, dtype=torch.int64)
    k_scale, v_scale = (0.25, 0.5) if dtype == FP8 else (1.0, 1.0)
    wide, used = [], 0
    for s, (_, length) in enumerate(shape):
        pages = order[used : used + -(-length // PAGE)]
        used += len(pages)
        table[s, : len(pages)] = pages
        wide.append([])
        for cache in caches:
            new_KSD = torch.randn(K, length, D)
            for p in range(length):
                cache[pages[p // PAGE], :, p % PAGE] = new_KSD[:, p]
    caches = [c.clamp(-448, 448).to(dtype) for c in caches]
    q_start = torch.tensor([0, *torch.tensor([n for n, _ in shape]).cumsum(0).tolist()])
    q_dtype = torch.float32 if dtype == FP8 else dtype
    q_THD = torch.randn(int(q_start[-1]), H, D, dtype=q_dtype)
    kv_len = torch.tensor([n for _, n in shape])
    scale = D**-0.5
    out_THD = poison(*q_THD.shape, dtype=q_dtype, device="cpu")
    ops.attention(
        q_THD, *caches, table, q_start, kv_len, softmax_scale=scale, k_scale=k_scale, v_scale=v_scale, out=out_THD
    )
    for s, (new, length) in enumerate(shape):
        pages = table[s, : -(-length // PAGE)]
        k_KSD, v_KSD = (c.double()[pages].transpose(0, 1).flatten(1, 2) for c in caches)
        for i in range(new):
            seen = length - new + i + 1
            t = int(q_start[s]) + i
            want = dense_attention(q_THD[t].double(), k_KSD[:, :seen] * k_scale, v_KSD[:, :seen] * v_scale, scale)
            assert_close(out_THD[t], want, rtol=4 * torch.finfo(q_dtype).eps, atol=8 * torch.finfo(q_dtype).eps)


def test_attention_takes_queries_as_a_strided_view():
    H, K, D = 4, 2, 64
    qkv = torch.randn(3, (H + 2 * K) * D)
    caches = [torch.randn(1, K, PAGE, D) for _ in "kv"]
    view = qkv.view(3, -1, D)[:, :H]
    args = (*caches, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0, 3]), torch.tensor([10]))
    got, want = (ops.attention(q, *args, softmax_scale=0.125) for q in (view, view.contiguous()))
    assert torch.equal(got, want)
    out_scale = torch.tensor([0.01])
    quantised = ops.attention(view, *args, softmax_scale=0.125, out_scale=out_scale)
    assert torch.equal(quantised.float(), ops.quantize_fp8(want, out_scale).float())


@pytest.mark.parametrize("dtype", [torch.float32, FP8])
def test_decode_attention(dtype):
    """As rope_append, attention and quantize_fp8; two new tokens on two pages, one, and none."""
    H, K, D = 4, 2, 64
    table = torch.tensor([[3, 0], [1, 1], [2, 2]])
    q_start, kv_len = torch.tensor([0, 2, 3, 3]), torch.tensor([65, 7, 5])
    qkv = torch.randn(3, (H + 2 * K) * D)
    angles = torch.rand(70, D // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    caches = [torch.randn(4, K, PAGE, D).to(dtype) for _ in "kv"]
    scales = {"k_scale": 0.5, "v_scale": 0.25} if dtype == FP8 else {}
    want_qkv, want_caches = qkv.clone(), [c.clone() for c in caches]
    positions, slots = torch.tensor([63, 64, 6]), torch.tensor([3 * PAGE + 63, 0, PAGE + 6])
    ops.rope_append(want_qkv, *want_caches, cos_sin, positions, slots, **scales)
    rest = {"softmax_scale": D**-0.5, **scales}
    want = ops.attention(want_qkv.view(3, -1, D)[:, :H], *want_caches, table, q_start, kv_len, **rest)
    unchanged = qkv.clone()
    got = ops.decode_attention(qkv, *caches, cos_sin, table, q_start, kv_len, **rest)
    assert torch.equal(got, want) and torch.equal(qkv, unchanged)
    for found, expected in zip(caches, want_caches, strict=True):
        assert torch.equal(found.float(), expected.float())
    out_scale = torch.tensor([0.01])
    got = ops.decode_attention(qkv, *caches, cos_sin, table, q_start, kv_len, out_scale=out_scale, **rest)
    assert torch.equal(got.float(), ops.quantize_fp8(want, out_scale).float())
    padded = torch.cat((qkv, torch.full_like(qkv, float("nan"))))
    got = ops.decode_attention(padded, *caches, cos_sin, table, q_start, kv_len, **rest)
    assert torch.equal(got[:3], want) and not got[3:].any()
