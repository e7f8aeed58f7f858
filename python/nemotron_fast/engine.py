# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, one step at a time, tokens out. It knows token ids only, no text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemotron_fast.batch import Batch, build_batch
from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CapacityError, RequestError
from nemotron_fast.kv_cache import make_kv_cache
from nemotron_fast.model import Model
from nemotron_fast.pages import PAGE_SIZE, pages_for
from nemotron_fast.request import Request
from nemotron_fast.sampling import sample_tokens, token_logprobs
from nemotron_fast.sampling_params import SamplingParams
from nemotron_fast.scheduler import Scheduler
from nemotron_fast.weights import ModelWeights


@dataclass(frozen=True)
class EngineOptions:
    """Sizes that are fixed for the engine's life."""

    max_model_len: int  # tokens of one sequence, prompt and output together
    num_pages: int  # of the KV cache
    max_num_seqs: int = 64  # sequences in one step
    max_batched_tokens: int = 512  # tokens in one step
    seed: int = 0


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
        self.model = Model(config, weights, options.max_model_len)
        self.cache = make_kv_cache(config, options.num_pages, dtype=kv_dtype, device=self.device)
        self.scheduler = Scheduler(
            options.num_pages, max_num_seqs=options.max_num_seqs, max_batched_tokens=options.max_batched_tokens
        )
        self._next_id = 0

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
        """Run one step; returns the requests that got a token."""
        chunks = self.scheduler.next()
        if not chunks:
            return []
        batch = build_batch(chunks, self.device)
        logits_RV = self.model.forward(batch, self.cache)
        self._record_prompt_logprobs(batch, logits_RV)
        tokens, logprobs = sample_tokens(logits_RV[: len(batch.sampled)], batch.sampled)
        for request, token, logprob in zip(batch.sampled, tokens, logprobs, strict=True):
            if logprob is not None:
                request.logprobs.append(logprob)
            request.append(token)
        self.scheduler.commit(chunks)
        return batch.sampled

    def abort(self, request: Request, reason: str = "abort", stop_reason: str | None = None) -> None:
        """End a request now, wherever it is; its pages are free afterwards."""
        if not request.is_finished:
            request.finish(reason, stop_reason)
            self.scheduler.remove(request)

    def _record_prompt_logprobs(self, batch: Batch, logits_RV: torch.Tensor) -> None:
        for rows in batch.prompt_rows:
            request = rows.request
            targets = request.prompt[rows.position : rows.position + rows.count]
            logits = logits_RV[rows.row : rows.row + rows.count]
            request.prompt_logprobs += token_logprobs(logits, targets, [request.params.prompt_logprobs] * rows.count)

    def _check_ids(self, ids: list[int], what: str) -> None:
        vocab = self.config.vocab_size
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab:
                raise RequestError(f"{what} holds {token!r}, want token ids in 0..{vocab - 1}")
