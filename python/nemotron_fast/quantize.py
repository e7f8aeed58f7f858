# SPDX-License-Identifier: Apache-2.0
"""FP8 quantisation: of one tensor, and of a whole checkpoint into a new folder.

The format is float8_e4m3fn with one float32 scale per output row, w ~ fp8 * scale, scale = amax(row) / 448, and
activations quantised per token while running. On disk it is the `float-quantized` layout of compressed-tensors.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_fast.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, member
from nemotron_fast.config import ModelConfig, read_config_json
from nemotron_fast.dtypes import FP8, FP8_MAX, STORED_NAMES
from nemotron_fast.errors import CapacityError, CheckpointError
from nemotron_fast.inventory import scale_name
from nemotron_fast.quant_config import MODELOPT_FILE, parse_quant_config
from nemotron_fast.safetensors_file import TensorInfo, Writer
from nemotron_fast.sharding import param_plan

SHARD_BYTES = 4 << 30
# What is copied beside the weights. Code is copied for other engines (config.json names it); it is never run here.
_COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("generation_config.json", "chat_template*", "LICENSE*", "NOTICE*", "configuration_*.py", "modeling_*.py"),
)
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_FLOAT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_FLOAT8, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
}


def row_scales(w: Tensor) -> Tensor:
    """amax / 448 of each row of `w` [N, K], float32 [N]; 1 for a row of zeros, NaN or infinity if the row has one."""
    if not w.numel():
        return torch.ones(w.shape[0], dtype=torch.float32, device=w.device)
    low, high = torch.aminmax(w, dim=1)
    amax = torch.maximum(-low, high).float()
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(amax == 0, 1.0, (amax / FP8_MAX).clamp(min=tiny))


def quantize_rows(out: Tensor, w: Tensor, scale: Tensor, quotients: Tensor) -> None:
    """out = `w` [N, K] / `scale` [N], rounded to nearest even and saturated at 448: float8_e4m3fn [N, K].

    Args:
        quotients: float32, at least N * K: what lies between, overwritten.
    """
    exact = quotients[: w.numel()].view(w.shape).copy_(w)
    out.copy_(exact.div_(scale[:, None]).clamp_(-FP8_MAX, FP8_MAX))


def quantize_tensor_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight per output row.

    Args:
        w: [N, K], bfloat16, float16 or float32, finite.

    Returns:
        float8_e4m3fn [N, K] and its scale, float32 [N], finite and > 0.
    """
    scale, out = row_scales(w), torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    quantize_rows(out, w, scale, torch.empty(w.numel(), dtype=torch.float32, device=w.device))
    return out, scale


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the FP8 version of an unquantised checkpoint; embedding, norms and lm_head keep their dtype.

    Works in chunks of a few MB whatever the size of the model. `dst` appears complete or not at all.

    Args:
        src: folder of a BF16, FP16 or FP32 checkpoint.
        dst: folder to create; may exist if it is empty. Its parent must exist, and `src` may not contain it.
        progress: called with (bytes written, bytes to write).
        shard_bytes: largest size of one file, unless a single tensor is larger.

    Raises:
        ConfigError, CheckpointError: `src` is broken, quantised already, or holds NaN; `dst` is not usable.
        CapacityError: not enough room on the disk.
    """
    src, dst = Path(src), Path(dst)
    _refuse_destination(src, dst)
    raw = read_config_json(src)
    config = ModelConfig.from_hf(raw)
    hf_quant = read_config_json(src / MODELOPT_FILE) if (src / MODELOPT_FILE).exists() else None
    if parse_quant_config(raw, hf_quant) is not None:
        raise CheckpointError(f"{src} is quantised already; quantise the original BF16, FP16 or FP32 checkpoint")
    partial = dst.resolve().parent / f".{dst.resolve().name}.{secrets.token_hex(6)}.partial"
    with Checkpoint.open(src) as checkpoint:
        checkpoint.check(config)
        shards = _plan_shards(checkpoint, config, shard_bytes)
        _require_room(shards, partial.parent)
        try:
            partial.mkdir()
            _write_weights(checkpoint, shards, partial, progress)
            quantized = raw | {"quantization_config": _QUANTIZATION_CONFIG}
            (partial / "config.json").write_text(json.dumps(quantized, indent=2) + "\n", encoding="utf-8")
            for file in sorted({f for pattern in _COPIED for f in src.glob(pattern) if not f.is_dir()}):
                shutil.copyfile(member(src, file.name), partial / file.name)
            os.rename(partial, dst.resolve())
        except OSError as error:
            raise CheckpointError(f"cannot write {dst}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_destination(src: Path, dst: Path) -> None:
    if dst.resolve().is_relative_to(src.resolve()):
        raise CheckpointError(f"{dst} lies inside the checkpoint {src}; give a folder outside of it")
    if not dst.resolve().parent.is_dir():
        raise CheckpointError(f"{dst.resolve().parent} is not a folder; create it first")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst} exists and is not an empty folder; give a new one")


def _plan_shards(checkpoint: Checkpoint, config: ModelConfig, shard_bytes: int) -> list[dict[str, TensorInfo]]:
    """The tensors to write, in execution order, cut into files. Each weight is beside its scale."""
    shards: list[dict[str, TensorInfo]] = [{}]
    for param in param_plan(config):
        for piece in param.pieces:
            dtype = STORED_NAMES[FP8] if param.kind == "linear" else checkpoint.dtype(piece.tensor)
            new = {piece.tensor: TensorInfo("", dtype, piece.shape)}
            if param.kind == "linear":
                new[scale_name(piece.tensor, "weight_scale")] = TensorInfo(
                    "", STORED_NAMES["float32"], (piece.shape[0], 1)
                )
            if shards[-1] and _nbytes(shards[-1]) + _nbytes(new) > shard_bytes:
                shards.append({})
            shards[-1].update(new)
    return shards


def _nbytes(tensors: dict[str, TensorInfo]) -> int:
    return sum(info.nbytes for info in tensors.values())


def _require_room(shards: list[dict[str, TensorInfo]], folder: Path) -> None:
    need, free = sum(map(_nbytes, shards)), shutil.disk_usage(folder).free
    if need > free:
        raise CapacityError(f"the FP8 checkpoint takes {need / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free")


def _write_weights(
    checkpoint: Checkpoint,
    shards: list[dict[str, TensorInfo]],
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    total, done, files = sum(map(_nbytes, shards)), 0, {}
    for number, tensors in enumerate(shards, 1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files |= dict.fromkeys(tensors, name)
        writer = Writer(folder / name, tensors)
        try:
            for tensor in tensors:
                if tensor not in checkpoint:
                    continue  # a scale, written with its weight
                for nbytes in _write_tensor(checkpoint, tensor, tensors, writer):
                    done += nbytes
                    if progress:
                        progress(done, total)
        finally:
            writer.close()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_tensor(checkpoint: Checkpoint, name: str, tensors: dict[str, TensorInfo], writer: Writer) -> Any:
    """Write one weight, with its scale if it becomes FP8; yields the bytes of each chunk."""
    scales = scale_name(name, "weight_scale")
    for rows, chunk in checkpoint.read_chunks(name):
        if not torch.isfinite(row_scales(chunk.view(len(rows), -1))).all():
            raise CheckpointError(f"{name} holds NaN or infinity in rows {rows.start} to {rows.stop - 1}")
        written = 0
        if scales in tensors:
            chunk, scale = quantize_tensor_fp8(chunk)
            writer.write(scales, scale, rows.start * scale.element_size())
            written = scale.nbytes
        writer.write(name, chunk, rows.start * (chunk.nbytes // len(rows)))
        yield written + chunk.nbytes
