# SPDX-License-Identifier: Apache-2.0
"""rms_norm and add_rms_norm, to e4m3 too: the CPU backend against FP64, the CUDA kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron_fast import ops, reference
from nemotron_fast.testing import cases, compare

EPS = 1e-5
HALF_TYPES = (torch.bfloat16, torch.float16)
on_every_case = pytest.mark.parametrize("case", cases.NORM_TESTS, ids=str)
# e4m3 rows are whole 16-byte vectors
on_added = pytest.mark.parametrize("case", [c for c in cases.NORM_TESTS if c.add and c.E % 16 == 0 and c.T], ids=str)
on_half_types = pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)


def formula(x_TE: Tensor, weight_E: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in FP64, nothing rounded."""
    x_TE = x_TE.double()
    return x_TE / (x_TE.square().mean(-1, keepdim=True) + EPS).sqrt() * weight_E.double()


def make_matrix(case: cases.NormCase, dtype: torch.dtype, device: str) -> Tensor:
    wide = torch.randn(case.T, case.E * (2 if case.strided else 1), device=device) * 3
    return wide.to(dtype)[:, : case.E]


def run(case: cases.NormCase, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, residual afterwards) of the op, on a poisoned output and a copy of the residual."""
    out = compare.poison(case.T, case.E, dtype=x.dtype, device=x.device)
    if not case.add:
        return ops.rms_norm(x, weight, EPS, out=out), residual
    wide = torch.cat([residual, residual], dim=1) if case.strided else residual.clone()
    residual = wide[:, : case.E]
    return ops.add_rms_norm(x, residual, weight, EPS, out=out), residual


def check_against_formula(case: cases.NormCase, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(case.T * case.E)
    x, residual = make_matrix(case, dtype, device), make_matrix(case, dtype, device)
    weight = torch.randn(case.E, device=device).to(dtype)
    out, new_residual = run(case, x, residual, weight)

    summed = residual + x if case.add else x
    if case.add:
        compare.assert_bit_equal(new_residual, summed)  # a sum rounded once: no other result is right
    compare.assert_as_good_as(out, reference.rms_norm(summed, weight, EPS), formula(summed, weight))


@on_half_types
@on_every_case
def test_cpu_backend(case: cases.NormCase, dtype: torch.dtype) -> None:
    check_against_formula(case, dtype, "cpu")


def test_rounds_before_the_weight() -> None:
    """As Llama does: 1 + 2^-8 becomes 1 in bf16 before it meets the weight."""
    x = torch.full((1, 8), 1.0, dtype=torch.bfloat16)
    x[0, 0] = 1 + 2**-7
    normalised = (x.float() * torch.rsqrt(x.float().square().mean() + EPS)).bfloat16()
    weight = torch.linspace(1, 3, 8).bfloat16()
    compare.assert_bit_equal(ops.rms_norm(x, weight, EPS), normalised * weight)


def check_fp8(case: cases.NormCase, dtype: torch.dtype, device: str) -> None:
    """What add_rms_norm gives, divided by the scale: a given one, or what the row's statistics say."""
    torch.manual_seed(case.T * case.E)
    x, weight = make_matrix(case, dtype, device), torch.randn(case.E, device=device).to(dtype)
    residuals = [make_matrix(case, dtype, device)]
    residuals += [residuals[0].clone(), residuals[0].clone()]
    normed = ops.add_rms_norm(x, residuals[0], weight, EPS)
    poison = compare.poison(case.T, case.E, dtype=torch.float32, device=device).to(reference.FP8)

    static = torch.full((1,), 0.01, device=device)
    out = ops.add_rms_norm_fp8(x, residuals[1], weight, static, EPS, out=poison.clone())
    compare.assert_bit_equal(out, ops.quantize_fp8(normed, static))
    scale = compare.poison(case.T, dtype=torch.float32, device=device)
    out, _ = ops.add_rms_norm_fp8_per_token(x, residuals[2], weight, EPS, out=poison.clone(), scale=scale)
    compare.assert_close(scale, formula(residuals[0], weight).abs().amax(-1) / 448, rtol=1e-5)
    want = reference.quantize_fp8(normed, scale[:, None])
    if device == "cuda":
        compare.assert_bit_equal(out, want)
    else:  # the reference adds the squares in another order: a tie may round the other way
        compare.assert_close(out.float(), want.float(), rtol=2**-3)
    for residual in residuals[1:]:
        compare.assert_bit_equal(residual, residuals[0])

    summed = residuals[0]
    found = ops.rms_norm_fp8(summed, weight, static, EPS, out=poison.clone())
    compare.assert_bit_equal(found, ops.quantize_fp8(normed, static))
    found_scale = compare.poison(case.T, dtype=torch.float32, device=device)
    found, _ = ops.rms_norm_fp8_per_token(summed, weight, EPS, out=poison.clone(), scale=found_scale)
    compare.assert_bit_equal(found, out)
    compare.assert_bit_equal(found_scale, scale)


