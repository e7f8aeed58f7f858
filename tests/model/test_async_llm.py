# SPDX-License-Identifier: Apache-2.0
"""AsyncLLM, streams of many prompts, and the metrics, with the embedded demo model."""

import asyncio
import math

import pytest

from nemotron_fast import LLM, AsyncLLM, SamplingParams
from nemotron_fast.errors import NumericsError, RequestError

PROMPTS = ["To be, or not to be", "KING HENRY.\n", "O", "JULIET.\nWherefore art thou"]
GREEDY = SamplingParams(max_tokens=12, temperature=0)
LONG = SamplingParams(max_tokens=500, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def want():
    with LLM("demo", device="cpu") as llm:
        yield [r.outputs for r in llm.generate(PROMPTS, GREEDY)]


def run(body, **options):
    """Run `await body(llm)` with an AsyncLLM that must be idle in the end."""

    async def main():
        async with AsyncLLM("demo", device="cpu", **options) as llm:
            result = await asyncio.wait_for(body(llm), 60)
            while (now := llm.metrics()).running or now.waiting:
                await asyncio.sleep(0.01)
            assert now.pages_held == 0 and not llm._llm.text_engine.live
            return result

    return asyncio.run(main())


def test_long_prompts_hold_no_stream_up():
    async def body(llm):
        return llm._llm.engine.options.max_mixed_tokens

    assert run(body) == 224
    assert run(body, max_mixed_tokens=None) is None
    assert run(body, max_mixed_tokens=32) == 32


def test_many_at_once_equal_generate(want):
    async def body(llm):
        results = await asyncio.gather(*(llm.generate(p, GREEDY) for p in PROMPTS))
        assert llm.metrics().finished == len(PROMPTS)
        return [r.outputs for r in results]

    assert run(body) == want


def test_a_stream_gives_the_text_in_pieces(want):
    async def body(llm):
        deltas = [d async for d in llm.stream(PROMPTS[0], GREEDY)]
        assert len(deltas) == 12 and [d.result for d in deltas[:-1]] == [None] * 11
        assert "".join(d.text for d in deltas) == want[0][0].text
        return deltas[-1].result.outputs

    assert run(body) == want[0]


def test_leaving_a_stream_or_cancelling_its_task_aborts_the_request(want):
    async def body(llm):
        stream = llm.stream("To be", LONG)
        async for _ in stream:
            break
        await stream.aclose()
        task = asyncio.create_task(llm.generate("KING", LONG))
        other = asyncio.create_task(llm.generate(PROMPTS[0], GREEDY))
        while not llm.metrics().running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await other).outputs == want[0]
        return llm.metrics().finished

    assert run(body) == 1


def test_what_cannot_be_served_is_refused_and_the_rest_goes_on(want):
    async def body(llm):
        with pytest.raises(RequestError, match="the prompt is empty"):
            await llm.generate("")
        with pytest.raises(RequestError, match="want token ids in"):
            await llm.generate([10**9])
        return (await llm.generate(PROMPTS[0], GREEDY)).outputs

    assert run(body) == want[0]


def test_an_error_of_the_engine_reaches_every_caller():
    async def body(llm):
        model = llm._llm.engine.model
        forward = model.forward
        model.forward = lambda *a: forward(*a).fill_(math.nan)
        results = await asyncio.gather(*(llm.generate(p, GREEDY) for p in PROMPTS), return_exceptions=True)
        assert all(isinstance(r, NumericsError) for r in results)
        del model.forward
        await llm.generate("O", GREEDY)

    run(body)


def test_close_ends_the_streams():
    async def main():
        llm = AsyncLLM("demo", device="cpu")
        task = asyncio.create_task(llm.generate("To be", LONG))
        while not llm.metrics().running:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(llm.close)
        llm.close()
        with pytest.raises(RequestError, match="closed before the answer"):
            await task
        with pytest.raises(RequestError, match="closed; make a new one"):
            await llm.generate("To be")

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_closed_event_loop_leaves_nothing_behind():
    llm = AsyncLLM("demo", device="cpu")

    async def begin():
        stream = llm.stream("To be", LONG)
        await anext(stream)
        return stream  # open, while its loop ends

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(begin())
    loop.close()
    for _ in range(1000):
        if not llm.metrics().running:
            break
        asyncio.run(asyncio.sleep(0.01))
    assert llm.metrics().pages_held == 0
    del stream
    llm.close()


def test_stream_many_equals_generate(want):
    with LLM("demo", device="cpu") as llm:
        pieces: dict[int, str] = {}
        results = {}
        for index, delta in llm.stream_many(PROMPTS, GREEDY):
            pieces[index] = pieces.get(index, "") + delta.text
            if delta.result is not None:
                results[index] = delta.result
        assert [results[i].outputs for i in range(len(PROMPTS))] == want
        assert [pieces[i] for i in range(len(PROMPTS))] == [outputs[0].text for outputs in want]


def test_metrics_count_what_happened():
    with LLM("demo", device="cpu", max_num_seqs=3) as llm:
        empty = llm.metrics()
        assert empty.ttft.count == empty.finished == 0 and empty.tokens_per_s == 0
        prompt = list(range(100, 300))
        llm.generate([prompt] * 5, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), progress=False)
        done = llm.metrics()
        assert (done.running, done.waiting, done.finished, done.pages_held) == (0, 0, 5, 0)
        assert (done.prompt_tokens, done.generated_tokens) == (5 * 200, 5 * 8)
        assert done.prefix_hit_rate == pytest.approx(4 * 192 / (5 * 200)) and done.pages_cached == 3
        assert done.ttft.count == 5 and done.inter_token.count == 5 * 7
        assert 0 < done.inter_token.p50_s <= done.inter_token.p99_s and done.tokens_per_s > 0
        assert done.to_dict()["ttft"]["count"] == 5


def test_n_samples_share_the_pages_of_their_prompt():
    with LLM("demo", device="cpu") as llm:
        stream = llm.stream(list(range(100, 300)), SamplingParams(max_tokens=20, n=4, seed=1, temperature=1.0))
        next(stream)
        assert llm.metrics().pages_held == 3 + 4
        stream.close()


def test_a_thousand_prompts_keep_their_order():
    with LLM("demo", device="cpu", max_num_seqs=256) as llm:
        prompts = [[100 + i % 7, 200 + i] for i in range(1000)]
        results = llm.generate(prompts, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True), progress=False)
        assert [r.prompt_token_ids for r in results] == prompts


def test_each_prompt_may_have_its_own_params(want):
    with LLM("demo", device="cpu") as llm:
        params = [SamplingParams(max_tokens=n, temperature=0) for n in (2, 5, 1, 12)]
        results = llm.generate(PROMPTS, params)
        for result, own, outputs in zip(results, params, want, strict=True):
            assert result.outputs[0].token_ids == outputs[0].token_ids[: own.max_tokens]
        with pytest.raises(RequestError, match="params has 3 entries for 4 prompts"):
            llm.generate(PROMPTS, params[:3])
