# SPDX-License-Identifier: Apache-2.0
"""The Python API with the embedded demo model, and reasoning with the real Llama-3 vocabulary."""

import gc
import json
import math
import shutil
import weakref
from pathlib import Path

import oracle
import pytest
import torch
from company import assert_same_bits_in_any_company
from packages import llama3_tokenizer_folder

from nemotron_fast import LLM, SamplingParams
from nemotron_fast.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    DeviceError,
    NumericsError,
    RequestError,
)
from nemotron_fast.models import demo_folder

GREEDY = {"temperature": 0.0}
TEMPLATES = Path(__file__).parent.parent / "templates"


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", device="cpu") as llm:
        yield llm


def pool_is_free(llm: LLM) -> bool:
    scheduler = llm.engine.scheduler
    scheduler.check()
    return scheduler.pages.num_held == 0 and not llm.text_engine.live and not llm.engine.has_work


def test_held_out_loss_is_the_recorded_one(llm):
    record = json.loads((demo_folder() / "training.json").read_text())["held_out"]
    ids = llm.tokenizer.encode((demo_folder() / "held_out.txt").read_text(), add_special_tokens=False)
    size = record["window_tokens"]
    windows = [[llm.tokenizer.bos_id, *ids[i : i + size]] for i in range(0, len(ids), size)]
    results = llm.generate(windows, SamplingParams(max_tokens=1, prompt_logprobs=0, **GREEDY))
    logprobs = [entry.logprob for r in results for entry in r.prompt_logprobs[1:]]
    assert len(logprobs) == len(ids) == record["tokens"]
    assert -sum(logprobs) / len(logprobs) == pytest.approx(record["loss_nats_per_token"], abs=0.02)


def test_results_keep_the_order_and_equal_single_runs(llm):
    prompts = ["To be, or not to be", "KING HENRY.\n", llm.tokenizer.encode("ROMEO.\n"), "O"]
    params = SamplingParams(max_tokens=12, **GREEDY)
    together = llm.generate(prompts, params)
    assert [r.text for r in together] == [llm.generate(p, params)[0].text for p in prompts]
    assert [r.prompt for r in together] == [prompts[0], prompts[1], None, prompts[3]]
    for result in together:
        json.dumps(result.to_dict())
        out = result.outputs[0]
        assert out.finish_reason == "length" and len(out.token_ids) == 12
        assert result.usage.total_tokens == len(result.prompt_token_ids) + 12
        assert 0 <= result.timings.queue_s <= result.timings.ttft_s <= result.timings.total_s
    assert pool_is_free(llm)


def test_deterministic_has_the_same_bits_in_any_company(monkeypatch):
    options = {"model": "demo", "device": "cpu", "dtype": "bfloat16"}
    prompt = "JULIET.\nWherefore art thou " * 7
    assert_same_bits_in_any_company(options, prompt, ["To be", "O"], monkeypatch, most_tokens=30)


def test_stream_equals_generate_and_ends_with_the_result(llm):
    params = SamplingParams(max_tokens=20, n=2, seed=5, temperature=0.9, logprobs=1)
    want = llm.generate("JULIET.\n", params)[0]
    deltas = list(llm.stream("JULIET.\n", params))
    for index in (0, 1):
        mine = [d for d in deltas if d.index == index]
        assert "".join(d.text for d in mine) == want.outputs[index].text
        assert [t for d in mine for t in d.token_ids] == want.outputs[index].token_ids
        assert [d.finish_reason for d in mine][-1] == "length"
    assert [d.result for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].result.outputs == want.outputs
    assert want.outputs[0].text != want.outputs[1].text


def test_closing_a_stream_cancels_it(llm):
    stream = llm.stream("To be", SamplingParams(max_tokens=500, ignore_eos=True, **GREEDY))
    for _ in range(3):
        next(stream)
    assert not pool_is_free(llm)
    stream.close()
    assert pool_is_free(llm)


def test_a_stream_that_never_started_holds_nothing(llm):
    stream = llm.stream("To be", SamplingParams(max_tokens=5, **GREEDY))
    assert pool_is_free(llm)
    stream.close()
    assert pool_is_free(llm)


def test_any_sequence_of_integers_is_a_prompt(llm):
    np = pytest.importorskip("numpy")
    params = SamplingParams(max_tokens=4, **GREEDY)
    want = llm.generate([5, 6, 7], params)[0].outputs[0].token_ids
    for prompt in ((5, 6, 7), np.array([5, 6, 7]), [np.int64(5), 6, 7]):
        assert llm.generate(prompt, params)[0].outputs[0].token_ids == want
    both = llm.generate((np.array([5, 6, 7]), "To be"), params)
    assert both[0].outputs[0].token_ids == want and both[1].prompt == "To be"
    with pytest.raises(RequestError, match="params is dict, want SamplingParams"):
        llm.generate("a", {"temperature": 0})


