# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, one step at a time, tokens out. It knows token ids only, no text."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import NoReturn

import torch

from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CapacityError, NumericsError, RequestError
from nemotron_fast.executor import Executor, Launch
from nemotron_fast.kv_cache import make_kv_cache
from nemotron_fast.metrics import Metrics, Recorder
from nemotron_fast.model import Model
from nemotron_fast.pages import PAGE_SIZE, pages_for
from nemotron_fast.request import Request
from nemotron_fast.sampling import NAN_TOKEN, prompt_logprobs
from nemotron_fast.sampling_params import SamplingParams
from nemotron_fast.scheduler import Scheduler
from nemotron_fast.weights import ModelWeights


@dataclass(frozen=True)
class EngineOptions:
    """Sizes and switches that are fixed for the engine's life."""

    max_model_len: int  # tokens of one sequence, prompt and output together
    num_pages: int  # of the KV cache
    max_num_seqs: int = 64  # sequences in one step
    max_batched_tokens: int = 512  # tokens in one step
    max_mixed_tokens: int | None = None  # tokens in a step that both decodes and computes prompts; None: as above
    prefix_caching: bool = True  # use pages of the KV cache again that hold the same tokens
    fp8_attention: bool = False  # attention of prompts with products of e4m3: an FP8 KV cache, head size 128
    deterministic: bool = False  # a token's bits depend on those before it alone, if steps have few tokens (see LLM)
    seed: int = 0
    overlap: bool = False  # launch a step before the tokens of the one before are known
    padded_decode: bool = False  # pad decode steps to a few sizes, which on a GPU are replayed as CUDA graphs
    debug: bool = False  # check the scheduler's invariants after every step


