# SPDX-License-Identifier: Apache-2.0
"""The whole model through the paged engine equals an independent FP64 forward, for any block list."""

import random

import oracle
import pytest
import torch

from nemotron_fast import SamplingParams
from nemotron_fast.config import ModelConfig
from nemotron_fast.engine import Engine, EngineOptions
from nemotron_fast.packed_weights import pack_weights
from nemotron_fast.quant_config import read_quant_config
from nemotron_fast.sampling_params import NEUTRAL
from nemotron_fast.weights import load_weights

GREEDY = SamplingParams(**NEUTRAL | {"temperature": 0.0}, max_tokens=6, ignore_eos=True, logprobs=20, prompt_logprobs=0)


def make_engine(folder, *, dtype=torch.float32, kv_dtype=None, quantize=None, **options) -> Engine:
    config = ModelConfig.from_path(folder)
    quant = read_quant_config(folder)
    weights = load_weights(folder, config, quant, device=torch.device("cpu"), dtype=dtype, quantize=quantize)
    sizes = {"max_model_len": 256, "num_pages": 32, "max_batched_tokens": 64, "debug": True} | options
    return Engine(config, weights, kv_dtype=kv_dtype or dtype, options=EngineOptions(**sizes))


def run(engine: Engine, prompts: list[list[int]], params=GREEDY):
    requests = [engine.add_request(p, params) for p in prompts]
    while engine.has_work:
        engine.step()
    engine.scheduler.check()
    assert engine.scheduler.pages.num_held == 0, "pages leaked"
    return requests


def check_against_oracle(config, weights, request, atol):
    """Every log-probability the engine reported, prompt and output, against the FP64 forward of the same tokens."""
    ids = request.prompt + request.output
    want = oracle.forward(config, weights, ids).log_softmax(-1)
    reported = [*request.prompt_logprobs, *request.logprobs]
    assert len(reported) == len(ids) and reported[0] is None
    for position, entry in enumerate(reported[1:], start=1):
        row = want[position - 1]
        assert entry.token_id == ids[position]
        assert abs(entry.logprob - row[ids[position]].item()) <= atol, position
        for token, logprob in entry.top:
            assert abs(logprob - row[token].item()) <= atol, position
    for position in range(len(request.prompt), len(ids)):  # greedy: the largest, or a tie within the tolerance
        row = want[position - 1]
        assert row.max() - row[ids[position]] <= 2 * atol


@pytest.mark.parametrize("seed", range(40))
def test_random_block_lists_equal_the_fp64_forward(seed, tmp_path):
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 3, 4, 8])
    head_dim = rng.choice([64, 80, 96, 128])
    config, weights = oracle.random_checkpoint(
        seed,
        tmp_path,
        heads=heads,
        head_dim=head_dim,
        dtype=rng.choice([torch.float32, torch.bfloat16]),
        shards=rng.choice([1, 3]),
        tie=rng.random() < 0.3,
    )
    engine = make_engine(tmp_path, max_batched_tokens=rng.choice([5, 64, 512]))
    prompts = [[rng.randrange(config["vocab_size"]) for _ in range(rng.randint(1, 90))] for _ in range(3)]
    for request in run(engine, prompts):
        check_against_oracle(config, weights, request, atol=2e-3)


def test_no_block_at_all_alive(tmp_path):
    config, weights = oracle.random_checkpoint(0, tmp_path, blocks=[(None, None)] * 3)
    for request in run(make_engine(tmp_path), [[1, 2, 3]]):
        check_against_oracle(config, weights, request, atol=2e-3)


