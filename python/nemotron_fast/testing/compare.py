# SPDX-License-Identifier: Apache-2.0
"""Comparisons in which NaN fails, and which say where the worst element is."""

from __future__ import annotations

import torch
from torch import Tensor


def poison(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor full of NaN, so that an element the op does not write shows. (An integer type gets its minimum.)"""
    if not dtype.is_floating_point:
        return torch.full(shape, torch.iinfo(dtype).min, dtype=dtype, device=device)
    return torch.full(shape, float("nan"), device=device).to(dtype)


def assert_close(found: Tensor, want: Tensor, *, rtol: float, atol: float = 0.0) -> None:
    """|found - want| <= atol + rtol * |want| in FP64 everywhere; infinities must match, NaN is never accepted."""
    found, want = _pair(found, want)
    _assert_same_nonfinite(found, want)
    finite = want.isfinite()
    error = torch.where(finite, (found - want).abs(), 0.0)
    limit = atol + rtol * torch.where(finite, want.abs(), 0.0)
    ok = error <= limit
    if not bool(ok.all()):
        at = _coordinate((error - limit).argmax(), want.shape)
        raise AssertionError(
            f"{int((~ok).sum())} of {ok.numel()} elements differ; worst at {at}: found {float(found[at])}, "
            f"want {float(want[at])}, error {float(error[at]):.3g}, allowed {float(limit[at]):.3g}"
        )


def assert_as_good_as(found: Tensor, peer: Tensor, want: Tensor, *, factor: float = 2.0) -> None:
    """The largest and the root-mean-square error of `found` are at most `factor` times those of `peer`.

    `want` is the FP32 or FP64 reference, `peer` the same computation in torch at found's dtype. A peer that happens
    to be exact is given one rounding of found's dtype.
    """
    if want.numel() == 0:
        _pair(found, want)
        return
    dtype = found.dtype
    found, want = _pair(found, want)
    peer, _ = _pair(peer, want)
    _assert_same_nonfinite(found, want)
    rounding = torch.finfo(dtype).eps / 2 * want.abs().max().item()
    error, peer_error = (found - want).abs(), (peer - want).abs()
    at = _coordinate(error.argmax(), want.shape)
    worst, allowed = error.max().item(), factor * max(peer_error.max().item(), rounding)
    assert worst <= allowed, (
        f"worst at {at}: found {float(found[at])}, want {float(want[at])}, peer {float(peer[at])}; "
        f"error {worst:.3g}, allowed {allowed:.3g}"
    )
    rms, peer_rms = error.square().mean().sqrt().item(), peer_error.square().mean().sqrt().item()
    assert rms <= factor * max(peer_rms, rounding), f"rms error {rms:.3g} is over {factor} x the peer's {peer_rms:.3g}"


def assert_bit_equal(found: Tensor, want: Tensor) -> None:
    """Same dtype, shape and bits (so NaN equals itself and -0 differs from 0)."""
    assert found.dtype == want.dtype, f"dtype is {found.dtype}, want {want.dtype}"
    assert found.shape == want.shape, f"shape is {tuple(found.shape)}, want {tuple(want.shape)}"
    size = found.element_size()
    differs = found.contiguous().view(torch.uint8) != want.contiguous().view(torch.uint8)
    if bool(differs.any()):
        at = _coordinate(differs.flatten().int().argmax() // size, want.shape)
        raise AssertionError(f"first difference at {at}: found {found[at].item()!r}, want {want[at].item()!r}")


def _pair(found: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    assert found.shape == want.shape, f"shape is {tuple(found.shape)}, want {tuple(want.shape)}"
    found = found.detach()  # compared where it is: on a GPU this takes milliseconds, on the host seconds
    return found.double(), want.detach().to(found.device).double()


def _assert_same_nonfinite(found: Tensor, want: Tensor) -> None:
    assert not bool(want.isnan().any()), "the reference itself has NaN"
    for name, bad in (
        ("NaN", found.isnan()),
        ("+inf", (found == torch.inf) != (want == torch.inf)),
        ("-inf", (found == -torch.inf) != (want == -torch.inf)),
    ):
        if bool(bad.any()):
            at = _coordinate(bad.flatten().int().argmax(), want.shape)
            raise AssertionError(
                f"{name}: {int(bad.sum())} of {bad.numel()} elements are wrong; first at {at}: "
                f"found {float(found[at])}, want {float(want[at])}"
            )


def _coordinate(flat_index: Tensor, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat_index.cpu(), shape))
