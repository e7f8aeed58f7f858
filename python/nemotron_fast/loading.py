# SPDX-License-Identifier: Apache-2.0
"""A model's name or folder -> everything the engine needs: config, tokenizer, defaults, weights."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from nemotron_fast.config import ModelConfig, read_config_json
from nemotron_fast.device import DTYPES, free_bytes, resolve_dtype
from nemotron_fast.dtypes import FP8, dtype_name
from nemotron_fast.errors import CapacityError, CheckpointError, Problems, RequestError
from nemotron_fast.footprint import weight_bytes
from nemotron_fast.generation_defaults import GenerationDefaults, read_generation_defaults
from nemotron_fast.models import resolve_model
from nemotron_fast.packed_weights import pack_weights
from nemotron_fast.progress import progress_bar
from nemotron_fast.quant_config import FP8_STATIC, MODELOPT_FP8, parse_quant_config, read_quant_config
from nemotron_fast.random_weights import random_weights
from nemotron_fast.tokenizer import Tokenizer
from nemotron_fast.weights import ModelWeights, load_weights

LONG_LOAD_BYTES = 1 << 30  # loads of more than this show a progress bar


@dataclass(frozen=True)
class LoadedModel:
    config: ModelConfig
    weights: ModelWeights
    tokenizer: Tokenizer | None  # None: the folder has no tokenizer.json
    defaults: GenerationDefaults
    dtype_name: str  # of the activations
    kv_dtype_name: str  # of the KV cache


def load_model(
    model: str,
    *,
    device: torch.device,
    dtype: str,
    quantize: str | None,
    kv_dtype: str = "auto",
    fp8_attention: bool = False,
    random: str | None = None,
    use_defaults: bool = True,
) -> LoadedModel:
    """Read a checkpoint; the small files first, so that what is wrong is known before the weights are touched.

    With `random`, which values of random_weights.py, the weights are random, in the types that the config or
    `quantize` names, and `model` may be a bare config.json. Without `use_defaults` only the end-of-sequence ids of
    generation_config.json count. `fp8_attention` is refused where it cannot be.

    Raises:
        CheckpointError, ConfigError, CapacityError, RequestError.
    """
    _check_quantize(quantize, random is not None)
    is_file = random is not None and Path(model).is_file()
    folder = Path(model).parent if is_file else resolve_model(model)
    config = ModelConfig.from_path(model if is_file else folder)
    torch_dtype = resolve_dtype(dtype, config.dtype, DTYPES, "dtype")
    quant = parse_quant_config(read_config_json(model)) if is_file else read_quant_config(folder)
    if quantize == FP8_STATIC:
        quant, quantize = MODELOPT_FP8, None
    defaults = GenerationDefaults() if is_file else read_generation_defaults(folder, sampling=use_defaults)
    has_text = not is_file and (folder / "tokenizer.json").exists()
    tokenizer = Tokenizer.from_folder(folder) if has_text else None
    eos = (*config.eos_token_ids, *defaults.eos_token_ids, *(tokenizer.eos_ids if tokenizer else ()))
    if foreign := sorted({i for i in eos if i >= config.vocab_size}):
        raise CheckpointError(
            f"end-of-sequence ids {foreign} of generation_config.json or the tokenizer are not below "
            f"vocab_size={config.vocab_size} of config.json; mend the files"
        )
    config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(eos)))
    activations = config.dtype if dtype == "auto" else dtype
    kv_name = dtype_name(kv_dtype, FP8 if quant is not None and quant.kv_cache_fp8 else activations, what="kv_dtype")
    if fp8_attention:
        _check_fp8_attention(config, kv_name)
    needed = weight_bytes(config, dtype=activations, quantize=quantize, quant=quant)
    _require_room(needed, device)
    if device.type == "cuda" and torch_dtype != torch.bfloat16:
        raise RequestError(f"dtype={activations!r} on a GPU, want 'bfloat16': the kernels compute in it")
    options = {"device": device, "dtype": torch_dtype, "quantize": quantize}
    if random is not None:
        weights = random_weights(config, quant, values=random, **options)
    else:
        with progress_bar("loading", needed, show=sys.stderr.isatty() and needed > LONG_LOAD_BYTES) as update:
            weights = load_weights(folder, config, quant, progress=lambda done, _: update(done, 0), **options)
    if device.type == "cuda":
        weights = pack_weights(weights)
        torch.cuda.empty_cache()  # what packing took is for the KV cache
    return LoadedModel(config, weights, tokenizer, defaults, activations, kv_name)


def _check_quantize(quantize: str | None, random: bool) -> None:
    if quantize not in (None, "fp8", FP8_STATIC):
        raise RequestError(f"quantize={quantize!r}, want 'fp8', '{FP8_STATIC}' (of random weights) or None")
    if quantize == FP8_STATIC and not random:
        raise RequestError(
            f"quantize='{FP8_STATIC}' is for random weights only, because static scales of activations need a "
            "calibration; give a checkpoint that NVIDIA ModelOpt has quantised, or use quantize='fp8'"
        )


def _check_fp8_attention(config: ModelConfig, kv_name: str) -> None:
    problems = Problems()
    problems.require(kv_name == FP8, f"the KV cache is {kv_name}, want FP8: use kv_dtype='fp8' or leave it off")
    problems.require(config.head_dim == 128, f"the head size is {config.head_dim}, want 128: leave it off")
    problems.raise_if_any(RequestError, "fp8_attention=True")


def _require_room(needed: int, device: torch.device) -> None:
    free = free_bytes(device)
    if needed > free:
        raise CapacityError(
            f"the weights need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on {device}; "
            "use quantize='fp8' or a machine with more memory"
        )
