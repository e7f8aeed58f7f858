# SPDX-License-Identifier: Apache-2.0
"""The demo model for training: eight blocks that between them hold every block kind."""

import math
import re

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

HIDDEN, HEADS, HEAD_DIM = 256, 4, 64


def block_config(group: int | str | None, ffn: dict | str | None) -> dict:
    """`group`: query heads per KV head, "linear" or None; `ffn`: the width's keys, "linear" or None."""

    def flags(x: object) -> dict:
        return {"no_op": x is None, "replace_with_linear": x == "linear"}

    width = ffn if isinstance(ffn, dict) else {"ffn_mult": None}
    return {
        "attention": {"n_heads_in_group": group if isinstance(group, int) else None, **flags(group)},
        "ffn": {**width, **flags(ffn)},
    }


def make_config(tokenizer: Tokenizer) -> dict:
    blocks = [
        block_config(None, {"ffn_mult": 1.3125}),  # width 256; no attention first
        block_config(1, {"ffn_mult": 3.0}),  # 4 KV heads, width 512
        block_config(2, "linear"),  # 2 KV heads
        block_config("linear", {"intermediate_size": 256, "hidden_act": "silu"}),
        block_config(None, None),  # empty
        block_config(4, {"ffn_mult": 4.5}),  # 1 KV head, width 768
        block_config(2, None),  # attention alone
        block_config(4, {"intermediate_size": 512, "hidden_act": "silu"}),
    ]
    token_id = tokenizer.token_to_id
    return {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_configs": blocks,
        "bos_token_id": token_id("<|begin_of_text|>"),
        "eos_token_id": [token_id("<|end_of_text|>"), token_id("<|eot_id|>")],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": 1024,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": HEADS,
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 4.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 128,
            "rope_type": "llama3",
        },
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(),
    }


def ffn_width(ffn: dict) -> int:
    if ffn.get("intermediate_size"):
        return ffn["intermediate_size"]
    return (int(2 * ffn["ffn_mult"] * HIDDEN / 3) + 255) // 256 * 256


def rope_tables(config: dict) -> tuple[Tensor, Tensor]:
    """cos, sin: [max_position_embeddings, D], llama3 frequencies."""
    s = config["rope_scaling"]
    freq = config["rope_theta"] ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # full turns in the original window
    keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    freq = keep * freq + (1 - keep) * freq / s["factor"]
    position = torch.arange(config["max_position_embeddings"], dtype=torch.float64)
    angle = torch.outer(position, freq).repeat(1, 2)
    return angle.cos().float(), angle.sin().float()


def module(**layers: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(n_in, n_out, bias=False) for name, (n_in, n_out) in layers.items()})


class Demo(nn.Module):
    """Parameter names are those of the checkpoint; what a block lacks has no parameter."""

    def __init__(self, config: dict):
        super().__init__()
        layers = []
        for block in config["block_configs"]:
            attention, ffn, layer = block["attention"], block["ffn"], nn.ModuleDict()
            if not attention["no_op"]:
                layer["input_layernorm"] = nn.RMSNorm(HIDDEN, config["rms_norm_eps"])
                square = (HIDDEN, HIDDEN)
                kv = (HIDDEN, HIDDEN // (attention["n_heads_in_group"] or 1))
                layer["self_attn"] = (
                    module(linear_attn=square)
                    if attention["replace_with_linear"]
                    else module(q_proj=square, k_proj=kv, v_proj=kv, o_proj=square)
                )
            if not ffn["no_op"]:
                layer["post_attention_layernorm"] = nn.RMSNorm(HIDDEN, config["rms_norm_eps"])
                if ffn["replace_with_linear"]:
                    layer["mlp"] = module(linear_mlp=(HIDDEN, HIDDEN))
                else:
                    up = (HIDDEN, ffn_width(ffn))
                    layer["mlp"] = module(gate_proj=up, up_proj=up, down_proj=up[::-1])
            layers.append(layer)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config["vocab_size"], HIDDEN),
                "layers": nn.ModuleList(layers),
                "norm": nn.RMSNorm(HIDDEN, config["rms_norm_eps"]),
            }
        )
        self.lm_head = nn.Linear(HIDDEN, config["vocab_size"], bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # outputs to the residual stream start smaller
                nn.init.normal_(weight, std=0.015 if re.search("o_proj|down_proj|linear_", name) else 0.05)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def rotate(self, x_BHTD: Tensor) -> Tensor:
        T = x_BHTD.shape[2]
        low, high = x_BHTD.chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1)
        return x_BHTD * self.cos[:T].to(x_BHTD.dtype) + turned * self.sin[:T].to(x_BHTD.dtype)

    def attend(self, attn: nn.ModuleDict, h_BTE: Tensor) -> Tensor:
        if "linear_attn" in attn:
            return attn["linear_attn"](h_BTE)
        q, k, v = (attn[f"{n}_proj"](h_BTE).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for n in "qkv")
        k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (self.rotate(k), v))
        out = F.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True)
        return attn["o_proj"](out.transpose(1, 2).flatten(2))

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.model["embed_tokens"](ids_BT)
        for layer in self.model["layers"]:
            if "self_attn" in layer:
                x = x + self.attend(layer["self_attn"], layer["input_layernorm"](x))
            if "mlp" in layer:
                mlp, h = layer["mlp"], layer["post_attention_layernorm"](x)
                x = x + (
                    mlp["linear_mlp"](h)
                    if "linear_mlp" in mlp
                    else mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))
                )
        return self.lm_head(self.model["norm"](x))