class Engine:
    """Owns the model, the KV cache and the scheduler."""

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, *, kv_dtype: torch.dtype, options: EngineOptions
    ) -> None:
        if options.num_pages < pages_for(options.max_model_len):
            raise CapacityError(
                f"the KV cache holds {options.num_pages * PAGE_SIZE} tokens, max_model_len={options.max_model_len} "
                "needs more; lower max_model_len or use an FP8 KV cache"
            )
        self.config, self.options = config, options
        self.device = weights.embed.device
        switches = {"fp8_attention": options.fp8_attention, "deterministic": options.deterministic}
        self.model = Model(config, weights, options.max_model_len, **switches)
        self.cache = make_kv_cache(config, options.num_pages, dtype=kv_dtype, device=self.device)
        self.executor = Executor(
            self.model,
            self.cache,
            max_num_seqs=options.max_num_seqs,
            max_tokens=options.max_batched_tokens,
            max_pages=pages_for(options.max_model_len),
            pad_decode=options.padded_decode,
        )
        self._in_flight: Launch | None = None
        self.scheduler = Scheduler(
            options.num_pages,
            max_num_seqs=options.max_num_seqs,
            max_batched_tokens=options.max_batched_tokens,
            max_mixed_tokens=options.max_mixed_tokens,
            prefix_caching=options.prefix_caching,
        )
        self._recorder = Recorder()
        self._next_id = 0

    def metrics(self) -> Metrics:
        """What the engine is doing, and how fast."""
        return self._recorder.snapshot(self.scheduler)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add_request(self, prompt: list[int], params: SamplingParams, *, sample_index: int = 0) -> Request:
        """Queue one sequence; `params` are resolved, `sample_index` tells the n samples of a prompt apart.

        Raises:
            RequestError: no tokens, ids outside the vocabulary, or no room for one new token.
        """
        self._check_ids(prompt, "prompt")
        self._check_ids([*params.logit_bias, *params.stop_token_ids], "logit_bias or stop_token_ids")
        room = self.options.max_model_len - len(prompt)
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, the context holds {self.options.max_model_len} "
                "including at least one new token; shorten it or raise max_model_len"
            )
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids.update(self.config.eos_token_ids)
        seed = self.options.seed + self._next_id if params.seed is None else params.seed + sample_index
        request = Request(
            id=self._next_id,
            prompt=list(prompt),
            params=params,
            seed=(seed + (1 << 63)) % (1 << 64) - (1 << 63),  # wraps like a 64-bit integer
            max_tokens=min(room, params.max_tokens or room),
            stop_ids=frozenset(stop_ids),
            prompt_logprobs=[None] if params.prompt_logprobs is not None else [],
        )
        self._next_id += 1
        self.scheduler.add(request)
        return request

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Launch a step and take in the tokens of the oldest one in flight; returns the requests that got a token.

        With overlap the two are not the same step: the host works on one while the device computes the other.
        """
        overlap = self.options.overlap and not any(r.needs_known_tokens for r in self.scheduler.running)
        done, self._in_flight = self._in_flight, None
        if done is None or overlap:
            chunks = self.scheduler.next()
            self._in_flight = self.executor.launch(chunks) if chunks else None
        if done is None and not overlap:
            done, self._in_flight = self._in_flight, None
        touched = [] if done is None else self._take_in(done)
        if self.options.debug:
            self.scheduler.check()
        return touched

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture the decode steps of all batch sizes, and load the kernels of prompts.

        Raises:
            RequestError: requests are running.
        """
        if self.has_work:
            raise RequestError("warm_up while requests are running; call it before the first one")
        if self._in_flight is not None:  # what it computes came too late
            self._in_flight.wait()
            self._in_flight = None
        self.executor.warm_up()

    def abort(self, request: Request) -> None:
        """End a request now, wherever it is; its pages are free afterwards. A finished one stays as it is."""
        if not request.is_finished:
            request.finish("abort")
            self.scheduler.remove(request)

    def stop_by_text(self, request: Request, stop: str) -> None:
        """End a request because its text holds a stop string."""
        if not request.is_finished:
            self.scheduler.remove(request)
        request.finish_by_text(stop)

    def _take_in(self, launch: Launch) -> list[Request]:
        tokens, logprobs = launch.wait()
        for request, token in zip(launch.sampled, tokens, strict=True):
            if token == NAN_TOKEN and not request.is_finished:
                self._give_up(request)
        self._record_prompt_logprobs(launch)
        touched = []
        for request, token, logprob in zip(launch.sampled, tokens, logprobs, strict=True):
            if request.forced:
                token = request.forced.popleft()
            if self.scheduler.receive(request, token):
                touched.append(request)
                if logprob is not None:
                    request.logprobs.append(dataclasses.replace(logprob, token_id=token))
        self._record_times(touched)
        return touched

    def _record_times(self, touched: list[Request]) -> None:
        now = time.perf_counter()
        for request in touched:
            if request.last_token_at is None:
                self._recorder.first_token(len(request.prompt), now - request.arrived_at)
            else:
                self._recorder.next_token(now - request.last_token_at)
            request.last_token_at = now
        self._recorder.step(now, len(touched), sum(r.is_finished for r in touched))

    def _give_up(self, culprit: Request) -> NoReturn:
        """Abort everything because a row of logits was not a number: what follows would be garbage."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.abort(request)
        self.scheduler.pages.forget_all()
        self._in_flight = None
        raise NumericsError(
            f"the logits of request {culprit.id} are NaN with {self.model.weights.embed.dtype} activations; "
            "try another dtype, and check the scales of a quantised checkpoint"
        )

    def _record_prompt_logprobs(self, launch: Launch) -> None:
        for rows in launch.prompt_rows:
            request = rows.request
            targets = request.prompt[rows.position : rows.position + rows.count]
            logits = launch.logits_RV[rows.row : rows.row + rows.count]
            request.prompt_logprobs += prompt_logprobs(logits, targets, request.params.prompt_logprobs)

    def _check_ids(self, ids: list[int], what: str) -> None:
        vocab = self.config.vocab_size
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab:
                raise RequestError(f"{what} holds {token!r}, want token ids in 0..{vocab - 1}")
