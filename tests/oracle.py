# SPDX-License-Identifier: Apache-2.0
"""What the engine must compute, written once more and slowly: FP64, no cache, nothing of nemotron_fast.

`forward` takes the Hugging Face config as a dict (nemotron-nas or llama) and the stored weights by name;
`random_checkpoint` writes small checkpoints with any block list to feed to both sides.
"""

import json
import math
import pathlib
import random
from collections.abc import Callable

import torch
from safetensors.torch import save_file
from torch import Tensor

# ---- reading a config


def head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rounded_width(ffn_mult: float, hidden: int) -> int:
    """Puzzle's rule: two thirds of the product, cut to an integer, up to the next multiple of 256."""
    return math.ceil(int(2 * ffn_mult * hidden / 3) / 256) * 256


def layer_kinds(config: dict) -> list[tuple[int | str | None, int | str | None]]:
    """Per layer: (KV heads | "linear" | None, FFN width | "linear" | None)."""
    H = config["num_attention_heads"]
    if not config.get("block_configs"):
        kv_heads = config.get("num_key_value_heads") or H
        return [(kv_heads, config["intermediate_size"])] * config["num_hidden_layers"]
    kinds = []
    for block in config["block_configs"]:
        attention, ffn = block["attention"], block["ffn"]
        if attention["no_op"] or attention["replace_with_linear"]:
            mixer = None if attention["no_op"] else "linear"
        else:
            mixer = H // attention["n_heads_in_group"]
        if ffn["no_op"] or ffn["replace_with_linear"]:
            width = None if ffn["no_op"] else "linear"
        elif ffn.get("ffn_mult") is not None:
            width = rounded_width(ffn["ffn_mult"], config["hidden_size"])
        else:
            width = ffn["intermediate_size"]
        kinds.append((mixer, width))
    return kinds


# ---- forward


