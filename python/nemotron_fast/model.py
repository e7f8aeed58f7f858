# SPDX-License-Identifier: Apache-2.0
"""The forward pass: a walk over the live sub-blocks. The only `match` on block kinds at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_fast import ops
from nemotron_fast.batch import Batch
from nemotron_fast.config import ModelConfig
from nemotron_fast.kv_cache import KVCache
from nemotron_fast.packed_weights import PackedWeight
from nemotron_fast.packing import make_workspace
from nemotron_fast.rope import rope_table
from nemotron_fast.weights import AttentionWeights, LinearBlockWeights, LinearWeight, MLPWeights, ModelWeights


class Model:
    """A loaded model; positions 0..max_model_len-1 can be computed."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, max_model_len: int) -> None:
        self.config = config
        self.weights = weights
        self._kv_slots = [sub.kv_slot for sub in config.sub_blocks]
        device = weights.embed.device
        self._workspace = make_workspace(device)  # of the packed linears
        self._cos_sin = rope_table(config, max_model_len, weights.embed.device)  # [max_model_len, D]

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Compute the batch's tokens, append their KV to the cache and return logits [R, V] float32.

        A sub-block's output is added to the residual stream by the norm of the next one.
        """
        eps = self.config.rms_norm_eps
        residual_TE = ops.embed(batch.token_ids, self.weights.embed)
        delta_TE = None
        for block, kv_slot in zip(self.weights.sub_blocks, self._kv_slots, strict=True):
            h_TE = _norm(delta_TE, residual_TE, block.norm, eps)
            match block:
                case AttentionWeights():
                    delta_TE = self._attention(h_TE, block, kv_slot, batch, cache)
                case MLPWeights():
                    delta_TE = self._linear(self._swiglu(h_TE, block.gate_up), block.down)
                case LinearBlockWeights():
                    delta_TE = self._linear(h_TE, block.linear)
        if delta_TE is not None:
            residual_TE += delta_TE  # only the wanted rows need the last norm
        h_RE = ops.rms_norm(residual_TE[batch.logit_rows], self.weights.norm, eps)
        return self._linear(h_RE, self.weights.lm_head, torch.float32)

    def _attention(self, h_TE: Tensor, block: AttentionWeights, kv_slot: int, batch: Batch, cache: KVCache) -> Tensor:
        k_cache, v_cache = cache.keys[kv_slot], cache.values[kv_slot]
        num_kv, dim = k_cache.shape[1], k_cache.shape[3]
        qkv_TX = self._linear(h_TE, block.qkv)
        scales = {"k_scale": block.k_scale, "v_scale": block.v_scale}
        ops.rope_append(qkv_TX, k_cache, v_cache, self._cos_sin, batch.positions, batch.slots, **scales)
        out_THD = ops.attention(
            qkv_TX.view(len(qkv_TX), -1, dim)[:, : -2 * num_kv],
            k_cache,
            v_cache,
            batch.page_table,
            batch.q_start,
            batch.kv_len,
            softmax_scale=dim**-0.5,
            **scales,
        )
        return self._linear(out_THD.flatten(1), block.o)

    def _linear(
        self, x_TK: Tensor, linear: LinearWeight | PackedWeight, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """x @ W^T, in x's type unless `out_dtype` says otherwise."""
        out_dtype = out_dtype or x_TK.dtype
        x_TK, x_scale = _quantize(x_TK, linear)
        scales = {"x_scale": x_scale, "weight_scale": linear.weight_scale}
        if isinstance(linear, LinearWeight):
            return ops.linear(x_TK, linear.weight, out_dtype=out_dtype, **scales)
        return ops.packed_linear(x_TK, linear.packed, linear.num_rows, self._workspace, out_dtype=out_dtype, **scales)

    def _swiglu(self, x_TE: Tensor, gate_up: LinearWeight | PackedWeight) -> Tensor:
        """silu(gate) * up, [T, F], in x's type."""
        if isinstance(gate_up, LinearWeight):
            return ops.silu_mul(self._linear(x_TE, gate_up))
        out_TF = x_TE.new_empty(len(x_TE), gate_up.num_rows // 2)
        x_TE, x_scale = _quantize(x_TE, gate_up)
        scales = {"x_scale": x_scale, "weight_scale": gate_up.weight_scale}
        return ops.packed_swiglu(x_TE, gate_up.packed, out_TF.shape[1], self._workspace, out=out_TF, **scales)


def _norm(delta_TE: Tensor | None, residual_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    if delta_TE is None:  # the first sub-block: nothing to add yet
        return ops.rms_norm(residual_TE, weight_E, eps)
    return ops.add_rms_norm(delta_TE, residual_TE, weight_E, eps)


def _quantize(x_TK: Tensor, linear: LinearWeight | PackedWeight) -> tuple[Tensor, Tensor | None]:
    """x as the weight wants it, and its scale: unchanged, or FP8 by a static scale, or FP8 per token."""
    if linear.weight_scale is None:
        return x_TK, None
    if linear.input_scale is not None:
        return ops.quantize_fp8(x_TK, linear.input_scale), linear.input_scale
    return ops.quantize_fp8_per_token(x_TK)
