# SPDX-License-Identifier: Apache-2.0
"""linear and the FP8 quantisation ops against plain FP64 formulas."""

import pytest
import torch

from nemotron_fast import ops
from nemotron_fast.testing.compare import assert_close, poison

FP8 = torch.float8_e4m3fn
SHAPES = [(0, 64, 64), (1, 48, 80), (7, 576, 1536), (33, 128, 16)]  # T, N, K


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T,N,K", SHAPES)
def test_linear(T, N, K, dtype):
    x_TK, w_NK = torch.randn(T, K, dtype=dtype), torch.randn(N, K, dtype=dtype) / K**0.5
    out_TN = poison(T, N, dtype=dtype, device="cpu")
    ops.linear(x_TK, w_NK, out=out_TN)
    # one rounding of the result, and an FP32 sum of K products
    assert_close(out_TN, x_TK.double() @ w_NK.double().T, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_linear_fp8(per_token, per_channel):
    T, N, K = 5, 96, 352
    x_TK, w_NK = (10 * torch.randn(T, K)).to(FP8), (10 * torch.randn(N, K)).to(FP8)
    x_scale = torch.rand(T if per_token else 1) + 0.1
    w_scale = torch.rand(N if per_channel else 1) + 0.1
    out_TN = ops.linear(x_TK, w_NK, x_scale=x_scale, weight_scale=w_scale, out_dtype=torch.float32)
    want_TN = (x_TK.double() * x_scale.double()[:, None]) @ (w_NK.double() * w_scale.double()[:, None]).T
    assert_close(out_TN, want_TN, rtol=1e-5, atol=1e-2)


def test_quantize_fp8_rounds_to_nearest_and_saturates():
    scale = torch.tensor([0.5])
    x_TX = torch.tensor([[0.0, 0.5, -1.0, 1e6, -1e6, 8.4 * 0.5]])
    got = ops.quantize_fp8(x_TX, scale).float()
    assert got.tolist() == [[0.0, 1.0, -2.0, 448.0, -448.0, 8.0]]  # e4m3 steps are 1 between 8 and 16


@pytest.mark.parametrize("T,X", [(0, 16), (1, 16), (9, 352)])
def test_quantize_fp8_per_token(T, X):
    x_TX = torch.randn(T, X, dtype=torch.bfloat16) * 100
    q_TX, scale_T = ops.quantize_fp8_per_token(
        x_TX, out=torch.full((T, X), float("nan")).to(FP8), scale=poison(T, dtype=torch.float32, device="cpu")
    )
    assert_close(scale_T, x_TX.double().abs().amax(-1) / 448 if T else torch.zeros(0), rtol=1e-6)
    step = 2.0**-4 * x_TX.double().abs() + 2.0**-10 * scale_T.double()[:, None]  # half an e4m3 step, and subnormals
    assert ((q_TX.double() * scale_T.double()[:, None] - x_TX.double()).abs() <= step).all()


def test_quantize_fp8_per_token_of_a_zero_row_is_zero():
    q_TX, scale_T = ops.quantize_fp8_per_token(torch.zeros(2, 32))
    assert (q_TX.float() == 0).all() and (scale_T > 0).all() and scale_T.isfinite().all()
