# SPDX-License-Identifier: Apache-2.0
"""The forward pass: a walk over the live sub-blocks. The only `match` on block kinds at run time."""

from __future__ import annotations

from torch import Tensor

from nemotron_fast import ops
from nemotron_fast.batch import Batch
from nemotron_fast.config import ModelConfig
from nemotron_fast.kv_cache import KVCache
from nemotron_fast.rope import rope_table
from nemotron_fast.weights import AttentionWeights, LinearBlockWeights, LinearWeight, MLPWeights, ModelWeights


class Model:
    """A loaded model; positions 0..max_model_len-1 can be computed."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, max_model_len: int) -> None:
        self.config = config
        self.weights = weights
        self._kv_slots = [sub.kv_slot for sub in config.sub_blocks]
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
                    delta_TE = _linear(ops.silu_mul(_linear(h_TE, block.gate_up)), block.down)
                case LinearBlockWeights():
                    delta_TE = _linear(h_TE, block.linear)
        if delta_TE is not None:
            residual_TE += delta_TE  # only the wanted rows need the last norm
        h_RE = ops.rms_norm(residual_TE[batch.logit_rows], self.weights.norm, eps)
        return _linear(h_RE, self.weights.lm_head).float()

    def _attention(self, h_TE: Tensor, block: AttentionWeights, kv_slot: int, batch: Batch, cache: KVCache) -> Tensor:
        k_cache, v_cache = cache.keys[kv_slot], cache.values[kv_slot]
        num_kv, dim = k_cache.shape[1], k_cache.shape[3]
        qkv_TX = _linear(h_TE, block.qkv)
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
        return _linear(out_THD.flatten(1), block.o)


def _norm(delta_TE: Tensor | None, residual_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    if delta_TE is None:  # the first sub-block: nothing to add yet
        return ops.rms_norm(residual_TE, weight_E, eps)
    return ops.add_rms_norm(delta_TE, residual_TE, weight_E, eps)


def _linear(x_TK: Tensor, linear: LinearWeight) -> Tensor:
    """x @ W^T in x's type; an FP8 weight takes x quantised by its static scale, or per token."""
    if linear.weight_scale is None:
        return ops.linear(x_TK, linear.weight)
    if linear.input_scale is not None:
        q_TK, x_scale = ops.quantize_fp8(x_TK, linear.input_scale), linear.input_scale
    else:
        q_TK, x_scale = ops.quantize_fp8_per_token(x_TK)
    return ops.linear(q_TK, linear.weight, x_scale=x_scale, weight_scale=linear.weight_scale, out_dtype=x_TK.dtype)
