# SPDX-License-Identifier: Apache-2.0
"""Single ops against their formulas in FP64: the part of the doctor's self-test that needs no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class CheckFailed(Exception):
    """A check's own verdict, as opposed to an exception out of what it checks."""


def check_rms_norm(device: str) -> str:
    """In BF16: within one rounding of the norm and one of the product."""
    import torch

    from nemotron_fast import ops

    random = torch.Generator().manual_seed(0)
    x_TE, w_E = (torch.randn(*shape, generator=random).bfloat16() for shape in ((3, 512), (512,)))
    want_TE = x_TE.double() * (x_TE.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w_E.double()
    got_TE = ops.rms_norm(x_TE.to(device), w_E.to(device), 1e-5)
    return _verdict(got_TE, want_TE, want_TE.abs().clamp(min=1e-3), 2**-7)


def check_linear_fp8(device: str) -> str:
    """FP8 operands with a scale per row of each. In units of sum |x||w|: 2^-9 for the BF16 result, and as much for
    FP8 tensor cores, which add up with fewer bits than FP32."""
    import torch

    from nemotron_fast import ops

    random = torch.Generator().manual_seed(0)
    x_TK, w_NK = (torch.randn(*shape, generator=random).to(torch.float8_e4m3fn) for shape in ((5, 256), (128, 256)))
    x_scale_T, w_scale_N = (0.5 + torch.rand(rows, generator=random) for rows in (5, 128))
    x_wide_TK, w_wide_NK = x_TK.double() * x_scale_T[:, None], w_NK.double() * w_scale_N[:, None]
    got_TN = ops.linear(
        x_TK.to(device),
        w_NK.to(device),
        out_dtype=torch.bfloat16,
        x_scale=x_scale_T.to(device),
        weight_scale=w_scale_N.to(device),
    )
    return _verdict(got_TN, x_wide_TK @ w_wide_NK.T, x_wide_TK.abs() @ w_wide_NK.abs().T, 2**-8)


def check_attention(device: str) -> str:
    """Two sequences in scattered pages, one decoding and one in prefill; what no query may see is large noise.

    In units of the largest |v|: 2^-9 each for the probabilities and the result in BF16, doubled for good measure.
    """
    import torch

    from nemotron_fast import ops
    from nemotron_fast.pages import PAGE_SIZE, pages_for

    num_heads, num_kv, dim, num_pages = 16, 2, 128, 8
    new, lengths = (1, 5), (PAGE_SIZE + 6, 2 * PAGE_SIZE + 3)  # queries and tokens of each sequence
    table_SP = torch.tensor([[6, 1, 0], [3, 7, 2]])
    random = torch.Generator().manual_seed(0)
    q_THD = torch.randn(sum(new), num_heads, dim, generator=random).bfloat16()
    kv_SKD = [torch.randn(2, n, num_kv, dim, generator=random).bfloat16() for n in lengths]
    caches = 1000 * torch.randn(2, num_pages, num_kv, PAGE_SIZE, dim, generator=random).bfloat16()
    want_THD, first = torch.empty(q_THD.shape, dtype=torch.float64), 0
    for row, (num_new, length) in enumerate(zip(new, lengths, strict=True)):
        for page, start in zip(table_SP[row, : pages_for(length)], range(0, length, PAGE_SIZE), strict=True):
            part = kv_SKD[row][:, start : start + PAGE_SIZE]
            caches[:, page, :, : part.shape[1]] = part.transpose(1, 2)
        k_SHD, v_SHD = kv_SKD[row].double().repeat_interleave(num_heads // num_kv, dim=2)
        for i in range(num_new):
            seen = length - num_new + i + 1
            scores_HS = torch.einsum("hd,shd->hs", q_THD[first + i].double(), k_SHD[:seen]) * dim**-0.5
            want_THD[first + i] = torch.einsum("hs,shd->hd", scores_HS.softmax(-1), v_SHD[:seen])
        first += num_new
    starts = torch.tensor([0, *new]).cumsum(0)
    got_THD = ops.attention(
        q_THD.to(device),
        *caches.to(device),
        table_SP.to(device),
        starts.to(device),
        torch.tensor(lengths, device=device),
        softmax_scale=dim**-0.5,
    )
    largest = max(kv[1].abs().max().double() for kv in kv_SKD)
    return _verdict(got_THD, want_THD, largest, 2**-7)


def _verdict(got: Tensor, want: Tensor, unit: Tensor, limit: float) -> str:
    """The largest error in units of `unit`, as text.

    Raises:
        CheckFailed: it is above the limit, or NaN.
    """
    error = ((got.cpu().double() - want).abs() / unit).max().item()
    if not error <= limit:
        raise CheckFailed(f"relative error {error:.2e}, want at most {limit:.2e}")
    return f"relative error {error:.1e}"


OP_CHECKS: dict[str, tuple[str, Callable[[str], str]]] = {  # title -> the op, and its check on a device
    "rms_norm": ("rms_norm", check_rms_norm),
    "linear in FP8": ("linear", check_linear_fp8),
    "attention": ("attention", check_attention),
}
