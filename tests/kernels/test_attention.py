# SPDX-License-Identifier: Apache-2.0
"""attention over paged KV against a loop over queries and heads in FP64."""

import pytest
import torch

from nemotron_fast import ops, reference_attention
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


def round_e4m3(x):
    """Of x as FP32: the nearest multiple of a sixteenth of the power of two above |x|, or of 2^-9; ties to even."""
    x = x.float().double()
    step = torch.ldexp(torch.ones_like(x), (torch.frexp(x).exponent - 4).clamp(min=-9))
    return ((x / step).round() * step).clamp(-448, 448)


def dense_fp8_attention(q_HD, k_KSD, v_KSD, score_scale, v_scale):
    """The same with operands of e4m3; keys and values are those of the cache, without their scales."""
    group = q_HD.shape[0] // k_KSD.shape[0]
    rows = []
    for h, q_D in enumerate(q_HD):
        q_scale = (q_D.abs().max() / 448).float().double().clamp(min=1e-12)
        scores = k_KSD[h // group] @ round_e4m3(q_D / q_scale) * q_scale * score_scale
        weights = torch.exp(scores - scores.max())
        rows.append(round_e4m3(256 * weights) @ v_KSD[h // group] * v_scale / (256 * weights.sum()))
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
    scales = {"softmax_scale": scale, "k_scale": k_scale, "v_scale": v_scale}
    assert torch.equal(ops.attention(q_THD, *caches, table, q_start, kv_len, per_query=True, **scales), out_THD)
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


@pytest.mark.parametrize("fp8_products", [False, True])
def test_attention_rotates_queries_of_prompts(fp8_products):
    """As rope_append does; sequences of at most 8 queries have rotated ones."""
    H, K, D = 4, 2, 128
    shape, q_start = [(8, 20), (9, 9), (1, 5), (30, 64)], torch.tensor([0, 8, 17, 18, 48])
    cache_dtype = FP8 if fp8_products else torch.float32
    caches = [torch.randn(4, K, PAGE, D).to(cache_dtype) for _ in "kv"]
    table, kv_len = torch.arange(4)[:, None], torch.tensor([length for _, length in shape])
    angles = torch.rand(64, D // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.cat([torch.arange(length - new, length) for new, length in shape])
    qkv = torch.randn(48, (H + 2 * K) * D)
    q, want_qkv = qkv.view(48, -1, D)[:, :H].clone(), qkv.clone()
    ops.rope_append(want_qkv, *(torch.zeros(1, K, PAGE, D) for _ in "kv"), cos_sin, positions, torch.arange(48))
    rotated = want_qkv.view(48, -1, D)[:, :H]
    rotated[:8], rotated[17] = q[:8], q[17]
    options = {"softmax_scale": D**-0.5, "fp8_products": fp8_products}
    found = ops.attention(q, *caches, table, q_start, kv_len, cos_sin=cos_sin, **options)
    assert torch.equal(found, ops.attention(rotated, *caches, table, q_start, kv_len, **options))
    with pytest.raises(RuntimeError, match="cos_sin is for many queries, want no per_query"):
        ops.attention(q, *caches, table, q_start, kv_len, cos_sin=cos_sin, softmax_scale=1.0, per_query=True)


@pytest.mark.parametrize("dtype,rtol,atol", [(torch.float64, 1e-6, 1e-7), (torch.bfloat16, 2**-7, 2**-6)])
@pytest.mark.parametrize("H,K", [(4, 4), (9, 3), (8, 1)])
def test_fp8_products(H, K, dtype, rtol, atol, monkeypatch):
    """Of sequences with more than 8 queries: a whole prompt, its last chunk, the fewest queries; the others as always.

    In FP64 both sides round the same numbers; in BF16 the reference has FP32 scores, which may round otherwise where
    they lie at a border. Queries are computed a few at a time.
    """
    monkeypatch.setattr(reference_attention, "CHUNK_ELEMENTS", 9 * H * 130)
    shape = [(70, 70), (8, 100), (30, 200), (1, 64), (9, 130)]
    q_start = torch.tensor([0, 70, 78, 108, 109, 118])
    table = torch.randperm(20).view(5, 4)
    caches = [torch.randn(20, K, PAGE, 128).mul(2).to(FP8) for _ in "kv"]
    q_THD = torch.randn(118, H, 128, dtype=dtype) * 2
    q_THD[3] = 0  # all weights are equal
    kv_len = torch.tensor([n for _, n in shape])
    scales = {"softmax_scale": 128**-0.5, "k_scale": 0.5, "v_scale": 0.25}
    args = (q_THD, *caches, table, q_start, kv_len)
    out = poison(*q_THD.shape, dtype=dtype, device="cpu")
    ops.attention(*args, **scales, fp8_products=True, out=out)
    plain = ops.attention(*args, **scales)
    for s, (new, length) in enumerate(shape):
        rows = slice(q_start[s], q_start[s + 1])
        if new <= 8:
            assert torch.equal(out[rows], plain[rows])
            continue
        k_KSD, v_KSD = (c.double()[table[s]].transpose(0, 1).flatten(1, 2)[:, :length] for c in caches)
        for i, (q_HD, out_HD) in enumerate(zip(q_THD[rows].double(), out[rows], strict=True)):
            seen = length - new + i + 1
            want = dense_fp8_attention(q_HD, k_KSD[:, :seen], v_KSD[:, :seen], 0.5 * 128**-0.5, 0.25)
            assert_close(out_HD, want, rtol=rtol, atol=atol)
    error, size = ((t[:70] - p[:70]).double().norm() for t, p in ((out, plain), (plain, 0 * plain)))
    assert 2**-6 < error / size < 2**-3  # what the roundings are for
    out_scale = torch.tensor([0.01])
    quantised = ops.attention(*args, **scales, fp8_products=True, out_scale=out_scale)
    assert torch.equal(quantised.float(), ops.quantize_fp8(out, out_scale).float())


@pytest.mark.parametrize(
    "D,dtype,message",
    [
        (128, torch.bfloat16, "k_cache: dtype is bfloat16, want float8_e4m3fn for fp8_products; call without them, or"),
        (64, FP8, "k_cache: head size is 64, want 128 for fp8_products; call without them"),
    ],
)
def test_fp8_products_rejects(D, dtype, message):
    """In whatever step."""
    cache, table = torch.zeros(1, 1, PAGE, D).to(dtype), torch.zeros(1, 1, dtype=torch.int64)
    for new in (1, 20):
        q, q_start = torch.zeros(new, 4, D).bfloat16(), torch.tensor([0, new])
        with pytest.raises(RuntimeError, match=message):
            ops.attention(q, cache, cache, table, q_start, q_start[1:], softmax_scale=1.0, fp8_products=True)


def test_fp8_products_of_lone_queries_are_refused():
    cache, table = torch.zeros(1, 1, PAGE, 128).to(FP8), torch.zeros(1, 1, dtype=torch.int64)
    q, q_start = torch.zeros(20, 4, 128).bfloat16(), torch.tensor([0, 20])
    args = {"softmax_scale": 1.0, "fp8_products": True, "per_query": True}
    with pytest.raises(RuntimeError, match="fp8_products are of many queries, want no per_query"):
        ops.attention(q, cache, cache, table, q_start, q_start[1:], **args)


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
