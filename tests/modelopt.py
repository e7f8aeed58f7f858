# SPDX-License-Identifier: Apache-2.0
"""The demo model as NVIDIA ModelOpt would store it: e4m3 linears, one scale for each weight and for its inputs."""

import json
import pathlib
import shutil

import torch
from safetensors.torch import load_file, save_file

from nemotron_fast.config import ModelConfig
from nemotron_fast.models import demo_folder
from nemotron_fast.sharding import param_plan

QUANTIZATION = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
INPUT_AMAX = 128.0  # more than the demo's activations reach


def demo_checkpoint(folder: pathlib.Path) -> None:
    """Weights that the runtime fuses share their scales, as in ModelOpt's exports."""
    weights = load_file(demo_folder() / "model.safetensors")
    for param in param_plan(ModelConfig.from_path(demo_folder())):
        if param.kind != "linear":
            continue
        names = [piece.tensor for piece in param.pieces]
        scale = torch.stack([weights[name].abs().amax() for name in names]).amax().float() / 448
        for name in names:
            weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
            base = name.removesuffix(".weight")
            weights |= {f"{base}.weight_scale": scale.clone(), f"{base}.input_scale": torch.tensor(INPUT_AMAX / 448)}
    save_file(weights, folder / "model.safetensors")
    config = json.loads((demo_folder() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo_folder() / file, folder)
