# SPDX-License-Identifier: Apache-2.0
"""Random weights in the layouts of quantised checkpoints."""

import json

import pytest
import torch
from modelopt import QUANTIZATION, demo_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_fast import LLM, SamplingParams
from nemotron_fast.cli.main import main
from nemotron_fast.errors import ConfigError, RequestError
from nemotron_fast.models import demo_folder
from nemotron_fast.param_loader import LinearWeight
from nemotron_fast.reference import FP8, FP8_MAX

PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, prompt_logprobs=0)
PROMPT = list(range(200, 330))


@pytest.fixture
def bare_config(tmp_path):
    """Writes the demo's config.json with these entries as well."""

    def write(**entries) -> str:
        path = tmp_path / "some-config.json"
        path.write_text(json.dumps(json.loads((demo_folder() / "config.json").read_text()) | entries))
        return str(path)

    return write


def load(model: str, **options) -> LLM:
    return LLM(model, device="cpu", random_weights=True, **options)


def linears_of(llm: LLM) -> list[LinearWeight]:
    blocks = llm.engine.model.weights.sub_blocks
    return [value for block in blocks for value in vars(block).values() if isinstance(value, LinearWeight)]


def test_modelopt_layout_by_option_or_by_config(bare_config, tmp_path):
    demo_checkpoint(tmp_path)
    with LLM(str(tmp_path), device="cpu") as real, load("demo", quantize="fp8-static") as by_option:
        lm_head = by_option.engine.model.weights.lm_head
        assert lm_head.weight.dtype == torch.bfloat16 and lm_head.weight_scale is None
        for linear, stored in zip(linears_of(by_option), linears_of(real), strict=True):
            assert {k: (v.dtype, v.shape) for k, v in vars(linear).items()} == {
                k: (v.dtype, v.shape) for k, v in vars(stored).items()
            }
        with load(bare_config(quantization_config=QUANTIZATION)) as by_config:
            for a, b in zip(linears_of(by_option), linears_of(by_config), strict=True):
                assert torch.equal(a.weight.view(torch.uint8), b.weight.view(torch.uint8))
                assert a.weight_scale == b.weight_scale and a.input_scale == b.input_scale


def test_dummy_values_are_those_of_vllm():
    with LLM("demo", device="cpu", random_weights="dummy", quantize="fp8-static") as llm:
        for linear in linears_of(llm):
            zeros = (linear.weight.float() == 0).float().mean()
            assert 0.96 < zeros < 0.99  # |w| < 2**-10 rounds to 0: 97.7 %
            assert set(linear.weight.float().unique().tolist()) == {-(2**-9), 0.0, 2**-9}
        lm_head = llm.engine.model.weights.lm_head.weight.float()
        assert 0.9e-3 < lm_head.abs().max() <= 1e-3 and lm_head.std() == pytest.approx(1e-3 / 3**0.5, rel=0.05)
        assert len(llm.generate(PROMPT, PARAMS)[0].outputs[0].token_ids) == PARAMS.max_tokens
    with pytest.raises(RequestError, match="random weights 'zero', want 'normal' or 'dummy'"):
        LLM("demo", device="cpu", random_weights="zero")


def test_other_layouts_and_unknown_ones(bare_config):
    per_row = QUANTIZATION | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    with load(bare_config(quantization_config=per_row)) as llm:
        for linear in linears_of(llm):
            assert linear.weight_scale.shape == linear.weight.shape[:1] and linear.input_scale is None
    with pytest.raises(ConfigError, match="quant_algo='NVFP4' is not supported"):
        load(bare_config(quantization_config=QUANTIZATION | {"quant_algo": "NVFP4"}))


class Quantised(TorchDispatchMode):
    """Gathers what ops write in e4m3."""

    def __init__(self):
        super().__init__()
        self.rows: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.name().startswith("nemotron_fast::") and args[0].dtype == FP8:
            self.rows.append(args[0].float().flatten())
        return result


def test_static_scales_fit_random_activations():
    """Nothing saturates, next to nothing vanishes, and the logits are those of scales per token but for rounding."""
    results = []
    for quantize in ("fp8-static", "fp8"):
        with load("demo", quantize=quantize) as llm, Quantised() as quantised:
            results.append(llm.generate(PROMPT, PARAMS)[0].prompt_logprobs[1:])
        values = torch.cat(quantised.rows).abs()
        if quantize == "fp8-static":
            assert values.max() < FP8_MAX and (values == 0).float().mean() < 0.02
    errors = torch.tensor([a.logprob - b.logprob for a, b in zip(*results, strict=True)])
    spread = torch.tensor([e.logprob for e in results[1]]).std()
    assert errors.abs().mean() < 0.15 * spread, (errors.abs().mean(), spread)


def test_a_checkpoint_is_refused(capsys):
    with pytest.raises(RequestError, match="for random weights only.*calibration"):
        LLM("demo", device="cpu", quantize="fp8-static")
    argv = ["generate", "--model", "demo", "--device", "cpu", "--prompt", "x", "--quantize", "fp8-static"]
    assert main(argv) == 2
    assert "use quantize='fp8'" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(RequestError, match="quantize='int4'"):
        load("demo", quantize="int4")


def test_bench_latency_measures_the_layout(capsys, bare_config):
    sizes = ("--batch", "2", "--input-len", "5", "--output-len", "2", "--repeats", "1", "--json")
    argv = ["bench", "latency", "--model", bare_config(), "--device", "cpu", "--random-weights"]
    assert main([*argv, "--quantize", "fp8-static", *sizes]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quantize"] == "fp8-static" and len(report["results"]) == 2
