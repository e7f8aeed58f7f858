# SPDX-License-Identifier: Apache-2.0
"""The safetensors format: a strict header reader, and a writer that takes tensors piece by piece.

A file is 8 bytes of header length (little endian), a JSON header, and one buffer that the tensors fill without
holes; specified by the safetensors project. A header is compared with the size of its file before the file is
mapped, so that a truncated or hostile one is an error and not a crash.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_fast.errors import CheckpointError
from nemotron_fast.files import parse_json

MAX_HEADER_BYTES = 16 << 20  # a real header has about 100 bytes per tensor
MAX_DIMS = 8
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    file: str  # name of the file in the folder
    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> what is stored, of one safetensors file whose header fits its size to the byte.

    Raises:
        CheckpointError: truncated, oversized or malformed; the message names the file.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            room = min(MAX_HEADER_BYTES, size - 8)
            if length > room:
                raise CheckpointError(
                    f"{path} is truncated or not safetensors: header of {length} bytes, room for {room}"
                )
            header = parse_json(file.read(length), f"{path}: header", CheckpointError, unique_keys=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    header.pop("__metadata__", None)
    spans = {name: _entry_span(entry, f"{path}: {name!r}") for name, entry in header.items()}
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end:
            raise CheckpointError(f"{path}: {name!r} starts at byte {start}, want {end} (overlap or hole)")
        end = stop
    found = size - 8 - length
    if end != found:
        raise CheckpointError(f"{path} holds {found} bytes of tensors, its header says {end}; download it again")
    return {n: TensorInfo(path.name, e["dtype"], tuple(e["shape"])) for n, e in header.items()}


def _entry_span(entry: Any, where: str) -> tuple[int, int]:
    """The bytes [start, stop) of one header entry, after checking all of its fields."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where} has dtype {str(dtype)[:40]!r}, which is not known")
    lists = isinstance(shape, list) and isinstance(offsets, list)
    lists = lists and len(shape) <= MAX_DIMS and len(offsets) == 2
    if not lists or not all(type(v) is int and 0 <= v < 1 << 63 for v in (*shape, *offsets)):
        got = f"shape {shape!r} and data_offsets {offsets!r}"
        raise CheckpointError(f"{where} has {got[:200]}, want lists of sizes")
    want = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != want:
        raise CheckpointError(f"{where} takes {offsets[1] - offsets[0]} bytes, {dtype} {shape} takes {want}")
    return offsets[0], offsets[1]


class Writer:
    """Writes one safetensors file whose tensors are known beforehand, in pieces and in any order."""

    def __init__(self, path: Path, tensors: dict[str, TensorInfo]) -> None:
        """Create `path` and write the header; wide elements come first, so that each is aligned."""
        self._starts: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(tensors, key=lambda n: (-DTYPE_BYTES[tensors[n].dtype], n)):
            info, self._starts[name] = tensors[name], end
            end += info.nbytes
            offsets = [self._starts[name], end]
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("xb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._data = 8 + len(text)
        self._file.truncate(self._data + end)

    def write(self, name: str, data: Tensor, offset: int = 0) -> None:
        """Put the bytes of `data`, a CPU tensor, `offset` bytes into tensor `name`."""
        self._file.seek(self._data + self._starts[name] + offset)
        self._file.write(data.contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Write everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
