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
from nemotron_fast.residual import FEW_TOKENS, Residual, RowStatsResidual, given_scale, quantize, run_linear
from nemotron_fast.rope import rope_table
from nemotron_fast.weights import AttentionWeights, LinearBlockWeights, MLPWeights, ModelWeights


class Model:
    """A loaded model; positions 0..max_model_len-1 can be computed. `fp8_attention`, `deterministic`: see LLM."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        max_model_len: int,
        *,
        fp8_attention: bool = False,
        deterministic: bool = False,
    ) -> None:
        self.config = config
        self.weights = weights
        self.max_model_len = max_model_len
        self._attention_options = {"fp8_products": fp8_attention, "per_query": deterministic}
        self._kv_slots = [sub.kv_slot for sub in config.sub_blocks]
        device = weights.embed.device
        self._workspace = make_workspace(device)  # of the packed linears
        norms = [block.norm for block in weights.sub_blocks] + [weights.norm]
        self._first_norm, self._next_norms = norms[0], norms[1:]
        self._cos_sin = rope_table(config, max_model_len, weights.embed.device)  # [max_model_len, D]

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Compute the batch's tokens, append their KV to the cache and return logits [R, V] float32."""
        residual = self._residual(ops.embed(batch.token_ids, self.weights.embed))
        for block, kv_slot, next_norm in zip(self.weights.sub_blocks, self._kv_slots, self._next_norms, strict=True):
            match block:
                case AttentionWeights():
                    qkv_TX = residual.read(block.norm, block.qkv)
                    residual.add(self._attention(qkv_TX, block, kv_slot, batch, cache), block.o, next_norm)
                case MLPWeights():
                    residual.add_mlp(block, next_norm)
                case LinearBlockWeights():
                    residual.add_delta(residual.read(block.norm, block.linear), next_norm)
        rows_TE = residual.finish()  # only the wanted ones need the last norm
        h_RE = ops.rms_norm(rows_TE[batch.logit_rows], self.weights.norm, self.config.rms_norm_eps)
        lm_head = self.weights.lm_head
        return run_linear(*quantize(h_RE, lm_head), lm_head, self._workspace, torch.float32)

    def _residual(self, rows_TE: Tensor) -> Residual | RowStatsResidual:
        eps = self.config.rms_norm_eps
        if isinstance(self.weights.lm_head, PackedWeight) and len(rows_TE) <= FEW_TOKENS:
            return RowStatsResidual(rows_TE, eps, self._workspace, self._first_norm)
        return Residual(rows_TE, eps, self._workspace)

    def _attention(self, qkv_TX: Tensor, block: AttentionWeights, kv_slot: int, batch: Batch, cache: KVCache) -> Tensor:
        """The heads' outputs [T, H * D]; e4m3 at once where block.o has a given scale."""
        k_cache, v_cache = cache.keys[kv_slot], cache.values[kv_slot]
        num_kv, dim = k_cache.shape[1], k_cache.shape[3]
        sequences = (batch.page_table, batch.q_start, batch.kv_len)
        scales = {"softmax_scale": dim**-0.5, "k_scale": block.k_scale, "v_scale": block.v_scale}
        scales["out_scale"] = given_scale(block.o)
        if batch.decodes:
            return ops.decode_attention(qkv_TX, k_cache, v_cache, self._cos_sin, *sequences, **scales).flatten(1)
        attention_rotates = not self._attention_options["per_query"]  # q of all but the few
        slots = (self._cos_sin, batch.positions, batch.slots)
        cache_scales = {"k_scale": block.k_scale, "v_scale": block.v_scale}
        num_rotated = batch.num_few if attention_rotates else None
        ops.rope_append(qkv_TX, k_cache, v_cache, *slots, num_rotated=num_rotated, **cache_scales)
        q_THD = qkv_TX.unflatten(1, (-1, dim))[:, : -2 * num_kv]
        options = scales | self._attention_options
        options["cos_sin"] = self._cos_sin if attention_rotates else None
        return ops.attention(q_THD, k_cache, v_cache, *sequences, **options).flatten(1)
