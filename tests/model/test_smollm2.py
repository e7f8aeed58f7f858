# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct, a real model from a public package: the same tokens as `transformers`, as fast."""

import statistics
import time

import pytest
import torch
from company import assert_same_bits_in_any_company
from near_ties import assert_same_but_for_near_ties
from smollm2 import smollm2_folder

from nemotron_fast import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "Water boils at",
    "In 1969, the first humans",
    "A recipe for pancakes: mix flour,",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    "import numpy as np\n\ndef softmax(x):",
    "Shakespeare wrote",
    "To sort a list in Python, you can",
    "The largest planet in the solar system is",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "The difference between a virus and a bacterium is",
    "Q: What is the boiling point of nitrogen?\nA:",
    "Il était une fois",
    "<html>\n<head>\n<title>",
    "Three reasons to learn to play the piano are:",
]
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def folder():
    return smollm2_folder()


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(str(folder), device="cpu", max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="module")
def peer(folder):
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # go on to the given number of tokens
    return model


def peer_greedy(peer, ids: list[int], n: int) -> list[int]:
    with torch.inference_mode():
        mask = torch.ones(1, len(ids))
        out = peer.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=n, do_sample=False)
    return out[0, len(ids) :].tolist()


def test_greedy_tokens_equal_transformers(llm, peer):
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    for prompt, result in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        found = result.outputs[0].token_ids
        assert len(found) == NUM_TOKENS
        assert found == peer_greedy(peer, result.prompt_token_ids, NUM_TOKENS), prompt


@pytest.mark.gpu
def test_greedy_tokens_on_a_gpu_equal_the_cpu_backend(llm, folder):
    """BF16 there, FP32 here: sequences may part where two tokens are nearly tied."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, logprobs=5)
    with LLM(str(folder), device="cuda", dtype="bfloat16", max_model_len=512) as gpu:
        found = [r.outputs[0] for r in gpu.generate(PROMPTS, params)]
    want = [r.outputs[0] for r in llm.generate(PROMPTS, params)]
    for mine, theirs in zip(found, want, strict=True):
        assert_same_but_for_near_ties(mine, theirs)
    num_equal = sum(mine.token_ids == theirs.token_ids for mine, theirs in zip(found, want, strict=True))
    print(f"{num_equal} of {len(PROMPTS)} prompts have all {NUM_TOKENS} tokens equal")
    assert num_equal >= len(PROMPTS) // 4


@pytest.mark.parametrize(
    "device, num_others, most_tokens", [("cpu", 1, 4), pytest.param("cuda", len(PROMPTS), 200, marks=pytest.mark.gpu)]
)
def test_deterministic_has_the_same_bits_in_any_company(device, num_others, most_tokens, folder, monkeypatch):
    options = {"model": str(folder), "device": device, "dtype": "bfloat16"}
    prompt, others = " ".join(PROMPTS[:10]), PROMPTS[:num_others]
    assert_same_bits_in_any_company(options, prompt, others, monkeypatch, most_tokens=most_tokens)


def test_a_prompt_of_the_cache_in_a_batch_gives_the_tokens_of_one_alone(llm, folder):
    ids = llm.tokenizer.encode(" ".join(PROMPTS))[:300]
    prompts = [ids, [*ids[:150], *ids[:30]], ids[40:], ids]
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, n=2)
    options = {"device": "cpu", "max_model_len": 512, "max_batched_tokens": 70, "prefix_caching": False}
    with LLM(str(folder), **options) as plain:
        want = [plain.generate(p, params)[0].outputs for p in prompts]
    for _ in range(2):
        assert [r.outputs for r in llm.generate(prompts, params)] == want
    assert llm.metrics().prefix_hit_rate > 0.5


def test_logits_equal_transformers(llm, peer):
    ids = llm.tokenizer.encode(" ".join(PROMPTS))[:400]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    reported = llm.generate(ids, params)[0].prompt_logprobs
    with torch.inference_mode():
        want = peer(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    for position, entry in enumerate(reported[1:], start=1):
        assert entry.logprob == pytest.approx(want[position - 1, ids[position]].item(), abs=2e-3)


def test_chat_template_answers_correctly(llm, folder):
    import transformers

    messages = [{"role": "user", "content": "Complete this sentence: The capital of France is"}]
    result = llm.chat(messages, SamplingParams(max_tokens=24, temperature=0))[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    want = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    assert result.prompt_token_ids == want
    assert "Paris" in result.text
    assert result.outputs[0].finish_reason == "stop" and "<|im_end|>" not in result.text


def test_decode_is_about_as_fast_as_transformers(llm, peer):
    """Tokens per second of decoding one sequence, medians of interleaved runs with the same threads."""
    ids = llm.tokenizer.encode(PROMPTS[1])
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)

    def timed(run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    pairs = []
    for i in range(6):
        ours = timed(lambda: llm.generate(ids, params))
        theirs = timed(lambda: peer_greedy(peer, ids, NUM_TOKENS))
        if i:  # the first pair warms up
            pairs.append((ours, theirs))
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    print(f"{NUM_TOKENS / statistics.median(o for o, _ in pairs):.1f} tokens/s, {ratio:.2f} x transformers")
    assert ratio >= 0.7
