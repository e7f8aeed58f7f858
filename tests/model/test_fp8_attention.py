# SPDX-License-Identifier: Apache-2.0
"""LLM(fp8_attention=True) on the CPU backend: prompts take products of e4m3, and only they; where it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
import torch
from test_forward import make_engine, run

from nemotron_fast import LLM, SamplingParams
from nemotron_fast.cli.main import main
from nemotron_fast.errors import RequestError

FP8 = torch.float8_e4m3fn
BLOCKS = [(2, 256), (1, 256)]
PROMPT = [i * 37 % 320 for i in range(70)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    oracle.random_checkpoint(3, tmp_path, blocks=BLOCKS, heads=2, head_dim=128)
    return tmp_path


def prompt_logprobs(folder: Path, prompt: list[int], **options: object) -> torch.Tensor:
    (request,) = run(make_engine(folder, kv_dtype=FP8, **options), [prompt])
    return torch.tensor([entry.logprob for entry in request.prompt_logprobs[1:]])


def test_stays_near_the_fp64_forward(tmp_path: Path) -> None:
    """As near as the FP8 cache alone allows, which is 0.1 nats on average; the roundings here add 0.02 to that."""
    config, weights = oracle.random_checkpoint(3, tmp_path, blocks=BLOCKS, heads=2, head_dim=128)
    want = oracle.forward(config, weights, PROMPT).log_softmax(-1)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])
    error = (prompt_logprobs(tmp_path, PROMPT, fp8_attention=True) - want[:, 0]).abs()
    assert error.mean() < 0.2 and error.max() < 1


def test_concerns_prompts_alone(folder: Path) -> None:
    """Steps of more than 8 tokens of a sequence."""
    changed, plain = (prompt_logprobs(folder, PROMPT, fp8_attention=on) for on in (True, False))
    assert 1e-3 < (changed - plain).abs().mean() < 0.1
    changed, plain = (prompt_logprobs(folder, PROMPT[:8], fp8_attention=on) for on in (True, False))
    assert torch.equal(changed, plain)
    changed, plain = (prompt_logprobs(folder, PROMPT, fp8_attention=on, max_batched_tokens=8) for on in (True, False))
    assert torch.equal(changed, plain)


def test_chunks_of_a_prompt_change_little(folder: Path) -> None:
    """14 or 10 tokens a step: sums in another order push few numbers over a border between two e4m3 ones."""
    whole, *chunked = (
        prompt_logprobs(folder, PROMPT, fp8_attention=True, max_batched_tokens=size) for size in (70, 14, 10)
    )
    for found in chunked:
        assert (found - whole).abs().mean() < 1e-3


def test_greedy_tokens_through_llm(folder: Path) -> None:
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    options = {"device": "cpu", "kv_dtype": "fp8", "fp8_attention": True}
    with LLM(str(folder), prefix_caching=False, **options) as llm:
        together = llm.generate([PROMPT, PROMPT[:9], PROMPT[5:6]], params)
        assert [len(r.outputs[0].token_ids) for r in together] == [12] * 3
        assert llm.engine.options.fp8_attention
        assert llm.generate(PROMPT, params)[0].outputs == together[0].outputs


@pytest.mark.parametrize(
    "head_dim,options,message",
    [
        (128, {}, "1 problem: the KV cache is bfloat16, want FP8: use kv_dtype='fp8' or leave it off"),
        (128, {"kv_dtype": "float32"}, "1 problem: the KV cache is float32, want FP8"),
        (64, {"kv_dtype": "fp8"}, "1 problem: the head size is 64, want 128: leave it off"),
        (80, {}, "2 problems: the KV cache is bfloat16, .*; the head size is 80, want 128"),
    ],
)
def test_is_refused_before_the_weights_are_read(head_dim, options, message, tmp_path, monkeypatch) -> None:
    oracle.random_checkpoint(0, tmp_path, blocks=BLOCKS, heads=2, head_dim=head_dim)
    monkeypatch.setattr("nemotron_fast.loading.load_weights", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(RequestError, match=f"^fp8_attention=True: {message}"):
        LLM(str(tmp_path), device="cpu", fp8_attention=True, **options)


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "latency", "--model", str(folder / "config.json"), "--random-weights", "--device", "cpu", "--json"]
    argv += ["--batch", "1", "--input-len", "20", "--output-len", "2", "--repeats", "1"]
    assert main([*argv, "--kv-dtype", "fp8", "--fp8-attention"]) == 0
    assert json.loads(capsys.readouterr().out)["fp8_attention"] is True
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["fp8_attention"] is False
    assert main([*argv, "--fp8-attention"]) == 2
    assert "use kv_dtype='fp8' or leave it off" in capsys.readouterr().err.splitlines()[-1]
