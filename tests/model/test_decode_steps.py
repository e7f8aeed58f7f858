# SPDX-License-Identifier: Apache-2.0
"""Steps of one token a sequence: one kernel for RoPE, KV append and attention, and nothing between linears of given
scales. The results are those of the separate kernels."""

import dataclasses

import oracle
import pytest
import torch
from test_forward import make_engine, run
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_fast import SamplingParams
from nemotron_fast.executor import Inputs
from nemotron_fast.model import Model
from nemotron_fast.packed_weights import pack_weights
from nemotron_fast.quant_config import MODELOPT_FP8
from nemotron_fast.random_weights import random_weights
from nemotron_fast.sampling_params import NEUTRAL

BLOCKS = [(2, 256), ("linear", None), (None, 512), (1, 256), (4, "linear")]
PARAMS = SamplingParams(**NEUTRAL | {"temperature": 0.0}, max_tokens=20, ignore_eos=True, logprobs=3)
PROMPTS = [[(7 * i + n) % 256 for i in range(n)] for n in (3, 70, 64, 1, 60)]
PADDED = {"padded_decode": True, "max_num_seqs": 8}


class Recorder(TorchDispatchMode):
    """The ops that run: this package's by their names, torch's as "aten"; views and new tensors are none."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("nemotron_fast::"):
            self.calls.append((func._schema.name.split("::")[1], args))
        elif not func.is_view and "empty" not in name:
            self.calls.append(("aten", args))
        return func(*args, **kwargs or {})

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    oracle.random_checkpoint(0, path, blocks=BLOCKS)
    return path


def make(folder, *, static=False, packed=False, **options):
    engine = make_engine(folder, dtype=torch.bfloat16, **options)
    if static:
        engine.model.weights = random_weights(engine.config, MODELOPT_FP8)
    if packed:
        engine.model.weights = pack_weights(engine.model.weights)
    return engine


def separately(monkeypatch) -> None:
    """From now on rope_append and attention compute decode steps too."""
    batch = Inputs.batch
    monkeypatch.setattr(Inputs, "batch", lambda self: dataclasses.replace(batch(self), decodes=False))


def results(requests) -> list:
    return [(r.output, r.logprobs) for r in requests]


@pytest.mark.parametrize("options", [{}, PADDED, {"max_batched_tokens": 3}], ids=["plain", "padded", "small chunks"])
def test_decode_attention_computes_the_steps_of_one_token_each(options, folder):
    with Recorder() as ops:
        run(make(folder, **options), PROMPTS, PARAMS)
    kv_len = {"decode_attention": 7, "attention": 6}  # their arguments
    decodes, others = (
        [(len(args[1]), len(args[kv_len[name]])) for called, args in ops.calls if called == name] for name in kv_len
    )
    assert decodes and all(tokens == sequences for tokens, sequences in decodes)
    assert others and all(tokens > sequences for tokens, sequences in others)
    assert ops.names().count("rope_append") == len(others)


@pytest.mark.parametrize("options", [{}, {"overlap": True}], ids=["plain", "overlapped"])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16 kv", "fp8 kv"])
@pytest.mark.parametrize("kind", [{}, {"quantize": "fp8"}, {"static": True}, {"static": True, "packed": True}], ids=str)
def test_results_are_those_of_the_separate_kernels(kind, kv_dtype, options, folder, monkeypatch):
    options = {"kv_dtype": kv_dtype, **kind, **options}
    found = results(run(make(folder, **options), PROMPTS, PARAMS))
    separately(monkeypatch)
    with Recorder() as ops:
        want = results(run(make(folder, **options), PROMPTS, PARAMS))
    assert "decode_attention" not in ops.names() and found == want


def test_padding_rows_touch_no_page(folder):
    """5 sequences run in 8 rows; nothing more is written, and what nobody has written is NaN and has not been read."""
    tokens, written = [], []  # [without padding, with]
    for options in (PADDED | {"padded_decode": False}, PADDED):
        engine = make(folder, **options)
        caches = [*engine.cache.keys, *engine.cache.values]
        for cache in caches:
            cache.fill_(torch.nan)
        tokens.append([found for found, _ in results(run(engine, PROMPTS, PARAMS))])
        written.append([cache.isfinite() for cache in caches])
    assert tokens[0] == tokens[1] and all(map(torch.equal, *written))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16 kv", "fp8 kv"])
@pytest.mark.parametrize("kind", [{}, {"quantize": "fp8"}, {"static": True}, {"static": True, "packed": True}], ids=str)
def test_padding_changes_nothing(kind, kv_dtype, overlap, folder):
    """But for what a CPU's matrix product owes to the number of rows."""
    options = {"kv_dtype": kv_dtype, "overlap": overlap, **kind, **PADDED}
    found = results(run(make(folder, **options), PROMPTS, PARAMS))
    want = results(run(make(folder, **options | {"padded_decode": False}), PROMPTS, PARAMS))
    for (mine, mine_logprobs), (theirs, their_logprobs) in zip(found, want, strict=True):
        same = next((i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), len(mine))
        pairs = list(zip(mine_logprobs, their_logprobs, strict=True))
        assert all(m.logprob == pytest.approx(t.logprob, abs=0.1) for m, t in pairs[:same])
        if same < len(mine):  # a near tie
            assert abs(pairs[same][0].logprob - pairs[same][1].logprob) < 0.1


