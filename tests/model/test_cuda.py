# SPDX-License-Identifier: Apache-2.0
"""The whole engine on a GPU against the CPU backend: the same greedy tokens, except where two are nearly tied."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from company import assert_same_bits_in_any_company
from modelopt import demo_checkpoint
from near_ties import assert_same_but_for_near_ties

from nemotron_fast import LLM, SamplingParams
from nemotron_fast.executor import Inputs

pytestmark = pytest.mark.gpu

PROMPTS = ["To be, or not to be", "KING HENRY.\n", "O", "JULIET.\nWherefore art thou " * 12]


@pytest.fixture(scope="module")
def static_demo(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("static")
    demo_checkpoint(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["bf16", "fp8", "fp8 with given scales"])
def options(request, static_demo) -> dict:
    """Of an LLM."""
    if request.param == "fp8 with given scales":
        return {"model": static_demo}
    return {"model": "demo", "quantize": None if request.param == "bf16" else "fp8"}


@pytest.fixture(scope="module")
def pair(options):
    with LLM(**options, device="cuda") as gpu, LLM(**options, device="cpu") as cpu:
        yield gpu, cpu


def test_greedy_tokens_equal_the_cpu_backend(pair):
    params = SamplingParams(max_tokens=48, temperature=0, logprobs=5)
    for found, want in zip(*(llm.generate(PROMPTS, params) for llm in pair), strict=True):
        assert_same_but_for_near_ties(found.outputs[0], want.outputs[0])


def test_prompt_logprobs_equal_the_cpu_backend(pair):
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    """A value at a border of two e4m3 numbers may round the other way on either side: few tokens see it."""
    for found, want in zip(*(llm.generate(PROMPTS, params) for llm in pair), strict=True):
        pairs = zip(found.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True)
        errors = [abs(mine.logprob - theirs.logprob) for mine, theirs in pairs]
        assert sum(errors) <= 0.06 * len(errors) and max(errors, default=0) <= 0.5, errors


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(options):
    """In steps of at most 64 tokens: more take other linears."""
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=3, logprobs=0, ignore_eos=True)
    with LLM(**options, device="cuda", max_batched_tokens=64, prefix_caching=False) as llm:
        alone = llm.generate(PROMPTS[0], params)[0].outputs[0]
        for size in (2, 7, 33):
            crowd = llm.generate([PROMPTS[0], *(PROMPTS[i % 4] for i in range(1, size))], params)[0].outputs[0]
            assert crowd.token_ids == alone.token_ids
            assert [e.logprob for e in crowd.logprobs] == [e.logprob for e in alone.logprobs]


def test_deterministic_has_the_same_bits_in_any_company(options, monkeypatch):
    assert_same_bits_in_any_company(options | {"device": "cuda"}, PROMPTS[3], PROMPTS * 10, monkeypatch)


@pytest.mark.parametrize("cached", [64, 192, 320])
def test_a_cached_beginning_changes_nothing(cached, options):
    """Other kernels compute what is left of the prompt: those of few or of many tokens, of decoding or of prompts."""
    params = SamplingParams(max_tokens=24, temperature=0, logprobs=5)
    with LLM(**options, device="cuda") as llm:
        say = SamplingParams(max_tokens=330, temperature=1, seed=1, ignore_eos=True)
        prompt = llm.generate(PROMPTS[1], say)[0].outputs[0].token_ids
    with LLM(**options, device="cuda", prefix_caching=False) as llm:
        want = llm.generate(prompt, params)[0]
    with LLM(**options, device="cuda") as llm:
        llm.generate(prompt[: cached + 1], SamplingParams(max_tokens=1, temperature=0))
        found = llm.generate(prompt, params)[0]
        assert llm.metrics().prefix_hit_rate == pytest.approx(cached / (cached + 1 + len(prompt)))
    assert_same_but_for_near_ties(found.outputs[0], want.outputs[0])


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8"])
def test_graphs_and_decode_attention_change_nothing(kv_dtype, options, monkeypatch):
    """5 sequences run in 8 rows of a graph: three pad."""
    params = SamplingParams(max_tokens=70, temperature=0, logprobs=0, ignore_eos=True)
    batch, results = Inputs.batch, []
    for cuda_graphs, decodes in ((True, True), (False, True), (False, False)):
        if not decodes:
            monkeypatch.setattr(Inputs, "batch", lambda self: dataclasses.replace(batch(self), decodes=False))
        with LLM(**options, device="cuda", kv_dtype=kv_dtype, cuda_graphs=cuda_graphs) as llm:
            results.append([r.outputs for r in llm.generate([*PROMPTS, "A"], params)])
    assert all(result == results[0] for result in results)


def test_steps_in_flight_change_nothing(pair, monkeypatch):
    llm = pair[0]
    kinds = (
        {"temperature": 0.9, "seed": 1},
        {"temperature": 0.7, "seed": 2, "top_k": 9, "stop": ["e "]},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0, "logprobs": 2, "min_tokens": 20},
        {"temperature": 1.0, "seed": 5, "logit_bias": {40: 3}, "min_tokens": 9},
    )
    results = []
    for overlap in (True, False):
        monkeypatch.setattr(llm.engine, "options", dataclasses.replace(llm.engine.options, overlap=overlap))
        params = [SamplingParams(max_tokens=12 + 5 * i, **kinds[i % 5]) for i in range(len(PROMPTS) * 5)]
        plain = [p for p in params if p.logprobs is None and p.repetition_penalty is None]
        results.append([r.outputs for chosen in (plain, params) for r in llm.generate(PROMPTS * 5, fill(chosen))])
    assert results[0] == results[1]


@pytest.mark.parametrize("options", ["bf16"], indirect=True)
def test_taking_turns_changes_nothing(options):
    """More requests of one length than a step holds, with and without counts of their tokens."""
    common = {"max_tokens": 40, "temperature": 0.8, "ignore_eos": True, "logprobs": 0}
    params = [
        SamplingParams(**common, seed=seed, repetition_penalty=1.2 if seed % 2 else 1.0) for seed in range(len(PROMPTS))
    ]
    options = options | {"device": "cuda", "max_batched_tokens": 64, "prefix_caching": False}
    with LLM(**options, max_num_seqs=64) as llm:
        want = [r.outputs[0] for r in llm.generate(PROMPTS, params)]
    for max_num_seqs in (2, 3):
        with LLM(**options, max_num_seqs=max_num_seqs) as llm:
            found = [r.outputs[0] for r in llm.generate(PROMPTS, params)]
            assert [r.token_ids for r in found] == [r.token_ids for r in want]
            assert [[e.logprob for e in r.logprobs] for r in found] == [[e.logprob for e in r.logprobs] for r in want]


def fill(params: list[SamplingParams]) -> list[SamplingParams]:
    """As many as there are prompts, from the start again where they run out."""
    return [params[i % len(params)] for i in range(len(PROMPTS) * 5)]


def test_warm_up_changes_nothing():
    params = SamplingParams(max_tokens=20, temperature=0, logprobs=0)
    results = []
    for warm in (True, False):
        with LLM("demo", device="cuda", max_num_seqs=20) as llm:
            if warm:
                llm.warm_up()
            results.append([r.outputs for r in llm.generate(PROMPTS * 3, params)])
    assert results[0] == results[1]


def our_kernels(work: Callable[[], object]) -> set[str]:
    """The names of those that `work` launches; torch chooses its own by size."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return {event.name for event in profile.events() if "nf::" in event.name}


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("max_num_seqs", [1, 5])
def test_after_warm_up_no_request_is_the_first_to_run_a_kernel(max_num_seqs, cuda_graphs, options):
    """Prompts of all lengths, alone and beside others that decode, and what a cached beginning leaves of one."""
    lengths = [1, 2, 8, 9, 16, 17, 40, 70, 100, 130, 200, 250, 270, 300, 340, 400, 500]
    prompts = [[length % 7 + 1] * length for length in lengths]
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    with LLM(**options, device="cuda", max_num_seqs=max_num_seqs, max_model_len=600, cuda_graphs=cuda_graphs) as llm:
        warm = our_kernels(llm.warm_up)
        cached = [*prompts[-1][:448], 9, 8, 7]
        alone = our_kernels(lambda: [llm.generate(prompt, params) for prompt in (*prompts, cached)])
        together = our_kernels(lambda: llm.generate(prompts, params))
    assert warm and alone <= warm and together <= warm


