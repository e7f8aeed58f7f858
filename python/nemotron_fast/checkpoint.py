# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder as a table of tensors: headers checked first, then read in rectangles through mmap.

Only safetensors files are opened, never pickles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemotron_fast.errors import CheckpointError, Problems
from nemotron_fast.files import member, read_json
from nemotron_fast.safetensors_file import MAX_HEADER_BYTES, TensorInfo, read_header
from nemotron_fast.sharding import Span

if TYPE_CHECKING:
    from nemotron_fast.config import ModelConfig
    from nemotron_fast.quant_config import QuantConfig

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CHUNK_ELEMENTS = 1 << 22  # what the loader and the quantiser hold in memory at a time


class Checkpoint:
    """The tensors of one folder. A context manager; what was read from it stays valid afterwards."""

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo]) -> None:
        self._folder, self._tensors = folder, tensors
        self._files: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read and check the headers of model.safetensors, or of the shards that the index lists.

        Raises:
            CheckpointError: no such folder, missing, truncated or malformed files, files outside the folder, a
                tensor held twice, or an index that does not list what its shards hold.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; give the folder of a checkpoint")
        single, index = (folder / SINGLE_FILE).exists(), (folder / INDEX_FILE).exists()
        if single and index:
            raise CheckpointError(f"{folder} has both {SINGLE_FILE} and {INDEX_FILE}; remove the stale one")
        if index:
            return cls(folder, _read_shards(folder))
        if not single:
            raise CheckpointError(_no_weights(folder))
        return cls(folder, read_header(member(folder, SINGLE_FILE)))

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor, in the order of the files."""
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in the file."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """The safetensors name of the element type, such as "BF16" or "F8_E4M3"."""
        return self._tensors[name].dtype

    def read(self, name: str, rows: Span | None = None, cols: Span | None = None) -> Tensor:
        """A rectangle of a tensor: a view of the mapped file, so only what is used is ever read.

        Args:
            rows, cols: ranges in the first and second dimension; None takes all of it.

        Returns:
            [rows] or [rows, cols] (a scalar: []), in the dtype of the file. It must not be written to.

        Raises:
            CheckpointError: the file cannot be mapped or has changed since `open`.
        """
        info = self._tensors[name]
        ranges = [slice(None) if s is None else slice(s.start, s.stop) for s in (rows, cols)][: len(info.shape)]
        try:
            file = self._files.get(info.file)
            if file is None:
                file = self._files[info.file] = safe_open(member(self._folder, info.file), framework="pt")
            return file.get_slice(name)[tuple(ranges)] if ranges else file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} from {self._folder / info.file}: {error}") from None

    def read_chunks(
        self, name: str, rows: Span | None = None, cols: Span | None = None
    ) -> Iterator[tuple[Span, Tensor]]:
        """`read` in runs of rows of at most CHUNK_ELEMENTS (or one row): each with its range in the tensor."""
        shape = self.shape(name)
        rows = Span(0, shape[0]) if rows is None else rows
        width = math.prod(shape[1:]) if cols is None else len(cols)
        step = max(1, CHUNK_ELEMENTS // max(1, width))
        for start in range(rows.start, rows.stop if width else rows.start, step):
            span = Span(start, min(start + step, rows.stop))
            yield span, self.read(name, span, cols)

    def check(self, config: ModelConfig, quant: QuantConfig | None = None) -> None:
        """Require exactly the tensors of `config`, quantised as `quant` says; see `inventory.check_inventory`."""
        from nemotron_fast.inventory import check_inventory

        check_inventory(self, config, quant)

    def close(self) -> None:
        """Forget the open files; the mappings end with the last tensor that was read from them."""
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    path = folder / INDEX_FILE
    index = read_json((folder, INDEX_FILE), MAX_HEADER_BYTES, CheckpointError, unique_keys=True)
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{path} has no weight_map of tensor names to file names")
    problems, tensors = Problems(), {}
    for file in sorted(set(listed.values())):
        try:
            header = read_header(member(folder, file))
        except CheckpointError as error:
            problems.add(str(error))
            continue
        inside = {name for name, where in listed.items() if where == file}
        for text, names in (
            ("holds tensors that another shard also holds", header.keys() & tensors.keys()),
            ("lacks tensors that the index lists in it", inside - header.keys()),
            ("holds tensors that the index does not list in it", header.keys() - inside - tensors.keys()),
        ):
            problems.require(not names, f"{file} {text}: {shorten(names)}")
        tensors |= header
    problems.raise_if_any(CheckpointError, str(path))
    return tensors


def shorten(names: Any, most: int = 4) -> str:
    """The first few names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(kind))
    if pickles:
        return f"{folder} has only pickles ({shorten(pickles)}), which are never read; convert them to safetensors"
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; download the checkpoint completely"
