# SPDX-License-Identifier: Apache-2.0
"""The residual stream whose linears read and leave statistics of rows computes what the plain one does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import oracle
import pytest
import torch
from torch import Tensor

from nemotron_fast.batch import Batch
from nemotron_fast.config import ModelConfig
from nemotron_fast.kv_cache import make_kv_cache
from nemotron_fast.model import Model
from nemotron_fast.packed_weights import PackedWeight, pack_weights
from nemotron_fast.quant_config import read_quant_config
from nemotron_fast.weights import ModelWeights, load_weights

EVERY_KIND = [(2, 256), ("linear", 128), (None, 384), (1, "linear"), ("linear", None), (4, 128)]


def load(folder: Path, quantize: str | None) -> tuple[ModelConfig, ModelWeights]:
    config = ModelConfig.from_path(folder)
    args = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "quantize": quantize}
    return config, pack_weights(load_weights(folder, config, read_quant_config(folder), **args))


def with_given_scales(weights: ModelWeights) -> ModelWeights:
    """The same with an input scale [1] for each e4m3 linear, as a ModelOpt checkpoint has them."""

    def given(value: object) -> object:
        if not isinstance(value, PackedWeight) or value.weight_scale is None:
            return value
        return dataclasses.replace(value, input_scale=torch.full((1,), 2**-6))

    blocks = [dataclasses.replace(b, **{k: given(v) for k, v in vars(b).items()}) for b in weights.sub_blocks]
    return dataclasses.replace(weights, sub_blocks=blocks)


def logits_of(config: ModelConfig, weights: ModelWeights, num_tokens: int) -> Tensor:
    """Of every token of one prompt."""
    torch.manual_seed(1)
    cache = make_kv_cache(config, 1, dtype=torch.bfloat16, device=torch.device("cpu"))
    positions = torch.arange(num_tokens)
    batch = Batch(
        token_ids=torch.randint(config.vocab_size, (num_tokens,)),
        positions=positions,
        slots=positions,
        page_table=torch.zeros(1, 1, dtype=torch.int64),
        q_start=torch.tensor([0, num_tokens]),
        kv_len=torch.tensor([num_tokens]),
        logit_rows=positions,
        num_few=num_tokens if num_tokens <= 8 else 0,
        decodes=num_tokens == 1,
    )
    with torch.inference_mode():
        return Model(config, weights, 64).forward(batch, cache)


@pytest.mark.parametrize("quantize", [None, "fp8", "fp8 with given scales"])
@pytest.mark.parametrize("seed", range(4))
def test_few_tokens(seed: int, quantize: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle.random_checkpoint(seed, tmp_path, blocks=EVERY_KIND if seed == 0 else None)
    config, weights = load(tmp_path, quantize and "fp8")
    if quantize == "fp8 with given scales":
        weights = with_given_scales(weights)
    for num_tokens in (1, 5, 16):
        logits = []
        for most_few, most_delta in ((16, 64), (0, 64), (0, 0)):  # RowStatsResidual, Residual with deltas and without
            monkeypatch.setattr("nemotron_fast.model.FEW_TOKENS", most_few)
            monkeypatch.setattr("nemotron_fast.residual.MOST_DELTA_TOKENS", most_delta)
            logits.append(logits_of(config, weights, num_tokens))
        found, want, without_deltas = logits
        assert torch.equal(without_deltas, want)
        # bf16 differs in places because squares are added in another order, and e4m3 where a tie rounds otherwise
        torch.testing.assert_close(found, want, rtol=0.05, atol=0.05 * want.std().item())
