# SPDX-License-Identifier: Apache-2.0
"""Options of the commands that run a model, and what they turn into: an LLM and SamplingParams."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nemotron_fast.dtypes import DTYPE_BYTES, FLOAT_BYTES, FP8
from nemotron_fast.quant_config import FP8_STATIC

if TYPE_CHECKING:
    from nemotron_fast.llm import LLM
    from nemotron_fast.sampling_params import SamplingParams

THINKING = {"on": True, "off": False, "auto": None}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=True, metavar="M", help="checkpoint folder, or 'demo' for the embedded model"
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: a GPU whose kernels are proven, else the CPU",
    )
    group.add_argument(
        "--dtype", choices=("auto", *FLOAT_BYTES), default="auto", help="of the activations (default: the checkpoint's)"
    )
    group.add_argument(
        "--quantize",
        choices=(FP8, FP8_STATIC),
        help="quantise the linears while loading; fp8-static: random weights in the layout of NVIDIA's FP8 checkpoints",
    )
    group.add_argument("--kv-dtype", choices=("auto", *DTYPE_BYTES), default="auto", help="of the KV cache")
    group.add_argument(
        "--fp8-attention",
        action="store_true",
        help="attention of prompts with products of e4m3; wants an FP8 KV cache and head size 128",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits whatever runs beside a request; prompts are slower, on a CPU all runs token by token",
    )
    group.add_argument("--max-model-len", metavar="N", type=int, help="tokens of one sequence (default: what fits)")
    group.add_argument("--max-num-seqs", metavar="N", type=int, help="sequences at once; the KV cache is for so many")
    group.add_argument("--seed", metavar="N", type=int, default=0, help="base of all random seeds (default 0)")
    group.add_argument(
        "--random-weights",
        nargs="?",
        choices=("normal", "dummy"),
        const="normal",
        default=False,
        help="random numbers as weights (dummy: as vLLM's --load-format dummy makes them, nearly all zero in FP8); "
        "--model may be a bare config.json",
    )
    group.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="use the sampling defaults of the checkpoint's generation_config.json, or none",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    group = parser.add_argument_group("sampling")
    shown = "the room left in the context" if max_tokens is None else max_tokens
    group.add_argument(
        "--max-tokens", metavar="N", type=int, default=max_tokens, help=f"tokens to generate at most (default: {shown})"
    )
    group.add_argument("--temperature", metavar="T", type=float, help="0 = greedy")
    group.add_argument("--top-p", metavar="P", type=float, help="1 = off")
    group.add_argument("--top-k", metavar="K", type=int, help="0 = off")
    group.add_argument("--min-p", metavar="P", type=float, help="0 = off")
    group.add_argument("--presence-penalty", metavar="X", type=float, default=0.0)
    group.add_argument("--frequency-penalty", metavar="X", type=float, default=0.0)
    group.add_argument("--repetition-penalty", metavar="X", type=float, help="1 = off")
    group.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end at this text; may be repeated")
    group.add_argument(
        "--max-thinking-tokens",
        metavar="N",
        type=int,
        help="end the reasoning after so many tokens and go on to the answer",
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")


def load_llm(args: argparse.Namespace, **more: Any) -> LLM:
    """The model that the options of `add_model_arguments` name, with `more`; use it in a `with` statement."""
    from nemotron_fast.llm import LLM

    given = {} if args.max_num_seqs is None else {"max_num_seqs": args.max_num_seqs}  # else the default of LLM
    return LLM(
        args.model,
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
        kv_dtype=args.kv_dtype,
        fp8_attention=args.fp8_attention,
        deterministic=args.deterministic,
        max_model_len=args.max_model_len,
        seed=args.seed,
        generation_config=args.generation_config,
        random_weights=args.random_weights,
        **given,
        **more,
    )


def sampling_params(args: argparse.Namespace, **more: Any) -> SamplingParams:
    """The options of `add_sampling_arguments`, checked before a model is loaded.

    Raises:
        RequestError: a value out of range.
    """
    from nemotron_fast.sampling_params import SamplingParams

    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
        max_thinking_tokens=args.max_thinking_tokens,
        **more,
    )