def test_nan_logits_end_with_an_error_instead_of_garbage(llm, monkeypatch):
    forward = llm.engine.model.forward
    monkeypatch.setattr(llm.engine.model, "forward", lambda *a: forward(*a).fill_(math.nan))
    with pytest.raises(NumericsError, match="logits of request .* are NaN with torch.bfloat16"):
        llm.generate(["To be", "O"])
    monkeypatch.undo()
    assert pool_is_free(llm)


def test_two_streams_run_side_by_side(llm):
    params = SamplingParams(max_tokens=10, **GREEDY)
    first, second = llm.stream("To be", params), llm.stream("KING", params)
    texts = ["", ""]
    for pair in zip(first, second, strict=True):
        for i, delta in enumerate(pair):
            texts[i] += delta.text
    assert texts == [llm.generate(p, params)[0].text for p in ("To be", "KING")]


def test_stop_strings_cut_across_token_borders(llm):
    full = llm.generate("To be, or not", SamplingParams(max_tokens=60, **GREEDY))[0].text
    stop = full[7:12]
    cut = full.index(stop)
    for include in (False, True):
        params = SamplingParams(max_tokens=60, stop=stop, include_stop_str_in_output=include, **GREEDY)
        out = llm.generate("To be, or not", params)[0].outputs[0]
        assert out.text == full[: cut + len(stop) * include]
        assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert pool_is_free(llm)
    last = SamplingParams(max_tokens=len(out.token_ids), stop=stop, **GREEDY)  # found by the very last token
    deltas = list(llm.stream("To be, or not", last))
    final = deltas[-1].result.outputs[0]
    assert deltas[-1].finish_reason == final.finish_reason == "stop" and final.stop_reason == stop


