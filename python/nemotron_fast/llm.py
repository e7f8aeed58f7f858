# SPDX-License-Identifier: Apache-2.0
"""LLM: the Python API. A checkpoint folder in, text out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from nemotron_fast.cache_size import size_cache
from nemotron_fast.conversation import Conversation, prepare_chat
from nemotron_fast.device import KV_DTYPES, free_bytes, resolve_device
from nemotron_fast.engine import Engine, EngineOptions
from nemotron_fast.errors import Problems, RequestError
from nemotron_fast.footprint import workspace_bytes
from nemotron_fast.loading import load_model
from nemotron_fast.metrics import Metrics
from nemotron_fast.outputs import Delta, Result
from nemotron_fast.progress import progress_bar
from nemotron_fast.prompts import Message, Prompt, as_list, per_prompt, token_ids
from nemotron_fast.random_weights import NORMAL
from nemotron_fast.sampling_params import SamplingParams
from nemotron_fast.sequence_text import make_result
from nemotron_fast.step_size import check_deterministic, step_tokens
from nemotron_fast.text_engine import TextEngine, drain, is_drained

GPU_KV_SHARE, CPU_KV_SHARE = 0.9, 0.5  # of the memory left by weights and workspace, at most, for the KV cache


class LLM:
    """A loaded model and its engine.

    Args:
        model: a checkpoint folder, or "demo" for the model inside the package.
        device: "auto" (a GPU whose kernels are proven, else the CPU), "cpu" or "cuda".
        dtype: type of the activations and unquantised weights; "auto" = the checkpoint's.
        quantize: "fp8" quantises the linears of a BF16, FP16 or FP32 checkpoint while loading; "fp8-static" gives
            random weights the layout of NVIDIA's FP8 checkpoints, static scales of activations among it.
        kv_dtype: type of the KV cache; "auto" = FP8 if the checkpoint says so, else `dtype`.
        fp8_attention: compute the attention of prompts (sequences with more than 8 new tokens in a step) with products
            of e4m3, for which queries and softmax weights are rounded; wants an FP8 KV cache and head size 128.
        deterministic: compute a token with the same bits whatever runs beside it, in whatever chunks its prompt comes,
            behind a cached beginning and after a preemption: on a GPU in steps of at most 64 tokens, each query by
            itself, which makes prompts slower; on a CPU token by token.
        max_model_len: tokens of one sequence; None = what the model and the memory allow.
        max_num_seqs: sequences in one step.
        max_batched_tokens: tokens of one step, prompts and decoding together; None = 2048 on a GPU, 512 on a
            CPU, and if deterministic 64 and 1.
        max_mixed_tokens: the same for steps in which some decode, fewer where a prompt is long, which bounds the
            time between their tokens; None = no other bound: who waits for all results is served best by full
            steps, and of requests that generate equally many tokens more than max_num_seqs may start and take
            turns.
        prefix_caching: keep the KV of finished requests, and share it with those that begin alike.
        seed: base of the seeds of requests that bring none.
        tensor_parallel_size: only 1 is supported so far.
        generation_config: "auto" uses the checkpoint's sampling defaults and says so once on stderr; "none" does not.
        cuda_graphs: replay decode steps as CUDA graphs, on a GPU.
        random_weights: random numbers in place of the checkpoint's weights; `model` may be a bare config.json, whose
            quantization_config counts. True or "normal": as a checkpoint's; "dummy": as vLLM's `--load-format dummy`
            makes them, nearly all zero in FP8, for comparisons with its figures.

    Raises:
        ConfigError, CheckpointError, CapacityError, DeviceError, RequestError: see nemotron_fast.errors.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        kv_dtype: str = "auto",
        fp8_attention: bool = False,
        deterministic: bool = False,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_batched_tokens: int | None = None,
        max_mixed_tokens: int | None = None,
        prefix_caching: bool = True,
        seed: int = 0,
        tensor_parallel_size: int = 1,
        generation_config: str = "auto",
        random_weights: bool | str = False,
        cuda_graphs: bool = True,
    ) -> None:
        _check_arguments(
            tensor_parallel_size,
            generation_config,
            max_model_len=max_model_len,
            max_batched_tokens=max_batched_tokens,
            max_mixed_tokens=max_mixed_tokens,
            max_num_seqs=max_num_seqs,
            seed=seed,
        )
        where = resolve_device(device)
        on_gpu = where.type == "cuda"
        batched_tokens = step_tokens(max_batched_tokens, on_gpu=on_gpu, deterministic=deterministic)
        if deterministic:
            check_deterministic(batched_tokens, max_num_seqs, on_gpu=on_gpu, fp8_attention=fp8_attention)
        loaded = load_model(
            model,
            device=where,
            dtype=dtype,
            quantize=quantize,
            kv_dtype=kv_dtype,
            fp8_attention=fp8_attention,
            random=NORMAL if random_weights is True else random_weights or None,
            use_defaults=generation_config == "auto",
        )
        config = loaded.config
        share = GPU_KV_SHARE if on_gpu else CPU_KV_SHARE
        workspace = workspace_bytes(config, num_tokens=batched_tokens, num_seqs=max_num_seqs, dtype=loaded.dtype_name)
        budget = max(int((free_bytes(where) - sum(workspace.values())) * share), 0)
        length, num_pages = size_cache(config, loaded.kv_dtype_name, max_model_len, max_num_seqs, budget)
        options = EngineOptions(
            max_model_len=length,
            num_pages=num_pages,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=batched_tokens,
            max_mixed_tokens=max_mixed_tokens,
            prefix_caching=prefix_caching,
            fp8_attention=fp8_attention,
            deterministic=deterministic,
            seed=seed,
            overlap=on_gpu,
            padded_decode=on_gpu and cuda_graphs,
        )
        self.config = config
        self.tokenizer = loaded.tokenizer
        self.max_model_len = length
        self.device = where
        self.sampling_defaults = loaded.defaults.sampling
        engine = Engine(config, loaded.weights, kv_dtype=KV_DTYPES[loaded.kv_dtype_name], options=options)
        self.text_engine = TextEngine(engine, self.tokenizer, self.sampling_defaults)
        if self.sampling_defaults:
            values = ", ".join(f"{k}={v}" for k, v in self.sampling_defaults.items())
            print(
                f"nemotron_fast: generation_config.json says {values} (generation_config='none' ignores them)",
                file=sys.stderr,
            )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Result]:
        """Complete each prompt (text or token ids); results come in the order of the prompts.

        `params` are for all prompts, or a list with those of each. `progress` shows a bar on stderr; None = only for
        several prompts on a terminal.

        Raises:
            RequestError: a prompt or parameter that cannot be served; nothing has run then.
        """
        conversations = [self._plain(p) for p in as_list(prompts)]
        return self._run(conversations, per_prompt(params, len(conversations)), progress)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        params: SamplingParams | None = None,
        *,
        thinking: bool | None = None,
        progress: bool | None = None,
    ) -> list[Result]:
        """Answer one conversation, or several; a message has "role" and "content".

        `thinking` switches the reasoning of models that have the switch; None = the model's own default.
        """
        several = bool(messages) and isinstance(messages[0], list)
        conversations = [prepare_chat(self.tokenizer, m, thinking) for m in (messages if several else [messages])]
        return self._run(conversations, per_prompt(params, len(conversations)), progress)

    def stream(
        self,
        prompt: Prompt | list[Message],
        params: SamplingParams | None = None,
        *,
        thinking: bool | None = None,
    ) -> Iterator[Delta]:
        """Like generate (or chat, for messages) of one prompt, piece by piece; closing the iterator cancels it.

        The request is queued when the first delta is asked for. The last delta carries the whole result.
        """
        conversation = self.prepare(prompt, thinking)
        return (delta for _, delta in self._deltas([conversation], per_prompt(params, 1)))

    def stream_many(
        self,
        prompts: Sequence[Prompt | list[Message]],
        params: SamplingParams | None = None,
        *,
        thinking: bool | None = None,
    ) -> Iterator[tuple[int, Delta]]:
        """Like stream of several prompts at once: (number of the prompt, delta), as they come."""
        conversations = [self.prepare(p, thinking) for p in prompts]
        return self._deltas(conversations, per_prompt(params, len(conversations)))

    def prepare(self, prompt: Prompt | list[Message], thinking: bool | None = None) -> Conversation:
        """The token ids of text, of token ids, or of messages through the chat template.

        Raises:
            RequestError: it cannot be served.
        """
        is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        return prepare_chat(self.tokenizer, prompt, thinking) if is_chat else self._plain(prompt)

    def warm_up(self) -> None:
        """Do now what the first steps of each size would have to: on a GPU, capture graphs and load kernels."""
        self.engine.warm_up()

    def metrics(self) -> Metrics:
        """What the engine is doing, and how fast."""
        return self.engine.metrics()

    @property
    def engine(self) -> Engine:
        return self.text_engine.engine

    def close(self) -> None:
        """Free the weights and the cache; the object cannot be used afterwards. Closing twice is harmless."""
        self.text_engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plain(self, prompt: Prompt) -> Conversation:
        if not isinstance(prompt, str):
            return Conversation(None, token_ids(prompt))
        if not prompt:
            raise RequestError("the prompt is empty; give at least one character")
        if self.tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer.json; give token ids instead of text")
        return Conversation(prompt, self.tokenizer.encode(prompt))

    def _run(
        self, conversations: list[Conversation], params: list[SamplingParams], progress: bool | None
    ) -> list[Result]:
        text = self.text_engine
        groups = text.start(conversations, params, streamed=False)
        pending = {s.request for group in groups for s in group}
        total = len(pending)
        show = progress if progress is not None else len(groups) > 1 and sys.stderr.isatty()
        try:
            with progress_bar("generating", total, unit="sequences", show=show) as bar:
                while pending:
                    touched = text.step()
                    pending.difference_update(r for r in touched if r.is_finished)
                    bar(total - len(pending), len(touched))
        finally:
            text.cancel(groups)
        return [make_result(c, group) for c, group in zip(conversations, groups, strict=True)]

    def _deltas(self, conversations: list[Conversation], params: list[SamplingParams]) -> Iterator[tuple[int, Delta]]:
        text = self.text_engine
        groups = text.start(conversations, params)
        live = dict(enumerate(groups))
        try:
            while live:
                for index, group in [*live.items()]:
                    for delta in drain(conversations[index], group):
                        yield index, delta
                    if is_drained(group):
                        del live[index]
                if live:
                    text.step()
        finally:
            text.cancel(groups)


def _check_arguments(tensor_parallel_size: int, generation_config: str, **integers: int | None) -> None:
    problems = Problems()
    problems.require(
        tensor_parallel_size == 1, f"tensor_parallel_size={tensor_parallel_size} is not supported yet, want 1"
    )
    problems.require(
        generation_config in ("auto", "none"), f"generation_config={generation_config!r}, want 'auto' or 'none'"
    )
    for name, value in integers.items():
        low = None if name == "seed" else 1
        ok = type(value) is int and (low is None or value >= low)
        ok |= value is None and name not in ("max_num_seqs", "seed")
        problems.require(ok, f"{name}={value!r}, want an integer" + f" >= {low}" * (low is not None))
    problems.raise_if_any(RequestError, "LLM")
