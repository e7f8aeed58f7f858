# SPDX-License-Identifier: Apache-2.0
"""Loaded weights -> weights as the packed linears of the GPU read them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from nemotron_fast import ops
from nemotron_fast.param_loader import LinearWeight
from nemotron_fast.weights import MLPWeights, ModelWeights, SubBlockWeights


@dataclass(frozen=True)
class PackedWeight:
    """A LinearWeight in the packed format of csrc/host/weight_layout.h."""

    packed: Tensor
    num_rows: int  # N
    weight_scale: Tensor | None
    input_scale: Tensor | None


def pack_weights(weights: ModelWeights) -> ModelWeights:
    """The same weights with every linear packed. `weights` is used up: each plain linear is let go when its
    packed form is made, so that the device holds one of them twice at most."""
    for i, block in enumerate(weights.sub_blocks):
        weights.sub_blocks[i] = _pack_block(block)
    return dataclasses.replace(weights, lm_head=_pack(weights.lm_head))


def _pack_block(block: SubBlockWeights) -> SubBlockWeights:
    linears = {f.name: getattr(block, f.name) for f in dataclasses.fields(block)}
    packed = {
        name: _pack(linear, gate_up=isinstance(block, MLPWeights) and name == "gate_up")
        for name, linear in linears.items()
        if isinstance(linear, LinearWeight)
    }
    return dataclasses.replace(block, **packed)


def _pack(linear: LinearWeight, *, gate_up: bool = False) -> PackedWeight:
    packed = ops.pack_weight(linear.weight, gate_up=gate_up)
    return PackedWeight(packed, linear.weight.shape[0], linear.weight_scale, linear.input_scale)