def test_stop_token_ids_min_tokens_and_bias(llm):
    free = llm.generate("To be", SamplingParams(max_tokens=8, **GREEDY))[0].outputs[0].token_ids
    target = free[2]
    stopped = llm.generate("To be", SamplingParams(max_tokens=8, stop_token_ids=[target], **GREEDY))[0].outputs[0]
    first = free.index(target)
    assert stopped.token_ids == free[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", target)
    late = SamplingParams(max_tokens=8, stop_token_ids=[target], min_tokens=5, **GREEDY)
    assert target not in llm.generate("To be", late)[0].outputs[0].token_ids[:5]
    biased = SamplingParams(max_tokens=4, logit_bias={7: 100}, **GREEDY)
    assert llm.generate("To be", biased)[0].outputs[0].token_ids == [7] * 4


def test_seed_decides_and_penalties_change_the_text(llm):
    def draw(**options):
        return (
            llm.generate("HAMLET.\n", SamplingParams(max_tokens=24, temperature=1.0, **options))[0].outputs[0].token_ids
        )

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    plain = llm.generate("To be", SamplingParams(max_tokens=80, ignore_eos=True, **GREEDY))[0].outputs[0].token_ids
    penalised = SamplingParams(max_tokens=80, ignore_eos=True, frequency_penalty=2.0, repetition_penalty=1.5, **GREEDY)
    varied = llm.generate("To be", penalised)[0].outputs[0].token_ids
    assert len(set(varied)) > len(set(plain))


def test_logprobs_of_greedy_tokens_lead_their_alternatives(llm):
    out = llm.generate("To be", SamplingParams(max_tokens=5, logprobs=3, **GREEDY))[0].outputs[0]
    assert [e.token_id for e in out.logprobs] == out.token_ids
    for entry in out.logprobs:
        assert entry.rank == 1 and entry.top[0] == (entry.token_id, entry.logprob)
        assert len(entry.top) == 3 and 0 < math.fsum(math.exp(v) for _, v in entry.top) <= 1 + 1e-6


@pytest.mark.parametrize(
    "prompts,options,error,message",
    [
        ("", {}, RequestError, "the prompt is empty"),
        ([[]], {}, RequestError, "the prompt is empty"),
        ([[10**9]], {}, RequestError, r"prompt holds 1000000000, want token ids in 0\.\."),
        ([["a"]], {}, RequestError, r"a prompt is \['a'\], want text or a list of token ids"),
        ("a", {"max_thinking_tokens": 5}, RequestError, "max_thinking_tokens needs chat"),
        ([[5] * 5000], {}, RequestError, "the prompt has 5000 tokens, the context holds 1024"),
        (3.5, {}, RequestError, "prompts is float"),
        ("a", {"logit_bias": {10**6: 1}}, RequestError, "logit_bias or stop_token_ids holds 1000000"),
    ],
)
def test_bad_requests_leave_nothing_behind(llm, prompts, options, error, message):
    with pytest.raises(error, match=message):
        llm.generate(["fine", *prompts] if isinstance(prompts, list) else prompts, SamplingParams(**options))
    assert pool_is_free(llm)


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"model": "nowhere"}, CheckpointError, "no model 'nowhere'"),
        ({"device": "tpu"}, RequestError, "device='tpu', want 'auto', 'cpu' or 'cuda'"),
        ({"dtype": "int8"}, RequestError, "dtype='int8', want 'auto' or one of bfloat16"),
        ({"kv_dtype": "int4"}, RequestError, "kv_dtype='int4'"),
        ({"quantize": "int3"}, RequestError, "quantize='int3'"),
        ({"fp8_attention": True}, RequestError, "fp8_attention=True: 2 problems: the KV cache is bfloat16.*size is 64"),
        ({"max_num_seqs": 0}, RequestError, "max_num_seqs=0, want an integer >= 1"),
        ({"seed": "x", "max_model_len": 1.5}, RequestError, "2 problems: max_model_len=1.5.*seed='x'"),
        ({"max_model_len": 4096}, RequestError, r"max_model_len=4096, want 2\.\.1024"),
        ({"max_model_len": 1}, RequestError, r"max_model_len=1, want 2\.\.1024"),
        ({"tensor_parallel_size": 2}, RequestError, "tensor_parallel_size=2"),
        ({"generation_config": "maybe"}, RequestError, "generation_config='maybe'"),
    ],
)
def test_bad_engine_options(options, error, message):
    with pytest.raises(error, match=message):
        LLM(**{"model": "demo", "device": "cpu"} | options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_says_why():
    with pytest.raises(DeviceError, match="device='cuda' cannot run: .*; use device='cpu'"):
        LLM("demo", device="cuda")


@pytest.mark.parametrize(
    "options", [{"quantize": "fp8"}, {"dtype": "float32"}, {"kv_dtype": "fp8"}, {"dtype": "float16"}]
)
def test_other_types_still_write_english(options):
    with LLM("demo", device="cpu", **options) as llm:
        text = llm.generate("To be, or not to be", SamplingParams(max_tokens=40, **GREEDY))[0].text
    words = [w for w in "".join(c if c.isalpha() else " " for c in text.lower()).split() if len(w) > 1]
    corpus = set(
        "".join(c if c.isalpha() else " " for c in (demo_folder() / "held_out.txt").read_text().lower()).split()
    )
    assert len(words) >= 8 and sum(w in corpus for w in words) / len(words) >= 0.6, text


def test_defaults_of_the_checkpoint_are_used_said_once_and_can_be_turned_off(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(demo_folder(), folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.95, "eos_token_id": [9]}))
    with LLM(str(folder), device="cpu") as llm:
        assert llm.sampling_defaults == {"temperature": 0.6, "top_p": 0.95}
        assert 9 in llm.config.eos_token_ids
    assert capsys.readouterr().err.count("temperature=0.6, top_p=0.95") == 1
    with LLM(str(folder), device="cpu", generation_config="none") as llm:
        assert llm.sampling_defaults == {}
    assert "temperature" not in capsys.readouterr().err
    (folder / "generation_config.json").write_text(json.dumps({"temperature": -1}))
    with pytest.raises(CheckpointError, match="temperature=-1"):
        LLM(str(folder), device="cpu")
    LLM(str(folder), device="cpu", generation_config="none").close()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 999_999]}))
    with pytest.raises(CheckpointError, match=r"end-of-sequence ids \[999999\] .* vocab_size=1536"):
        LLM(str(folder), device="cpu")


def test_close_frees_the_weights():
    llm = LLM("demo", device="cpu")
    alive = weakref.ref(llm.engine.model.weights.embed)
    stream = llm.stream("a", SamplingParams(max_tokens=9))
    next(stream)
    llm.close()
    llm.close()
    gc.collect()
    assert alive() is None
    for use in (lambda: llm.generate("a"), lambda: list(stream)):
        with pytest.raises(RequestError, match="closed"):
            use()


def test_a_cache_that_does_not_fit_is_refused_with_numbers(monkeypatch):
    monkeypatch.setattr("nemotron_fast.llm.free_bytes", lambda device: 100_000)
    with pytest.raises(CapacityError, match="a context of 1024 tokens needs .* would fit: more with"):
        LLM("demo", device="cpu", max_model_len=1024)


