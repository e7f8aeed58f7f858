# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, one step at a time, tokens out. It knows token ids only, no text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemotron_fast.batch import Batch, build_batch
from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CapacityError, NumericsError, RequestError
from nemotron_fast.graphs import DecodeGraphs
from nemotron_fast.kv_cache import make_kv_cache
from nemotron_fast.model import Model
from nemotron_fast.pages import PAGE_SIZE, pages_for
from nemotron_fast.request import Request
from nemotron_fast.sampling import NAN_TOKEN, sample_tokens, token_logprobs
from nemotron_fast.sampling_params import SamplingParams
from nemotron_fast.scheduler import Chunk, Scheduler
from nemotron_fast.weights import ModelWeights


@dataclass(frozen=True)
class EngineOptions:
    """Sizes that are fixed for the engine's life."""

    max_model_len: int  # tokens of one sequence, prompt and output together
    num_pages: int  # of the KV cache
    max_num_seqs: int = 64  # sequences in one step
    max_batched_tokens: int = 512  # tokens in one step
    seed: int = 0
    cuda_graphs: bool = True  # on a GPU, replay decode steps as CUDA graphs


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
        use_graphs = self.device.type == "cuda" and options.cuda_graphs
        scratch_page = options.num_pages  # one page beyond those of the requests, for padded rows
        self.cache = make_kv_cache(config, options.num_pages + use_graphs, dtype=kv_dtype, device=self.device)
        self._graphs = None
        if use_graphs:
            self._graphs = DecodeGraphs(
                self.model,
                self.cache,
                max_num_seqs=options.max_num_seqs,
                max_pages=pages_for(options.max_model_len),
                scratch_page=scratch_page,
            )
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
        sampled, logits_SV = self._forward(chunks)
        tokens, logprobs = sample_tokens(logits_SV, sampled)
        self._refuse_nan(sampled, tokens)
        for request, token, logprob in zip(sampled, tokens, logprobs, strict=True):
            if logprob is not None:
                request.logprobs.append(logprob)
            request.append(token)
        self.scheduler.commit(chunks)
        return sampled

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

    def _refuse_nan(self, sampled: list[Request], tokens: list[int]) -> None:
        """Abort everything if a row of logits was not a number: what follows would be garbage."""
        if NAN_TOKEN not in tokens:
            return
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.abort(request)
        number = sampled[tokens.index(NAN_TOKEN)].id
        raise NumericsError(
            f"the logits of request {number} are NaN with {self.model.weights.embed.dtype} activations; "
            "try another dtype, and check the scales of a quantised checkpoint"
        )

    def _forward(self, chunks: list[Chunk]) -> tuple[list[Request], torch.Tensor]:
        """The requests that get a token from this step, and their logits [S, V]."""
        if self._graphs is not None and DecodeGraphs.covers(chunks):
            return [c.request for c in chunks], self._graphs.forward(chunks)
        batch = build_batch(chunks, self.device)
        logits_RV = self.model.forward(batch, self.cache)
        self._record_prompt_logprobs(batch, logits_RV)
        return batch.sampled, logits_RV[: len(batch.sampled)]

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