def step_ops(engine, monkeypatch) -> list[str]:
    """The ops of the model in the second decode step of one sequence."""
    engine.add_request(PROMPTS[0], PARAMS)
    for _ in range(2):
        engine.step()
    forward, recorded = Model.forward, []

    def record(*args):
        with Recorder() as ops:
            result = forward(*args)
        recorded.extend(ops.names())
        return result

    monkeypatch.setattr(Model, "forward", record)
    engine.step()
    return recorded


def test_nothing_stands_between_linears_of_given_scales(folder, monkeypatch):
    """`aten`: the sum of a linear block, the choice of the rows whose logits are wanted."""
    a = ["packed_linear", "decode_attention", "packed_linear_add"]
    ffn, linear = ["packed_swiglu", "packed_linear_add"], ["packed_linear", "aten", "row_stats"]
    blocks = [*a, *ffn, *linear, *ffn, *a, *ffn, *a, *linear]
    want = ["embed", "row_stats", *blocks, "aten", "rms_norm", "packed_linear"]
    assert step_ops(make(folder, static=True, packed=True), monkeypatch) == want


def test_larger_steps_of_given_scales_quantise_in_the_norms_alone(folder, monkeypatch):
    monkeypatch.setattr("nemotron_fast.model.FEW_TOKENS", 0)
    names = [n for n in step_ops(make(folder, static=True, packed=True), monkeypatch) if n != "aten"]
    norm = "add_rms_norm_fp8"
    a = [norm, "packed_linear", "decode_attention", "packed_linear"]
    ffn, linear = [norm, "packed_swiglu", "packed_linear"], [norm, "packed_linear"]
    first = ["rms_norm_fp8", *a[1:]]
    assert names == ["embed", *first, *ffn, *linear, *ffn, *a, *ffn, *a, *linear, "rms_norm", "packed_linear"]


def test_steps_of_many_tokens_add_in_the_linears(folder, monkeypatch):
    monkeypatch.setattr("nemotron_fast.model.FEW_TOKENS", 0)
    monkeypatch.setattr("nemotron_fast.residual.MOST_DELTA_TOKENS", 0)
    names = [n for n in step_ops(make(folder, static=True, packed=True), monkeypatch) if n != "aten"]
    norm = "rms_norm_fp8"
    a = [norm, "packed_linear", "decode_attention", "packed_linear_add"]
    ffn, linear = [norm, "packed_swiglu", "packed_linear_add"], [norm, "packed_linear"]
    after_linear = ["add_rms_norm_fp8", *ffn[1:]]
    blocks = [*a, *ffn, *linear, *after_linear, *a, *ffn, *a, *linear]
    assert names == ["embed", *blocks, "rms_norm", "packed_linear"]


def test_dynamic_scales_take_one_more_op_before_o(folder, monkeypatch):
    engine = make(folder, quantize="fp8", packed=True)
    names = step_ops(engine, monkeypatch)
    at = names.index("decode_attention")
    assert names[at - 1 : at + 3] == ["packed_linear", "decode_attention", "row_stats", "packed_linear_add"]
    assert "quantize_fp8_per_token" not in names