def test_no_tokenizer_or_template_is_an_error_that_says_what_to_do(tmp_path):
    oracle.random_checkpoint(0, tmp_path, blocks=[(1, 256)])
    with LLM(str(tmp_path), device="cpu") as llm:
        assert len(llm.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids) == 4
        with pytest.raises(RequestError, match="no chat template; use generate"):
            llm.chat([{"role": "user", "content": "hi"}])
        with pytest.raises(RequestError, match="no tokenizer.json; give token ids"):
            llm.generate("text")


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_random_weights_from_a_bare_config(tmp_path, quantize):
    config = tmp_path / "some-config.json"
    shutil.copy(demo_folder() / "config.json", config)
    with LLM(str(config), device="cpu", random_weights=True, quantize=quantize) as llm:
        params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0, **GREEDY)
        out, again = (llm.generate([5, 6, 7], params)[0].outputs[0] for _ in range(2))
        assert out.token_ids == again.token_ids and all(math.isfinite(e.logprob) for e in out.logprobs)
    with pytest.raises(CheckpointError, match="no model"):
        LLM(str(config), device="cpu")


def test_truncated_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        LLM(str(tmp_path), device="cpu")


# ---- reasoning: a random model with the real vocabulary, whose answer is written by the test


@pytest.fixture(scope="module", params=["v1", "v1_5"])
def reasoner(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    oracle.random_checkpoint(
        0, folder, heads=1, head_dim=64, vocab=128_256, blocks=[(1, 256)], bos_token_id=128_000, eos_token_id=[128_009]
    )
    for file in llama3_tokenizer_folder().iterdir():
        shutil.copy(file, folder)
    shutil.copy(TEMPLATES / f"{request.param}.jinja", folder / "chat_template.jinja")
    with LLM(str(folder), device="cpu") as llm:
        yield request.param, llm


def dictate(llm: LLM, monkeypatch, text: str) -> None:
    """Let the next requests answer with `text` and end there."""
    ids = [*llm.tokenizer.encode(text, add_special_tokens=False), llm.tokenizer.token_id("<|eot_id|>")]
    add = llm.engine.add_request

    def add_request(*args, **kwargs):
        request = add(*args, **kwargs)
        request.forced.extend(ids)
        return request

    monkeypatch.setattr(llm.engine, "add_request", add_request)


ASK = [{"role": "user", "content": "What is 2 + 2?"}]


def test_thought_and_content_are_told_apart_also_while_streaming(reasoner, monkeypatch):
    _, llm = reasoner
    dictate(llm, monkeypatch, "<think>\nTwo and two is 4 🧮.\n</think>\n\nThe answer is **4**.")
    result = llm.chat(ASK, thinking=True)[0].outputs[0]
    assert (result.reasoning, result.content) == ("Two and two is 4 🧮.", "The answer is **4**.")
    assert (result.finish_reason, result.stop_reason) == ("stop", 128_009)
    assert result.text.startswith("<think>") and "<|eot_id|>" not in result.text
    deltas = list(llm.stream(ASK, thinking=True))
    assert "".join(d.reasoning for d in deltas) == result.reasoning
    assert "".join(d.content for d in deltas) == result.content
    assert all("think>" not in d.reasoning + d.content and "\ufffd" not in d.text for d in deltas)


def test_thinking_switch_reaches_the_prompt_and_the_sampling(reasoner, monkeypatch):
    name, llm = reasoner
    dictate(llm, monkeypatch, "4")
    seen = []
    add = llm.engine.add_request
    monkeypatch.setattr(llm.engine, "add_request", lambda ids, p, **k: seen.append(p) or add(ids, p, **k))
    on, off = (llm.chat(ASK, thinking=t)[0] for t in (True, False))
    assert [(p.temperature, p.top_p) for p in seen] == [(0.6, 0.95), (0.0, 1.0)]
    if name == "v1":
        assert "detailed thinking on" in on.prompt and "detailed thinking off" in off.prompt
    else:
        assert "/no_think" not in on.prompt + off.prompt
        assert off.prompt.endswith("<think>\n\n</think>\n\n") and "<think>" not in on.prompt
    for result in (on, off):
        assert result.prompt_token_ids.count(128_000) == 1, "one BOS"
        assert (result.outputs[0].content, result.outputs[0].reasoning) == ("4", "")


def test_thinking_budget_closes_the_thought(reasoner, monkeypatch):
    _, llm = reasoner
    dictate(llm, monkeypatch, "<think>")
    params = SamplingParams(max_tokens=60, max_thinking_tokens=10, ignore_eos=True, temperature=0)
    result = llm.chat(ASK, params, thinking=True)[0].outputs[0]
    assert result.text.count("</think>") == 1 and result.reasoning and result.content
    thought = llm.tokenizer.encode(
        result.text[len("<think>") : result.text.index("\n</think>")], add_special_tokens=False
    )
    assert 8 <= len(thought) <= 12  # ten tokens, up to how the random text re-tokenises