def inverse_frequencies(config: dict) -> Tensor:
    """[D/2] radians per position, with the llama3 rescaling where the config asks for it."""
    D = head_dim(config)
    freq = torch.tensor([config["rope_theta"] ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    scaling = config.get("rope_scaling")
    if scaling is None or scaling.get("rope_type") == "default":
        return freq
    assert scaling["rope_type"] == "llama3", f"rope_type={scaling['rope_type']}"
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    for i, f in enumerate(freq.tolist()):
        wavelength = 2 * math.pi / f
        if wavelength > original / low:
            freq[i] = f / scaling["factor"]
        elif wavelength >= original / high:
            keep = (original / wavelength - low) / (high - low)
            freq[i] = (1 - keep) * f / scaling["factor"] + keep * f
    return freq


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    return x_TE / torch.sqrt((x_TE * x_TE).mean(dim=1, keepdim=True) + eps) * weight_E


def rotate(x_THD: Tensor, freq: Tensor) -> Tensor:
    """Pairs are (i, i + D/2)."""
    angle = (torch.arange(x_THD.shape[0], dtype=torch.float64)[:, None] * freq)[:, None, :]  # [T, 1, D/2]
    a, b = x_THD.split(x_THD.shape[2] // 2, dim=2)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=2)


def attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    """-> [T, H * D]; query head h reads KV head h // (H / K)."""
    T, H, D = q_THD.shape
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    heads = []
    for h in range(H):
        kv = h // (H // k_TKD.shape[1])
        scores_TT = q_THD[:, h] @ k_TKD[:, kv].T / math.sqrt(D)
        heads.append(scores_TT.masked_fill(future, -math.inf).softmax(dim=1) @ v_TKD[:, kv])
    return torch.cat(heads, dim=1)


def fp8_product(x_TX: Tensor, weight_NX: Tensor) -> Tensor:
    """x @ weight^T of rows rounded to e4m3, each under its own scale max|row| / 448: W8A8, weights per output
    channel and activations per token. Exact but for those two roundings."""

    def rounded(rows: Tensor) -> Tensor:
        scale = (rows.abs().amax(dim=1, keepdim=True) / 448).float()
        return (rows.float() / scale).to(torch.float8_e4m3fn).to(torch.float64) * scale

    return rounded(x_TX) @ rounded(weight_NX).T


def forward(
    config: dict,
    weights: dict[str, Tensor],
    token_ids: list[int],
    product: Callable[[Tensor, Tensor], Tensor] = lambda x_TX, weight_NX: x_TX @ weight_NX.T,
) -> Tensor:
    """-> logits [T, V], float64. `product` multiplies in the blocks' linears (not in the head)."""

    def get(name: str) -> Tensor:
        return weights[name].to(torch.float64)

    def linear(x_TX: Tensor, name: str) -> Tensor:
        y = product(x_TX, get(f"{name}.weight"))
        return y + get(f"{name}.bias") if f"{name}.bias" in weights else y

    D, eps, freq = head_dim(config), config["rms_norm_eps"], inverse_frequencies(config)
    x_TE = get("model.embed_tokens.weight")[token_ids]
    for i, (mixer, ffn) in enumerate(layer_kinds(config)):
        layer = f"model.layers.{i}"
        if mixer is not None:
            h_TE = rms_norm(x_TE, get(f"{layer}.input_layernorm.weight"), eps)
            if mixer == "linear":
                x_TE = x_TE + linear(h_TE, f"{layer}.self_attn.linear_attn")
            else:
                q, k, v = (linear(h_TE, f"{layer}.self_attn.{n}_proj").unflatten(1, (-1, D)) for n in "qkv")
                assert k.shape[1] == mixer, f"{layer}: {k.shape[1]} KV heads, want {mixer}"
                out = attend(rotate(q, freq), rotate(k, freq), v)
                x_TE = x_TE + linear(out, f"{layer}.self_attn.o_proj")
        if ffn is not None:
            h_TE = rms_norm(x_TE, get(f"{layer}.post_attention_layernorm.weight"), eps)
            if ffn == "linear":
                x_TE = x_TE + linear(h_TE, f"{layer}.mlp.linear_mlp")
            else:
                gate, up = linear(h_TE, f"{layer}.mlp.gate_proj"), linear(h_TE, f"{layer}.mlp.up_proj")
                assert gate.shape[1] == ffn, f"{layer}: FFN width {gate.shape[1]}, want {ffn}"
                x_TE = x_TE + linear(gate / (1 + torch.exp(-gate)) * up, f"{layer}.mlp.down_proj")
    x_TE = rms_norm(x_TE, get("model.norm.weight"), eps)
    head = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return x_TE @ get(f"{head}.weight").T


def greedy(config: dict, weights: dict[str, Tensor], prompt_ids: list[int], n: int) -> list[int]:
    """The n tokens after the prompt, each from a forward over all before it; stop tokens do not stop it."""
    double = {name: weight.to(torch.float64) for name, weight in weights.items()}
    ids = list(prompt_ids)
    for _ in range(n):
        ids.append(int(forward(config, double, ids)[-1].argmax()))
    return ids[len(prompt_ids) :]


# ---- random checkpoints

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
UNUSED_ATTENTION_KEYS = {
    "num_sink_tokens": None,
    "sparsify": None,
    "unshifted_sink": False,
    "use_prefill_window_in_sink_attention": False,
    "window_length": None,
}


def random_blocks(rng: random.Random, heads: int) -> list[tuple]:
    groupings = [k for k in range(1, heads + 1) if heads % k == 0]
    mixers = [*groupings, *groupings, "linear", None]  # attention is the commonest kind
    ffns = [256, 512, 1.3, 3.0, "linear", None]
    return [(rng.choice(mixers), rng.choice(ffns)) for _ in range(rng.randint(1, 12))]


def block_config(mixer: int | str | None, ffn: int | float | str | None, heads: int, verbose: bool) -> dict:
    """`mixer`: KV heads, "linear", None; `ffn`: intermediate_size (int), ffn_mult (float), "linear", None."""
    attention = {
        "n_heads_in_group": heads // mixer if isinstance(mixer, int) else None,
        "no_op": mixer is None,
        "replace_with_linear": mixer == "linear",
    }
    width = (
        {"intermediate_size": ffn, "hidden_act": "silu"}
        if isinstance(ffn, int)
        else {"ffn_mult": ffn if isinstance(ffn, float) else None}
    )
    mlp = {**width, "no_op": ffn is None, "replace_with_linear": ffn == "linear"}
    if verbose:  # the keys that the released configs carry, at their neutral values
        attention, mlp = {**attention, **UNUSED_ATTENTION_KEYS}, {**mlp, "sparsify": None}
    return {"attention": attention, "ffn": mlp}


def parameter_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, named."""
    E, V, H, D = config["hidden_size"], config["vocab_size"], config["num_attention_heads"], head_dim(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, E)}
    for i, (mixer, ffn) in enumerate(layer_kinds(config)):
        names: dict[str, tuple[int, ...]] = {}
        if mixer is not None:
            names["input_layernorm"] = (E,)
        if mixer == "linear":
            names["self_attn.linear_attn"] = (E, E)
        elif mixer is not None:
            kv = (mixer * D, E)
            names |= {
                "self_attn.q_proj": (H * D, E),
                "self_attn.k_proj": kv,
                "self_attn.v_proj": kv,
                "self_attn.o_proj": (E, H * D),
            }
        if ffn is not None:
            names["post_attention_layernorm"] = (E,)
        if ffn == "linear":
            names["mlp.linear_mlp"] = (E, E)
        elif ffn is not None:
            names |= {"mlp.gate_proj": (ffn, E), "mlp.up_proj": (ffn, E), "mlp.down_proj": (E, ffn)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in names.items()}
    shapes["model.norm.weight"] = (E,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, E)
    return shapes


def random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Scaled so that sub-blocks move the residual stream, attention is uneven and logits are 2..4 wide."""
    x = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.2 * x
    if "embed_tokens" in name:
        return x  # when tied, divided by sqrt(E) below
    gain = {"q_proj": 1.5, "k_proj": 1.5, "down_proj": 1.5, "lm_head": 3.0}
    return x * next((g for part, g in gain.items() if part in name), 1.0) / math.sqrt(shape[1])


def random_checkpoint(
    seed: int,
    folder: pathlib.Path,
    *,
    blocks: list[tuple] | None = None,
    model_type: str = "nemotron-nas",
    heads: int = 4,
    head_dim: int = 64,
    vocab: int = 320,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    tie: bool = False,
    rope_scaling: dict | None = LLAMA3_ROPE,
    rope_theta: float = 10000.0,
    max_positions: int = 512,
    **overrides: object,
) -> tuple[dict, dict[str, Tensor]]:
    """Write a checkpoint; -> (config, weights as stored).

    `blocks` is a list of (mixer, ffn) as in `block_config`, random when None; for model_type "llama" all
    entries must be equal and have attention and an int width. `overrides` replace keys of config.json before
    the weights are made.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    llama = model_type == "llama"
    if blocks is None:
        blocks = [(max(1, heads // 2), 384)] * rng.randint(1, 4) if llama else random_blocks(rng, heads)
    config = {
        "architectures": ["LlamaForCausalLM" if llama else "DeciLMForCausalLM"],
        "model_type": model_type,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "hidden_act": "silu",
        "hidden_size": heads * head_dim,
        "intermediate_size": None,
        "max_position_embeddings": max_positions,
        "num_attention_heads": heads,
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "rope_scaling": rope_scaling and dict(rope_scaling),
        "rope_theta": rope_theta,
        "tie_word_embeddings": tie,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab,
    }
    if llama:
        ((kv_heads, width),) = set(blocks)
        config |= {"num_key_value_heads": kv_heads, "intermediate_size": width, "head_dim": head_dim}
    else:
        verbose = rng.random() < 0.5
        config["block_configs"] = [block_config(mixer, ffn, heads, verbose) for mixer, ffn in blocks]
    config |= overrides
    shapes = parameter_shapes(config)
    weights = {name: random_weight(name, shape, generator) for name, shape in shapes.items()}
    if config["tie_word_embeddings"]:
        weights["model.embed_tokens.weight"] *= 3 / math.sqrt(config["hidden_size"])
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    write_checkpoint(folder, config, weights, shards)
    return config, weights


def write_checkpoint(folder: pathlib.Path, config: dict, weights: dict[str, Tensor], shards: int = 1) -> None:
    """config.json and model.safetensors, or `shards` files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    files = {n: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(weights)}
    for file in sorted(set(files.values())):
        part = {name: weight for name, weight in weights.items() if files[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
