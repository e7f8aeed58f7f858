# SPDX-License-Identifier: Apache-2.0
"""embed, silu_mul and rope_append against formulas written here in FP64."""

import pytest
import torch

from nemotron_fast import ops
from nemotron_fast.testing.compare import assert_bit_equal, assert_close, poison

FP8 = torch.float8_e4m3fn
PAGE = 64


def test_embed_takes_rows_and_zeros_foreign_ids():
    weight_VE = torch.randn(10, 16, dtype=torch.bfloat16)
    out_TE = poison(4, 16, dtype=torch.bfloat16, device="cpu")
    ops.embed(torch.tensor([3, -1, 9, 10]), weight_VE, out=out_TE)
    zero = torch.zeros(16, dtype=torch.bfloat16)
    assert_bit_equal(out_TE, torch.stack([weight_VE[3], zero, weight_VE[9], zero]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,F", [(0, 16), (1, 352), (5, 2816)])
def test_silu_mul(T, F, dtype):
    x_TX = 4 * torch.randn(T, 2 * F, dtype=dtype)
    out_TF = ops.silu_mul(x_TX, out=poison(T, F, dtype=dtype, device="cpu"))
    gate, up = x_TX.double()[:, :F], x_TX.double()[:, F:]
    assert_close(out_TF, gate / (1 + (-gate).exp()) * up, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("num_rotated", [6, 2, 0])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("H,K,D", [(4, 1, 64), (3, 3, 80), (8, 2, 128)])
def test_rope_append(H, K, D, cache_dtype, num_rotated):
    T, num_pages = 8, 5
    qkv_TX = torch.randn(T, (H + 2 * K) * D)
    angles = torch.rand(200, D // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.tensor([0, 1, 63, 64, 199, 7, 8, 9])
    slots = torch.tensor([0, 65, 319, 100, 101, 255, -1, num_pages * PAGE])  # the last two are outside
    caches = [torch.full((num_pages, K, PAGE, D), -9.0).to(cache_dtype) for _ in "kv"]
    before = qkv_TX.double().view(T, -1, D)
    ops.rope_append(qkv_TX, *caches, cos_sin, positions, slots, k_scale=0.5, v_scale=2.0, num_rotated=num_rotated)

    # half-split rotation as complex multiplication of (x_i, x_{i + D/2}) by e^{i angle}
    half = D // 2
    turn = torch.polar(torch.ones_like(angles.double()), angles.double())[positions][:, None]
    rotated = torch.complex(before[..., :half].contiguous(), before[..., half:].contiguous()) * turn
    want = torch.cat((rotated.real, rotated.imag), -1)
    want[:, H + K :] = before[:, H + K :]
    found = qkv_TX.view(T, -1, D)
    assert_close(found[:num_rotated, :H], want[:num_rotated, :H], rtol=1e-5, atol=1e-5)
    assert_bit_equal(found[:num_rotated, H:].double(), before[:num_rotated, H:])
    assert_bit_equal(found[num_rotated:].double(), before[num_rotated:])

    scales = (0.5, 2.0) if cache_dtype == FP8 else (1.0, 1.0)
    for cache, heads, scale in zip(caches, (want[:, H : H + K], want[:, H + K :]), scales, strict=True):
        stored = cache.float().double().transpose(1, 2).reshape(-1, K, D)  # [slot, K, D]
        eps = 2.0**-4 if cache_dtype == FP8 else torch.finfo(cache_dtype).eps
        assert_close(stored[slots[:6]] * scale, heads[:6], rtol=eps, atol=2e-3 if cache_dtype == FP8 else 1e-5)
        untouched = torch.ones(len(stored), dtype=torch.bool)
        untouched[slots[:6]] = False
        assert (stored[untouched] == -9.0).all()


@pytest.mark.parametrize("num_rotated", [-1, 3])
def test_rope_append_rejects_more_rotated_tokens_than_there_are(num_rotated):
    caches = [torch.zeros(1, 1, PAGE, 64) for _ in "kv"]
    args = (torch.ones(4, 64), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    with pytest.raises(RuntimeError, match=f"num_rotated: is {num_rotated}, want 0..2"):
        ops.rope_append(torch.zeros(2, 4 * 64), *caches, *args, num_rotated=num_rotated)