@pytest.fixture(scope="module")
def shrunk_super(tmp_path_factory) -> str:
    """Every distinct width of Super-49B at a sixteenth of its depth, at its real hidden size: a bare config.json."""
    config = json.loads((Path(__file__).parent.parent / "configs" / "super-49b-v1.json").read_text())
    config["block_configs"] = [config["block_configs"][i] for i in (0, 1, 11, 42, 54, 62)]
    config["num_hidden_layers"] = len(config["block_configs"])
    path = tmp_path_factory.mktemp("super") / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


KV = {"bf16": {"kv_dtype": "bfloat16"}, "fp8": {"kv_dtype": "fp8"}}
KV["fp8 attention"] = KV["fp8"] | {"fp8_attention": True}


@pytest.mark.parametrize("kv", KV.values(), ids=KV)
@pytest.mark.parametrize("quantize", ["fp8", "fp8-static"])
def test_random_weights_from_the_real_config_shrunk(quantize, kv, shrunk_super):
    """Twice, each time by the linears of many tokens."""
    options = {"random_weights": True, "quantize": quantize, "max_model_len": 2048, **kv}
    with LLM(shrunk_super, device="cuda", prefix_caching=False, **options) as llm:
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
        prompt = list(range(1000, 1300))
        first, again = (llm.generate(prompt, params)[0].outputs[0] for _ in range(2))
        assert first.logprobs == again.logprobs and all(e.logprob <= 0 for e in first.logprobs)


@pytest.mark.parametrize("kv", KV.values(), ids=KV)
def test_a_prompt_in_chunks_has_the_same_bits(kv, shrunk_super):
    """300 tokens at once and 100 a step, which the same linears take; FP8 attention has bits of its own."""
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=0, prompt_logprobs=0)
    results = []
    for max_tokens, more in ((512, kv), (100, kv), (512, kv | {"fp8_attention": False})):
        options = {"random_weights": True, "quantize": "fp8-static", "max_model_len": 512, **more}
        with LLM(shrunk_super, device="cuda", max_batched_tokens=max_tokens, max_num_seqs=2, **options) as llm:
            found = llm.generate(list(range(1000, 1300)), params)[0]
            results.append([e.logprob for e in (*found.prompt_logprobs[1:], *found.outputs[0].logprobs)])
    assert results[0] == results[1]
    assert (results[0] == results[2]) == (not kv.get("fp8_attention"))