@pytest.mark.parametrize("first", ["mixer", "ffn"])
def test_a_model_may_begin_with_either_part(first, tmp_path):
    blocks = [(2, None), (None, 256)] if first == "mixer" else [(None, 256), (2, None)]
    config, weights = oracle.random_checkpoint(1, tmp_path, blocks=blocks)
    for request in run(make_engine(tmp_path), [[5, 6, 7, 8]]):
        check_against_oracle(config, weights, request, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_alone_batched_chunked_preempted_and_cached_give_the_same_tokens(seed, tmp_path):
    oracle.random_checkpoint(seed, tmp_path, blocks=[(None, 256), (2, 512), ("linear", None), (1, 256)])
    rng = random.Random(seed)
    prompts = [[rng.randrange(320) for _ in range(rng.randint(40, 70))] for _ in range(3)]
    prompts.append((prompts[0] * 2)[:75])  # begins like the first
    params = SamplingParams(**NEUTRAL | {"temperature": 0.8}, max_tokens=40, ignore_eos=True, seed=11)
    alone = [run(make_engine(tmp_path), [p], params)[0].output for p in prompts]
    for options in ({}, {"max_batched_tokens": 9}, {"num_pages": 4}, {"max_num_seqs": 2}):
        together = run(
            make_engine(tmp_path, max_model_len=128, **options)
            if "num_pages" in options
            else make_engine(tmp_path, **options),
            prompts,
            params,
        )
        assert [r.output for r in together] == alone, options
    cached = make_engine(tmp_path)
    for _ in range(2):
        assert [r.output for r in run(cached, prompts, params)] == alone
    assert cached.scheduler.num_found > 0


@pytest.mark.parametrize("kv_dtype,atol", [(torch.bfloat16, 0.05), (torch.float8_e4m3fn, 0.5)])
def test_kv_types_stay_near_the_fp64_forward(kv_dtype, atol, tmp_path):
    config, weights = oracle.random_checkpoint(3, tmp_path, blocks=[(2, 256), (1, 256)])
    engine = make_engine(tmp_path, kv_dtype=kv_dtype)
    assert {t.dtype for t in engine.cache.keys} == {kv_dtype}
    for request in run(engine, [list(range(70))]):
        check_against_oracle(config, weights, request, atol)


def test_fp8_weights_equal_the_fp64_forward_of_the_same_roundings(tmp_path):
    """FP32 against FP64 sums can push an activation over an e4m3 border, and attention spreads that: so every seed is
    near, and where no border is crossed the two agree to the last digits. A wrong scale or order never would."""
    worst = []
    for seed in (4, 5, 8):
        folder = tmp_path / str(seed)
        blocks = [(2, 512), ("linear", 256), (None, "linear")]
        config, weights = oracle.random_checkpoint(seed, folder, blocks=blocks)
        engine = make_engine(folder, quantize="fp8")
        assert engine.model.weights.sub_blocks[0].qkv.weight.dtype == torch.float8_e4m3fn
        (request,) = run(engine, [list(range(40))])
        ids = request.prompt + request.output
        want = oracle.forward(config, weights, ids, oracle.fp8_product).log_softmax(-1)
        entries = [*request.prompt_logprobs, *request.logprobs]
        worst.append(max(abs(e.logprob - want[i - 1][ids[i]].item()) for i, e in enumerate(entries) if i))
    assert max(worst) <= 0.4 and min(worst) <= 1e-4, worst


def test_bf16_activations_stay_near_the_fp64_forward(tmp_path):
    config, weights = oracle.random_checkpoint(5, tmp_path, blocks=[(4, 256), (None, 512), (1, 256)])
    for request in run(make_engine(tmp_path, dtype=torch.bfloat16), [list(range(50))]):
        check_against_oracle(config, weights, request, atol=0.2)


def test_kv_cache_is_only_where_attention_is(tmp_path):
    oracle.random_checkpoint(6, tmp_path, blocks=[(None, 256), (4, None), ("linear", 256), (1, 256)], head_dim=64)
    engine = make_engine(tmp_path, num_pages=8)
    assert [tuple(t.shape) for t in engine.cache.keys] == [(8, 4, 64, 64), (8, 1, 64, 64)]
    assert engine.cache.nbytes == 2 * 8 * 64 * (4 + 1) * 64 * 4


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_packed_weights_compute_the_same(quantize, tmp_path):
    """The path of the GPU, on the CPU backend of the packed ops: 300 prompt tokens are more than one launch takes."""
    oracle.random_checkpoint(7, tmp_path, blocks=[(2, 512), ("linear", 256), (None, "linear"), (1, 256)])
    options = {"dtype": torch.bfloat16, "quantize": quantize, "max_model_len": 400, "max_batched_tokens": 400}
    plain, packed = make_engine(tmp_path, **options), make_engine(tmp_path, **options)
    packed.model.weights = pack_weights(packed.model.weights)
    prompt = [i % 320 for i in range(300)]
    want, found = (run(engine, [prompt])[0] for engine in (plain, packed))
    for a, b in zip(found.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True):
        assert abs(a.logprob - b.logprob) <= 0.1