@on_half_types
@on_added
def test_cpu_fp8(case: cases.NormCase, dtype: torch.dtype) -> None:
    check_fp8(case, dtype, "cpu")


@pytest.mark.gpu
@on_half_types
@on_added
def test_cuda_fp8(case: cases.NormCase, dtype: torch.dtype) -> None:
    check_fp8(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_cuda_fp8_of_zeros_and_nan(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 64, dtype=dtype, device="cuda")
    x[1, 5] = float("nan")
    x[2] = 1.0
    out, scale = ops.add_rms_norm_fp8_per_token(x, torch.zeros_like(x), torch.ones_like(x[0]), EPS)
    assert out[0].float().count_nonzero() == 0 and scale[0] == reference.MIN_SCALE
    assert out[1].float().isnan().all() and scale[1].isnan()
    compare.assert_bit_equal(out[2].float(), torch.full((64,), 448.0, device="cuda"))


@pytest.mark.gpu
@on_half_types
@on_every_case
def test_cuda_kernel(case: cases.NormCase, dtype: torch.dtype) -> None:
    check_against_formula(case, dtype, "cuda")


@pytest.mark.gpu
@on_half_types
@pytest.mark.parametrize("case", [c for c in cases.NORM_TESTS if c.T > 1], ids=str)
def test_same_bits_twice_and_alone(case: cases.NormCase, dtype: torch.dtype) -> None:
    """A row's bits depend neither on the run nor on the other rows."""
    x, residual = make_matrix(case, dtype, "cuda"), make_matrix(case, dtype, "cuda")
    weight = torch.randn(case.E, device="cuda").to(dtype)
    out, _ = run(case, x, residual, weight)
    compare.assert_bit_equal(run(case, x, residual, weight)[0], out)
    alone = cases.NormCase(1, case.E, case.add, case.strided)
    compare.assert_bit_equal(run(alone, x[-1:], residual[-1:], weight)[0], out[-1:])


@pytest.mark.gpu
@pytest.mark.parametrize("add", [False, True], ids=["rms_norm", "add_rms_norm"])
def test_cuda_graph_replays_with_new_inputs(add: bool) -> None:
    """A chain of ten calls, so that consecutive kernels overlap (programmatic dependent launch)."""
    case = cases.NormCase(7, 8192, add)
    weight = torch.randn(case.E, device="cuda").bfloat16()
    x, residual = make_matrix(case, torch.bfloat16, "cuda"), make_matrix(case, torch.bfloat16, "cuda")

    def chain(x: Tensor, residual: Tensor) -> Tensor:
        for _ in range(10):
            x = ops.add_rms_norm(x, residual, weight, EPS) if add else ops.rms_norm(x, weight, EPS)
        return x

    chain(x, residual.clone())  # loads the kernels outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x, residual)
    for seed in range(3):
        torch.manual_seed(seed)
        new_x, new_residual = (
            make_matrix(case, torch.bfloat16, "cuda"),
            make_matrix(case, torch.bfloat16, "cuda"),
        )
        x.copy_(new_x)
        residual.copy_(new_residual)
        graph.replay()
        torch.cuda.synchronize()
        want_residual = new_residual.clone()
        for_graph = out.clone(), residual.clone()
        torch.cuda.synchronize()
        want = new_x
        for _ in range(10):
            want = ops.add_rms_norm(want, want_residual, weight, EPS) if add else ops.rms_norm(want, weight, EPS)
            torch.cuda.synchronize()  # one kernel at a time: nothing overlaps
        compare.assert_bit_equal(for_graph[0], want)
        compare.assert_bit_equal(for_graph[1], want_residual)


@pytest.mark.gpu
def test_runs_on_the_current_stream() -> None:
    """The op must wait for what its stream was given before, and only its stream."""
    x, weight = torch.zeros(64, 8192, device="cuda").bfloat16(), torch.ones(8192, device="cuda").bfloat16()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(2.0)
        out = ops.rms_norm(x, weight, EPS)
    stream.synchronize()
    compare.assert_bit_equal(out, torch.ones_like(out))


@pytest.mark.gpu
def test_opcheck() -> None:
    x, weight = torch.randn(3, 64, device="cuda").bfloat16(), torch.randn(64, device="cuda").bfloat16()
    library = torch.ops.nemotron_fast
    torch.library.opcheck(library.rms_norm.default, (torch.empty_like(x), x, weight, EPS))
    torch.library.opcheck(library.add_rms_norm.default, (torch.empty_like(x), x.clone(), x, weight, EPS))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 64, dtype=torch.float32)}, "x: dtype is Float, want BFloat16 or Half"),
        ({"x": torch.zeros(2, 60).bfloat16(), "weight": torch.zeros(60).bfloat16()}, "x: row stride is 60"),
        ({"x": torch.zeros(64, dtype=torch.bfloat16)}, "x: has 1 dims, want 2"),
        ({"x": torch.zeros(64, 2, dtype=torch.bfloat16).T}, "x: stride of the last dim is 2, want 1"),
        ({"weight": torch.zeros(65).bfloat16()}, "weight: dim 0 is 65, want 64"),
        ({"weight": torch.zeros(64).half()}, "weight: dtype is Half, want BFloat16"),
        ({"out": torch.zeros(3, 64).bfloat16()}, "out: dim 0 is 3, want 2"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_rejects(change: dict[str, Tensor], message: str) -> None:
    args = {"x": torch.zeros(2, 64).bfloat16(), "weight": torch.zeros(64).bfloat16()} | change
    args = {name: t.cuda() if t.is_contiguous() else t.T.cuda().T for name, t in args.items()}
    out = args.get("out", torch.empty_like(args["x"], memory_format=torch.contiguous_format))
    if args["x"].dtype == torch.float32:
        args["weight"] = args["weight"].float()
    with pytest.raises(RuntimeError, match=message):
        ops.rms_norm(args["x"], args["weight"], EPS, out=out)


@pytest.mark.gpu
def test_fp8_rejects() -> None:
    x, weight = torch.zeros(2, 64, device="cuda").bfloat16(), torch.zeros(64, device="cuda").bfloat16()
    with pytest.raises(RuntimeError, match="scale: dim 0 is 3, want 2"):
        ops.add_rms_norm_fp8_per_token(x, x.clone(), weight, EPS, scale=torch.zeros(3, device="cuda"))
    with pytest.raises(RuntimeError, match="out: dtype is BFloat16, want Float8_e4m3fn"):
        ops.add_rms_norm_fp8(x, x.clone(), weight, torch.ones(1, device="cuda"), EPS, out=torch.empty_like(x))
    with pytest.raises(RuntimeError, match="scale: dim 0 is 2, want 1"):
        ops.rms_norm_fp8(x, weight, torch.ones(2, device="cuda"), EPS)


@pytest.mark.gpu
def test_rejects_another_device() -> None:
    x, weight = torch.zeros(2, 64, device="cuda").bfloat16(), torch.zeros(64).bfloat16()
    with pytest.raises(RuntimeError, match="weight: is not on cuda:0"):
        ops.rms_norm(x, weight, EPS)
