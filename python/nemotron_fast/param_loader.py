# SPDX-License-Identifier: Apache-2.0
"""One runtime tensor at a time: its pieces are read from the mapped files, checked, converted or quantised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_fast.checkpoint import CHUNK_ELEMENTS, Checkpoint
from nemotron_fast.errors import CheckpointError
from nemotron_fast.footprint import scheme_of
from nemotron_fast.inventory import scale_name
from nemotron_fast.quant_config import QuantConfig
from nemotron_fast.quantize import quantize_rows, row_scales
from nemotron_fast.sharding import Param, Piece, Span

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class LinearWeight:
    """y = x @ W^T with W = weight * weight_scale."""

    weight: Tensor  # [N, K], the activation dtype or float8_e4m3fn
    weight_scale: Tensor | None = None  # float32 [1] or [N]; None: not FP8
    input_scale: Tensor | None = None  # float32 [1]; None with an FP8 weight: activations quantised per token


class ParamLoader:
    """Fills runtime tensors from a checked checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        quant: QuantConfig | None,
        device: torch.device,
        dtype: torch.dtype,
        to_fp8: bool,
        verify: bool,
    ) -> None:
        self._checkpoint, self._quant, self._device = checkpoint, quant, device
        self._dtype, self._to_fp8, self._verify = dtype, to_fp8, verify
        # Kept: of such blocks malloc would keep several, were they given back after each chunk.
        self._quotients = torch.empty(CHUNK_ELEMENTS if to_fp8 else 0, dtype=torch.float32, device=device)
        self._progress: Callable[[int, int], None] | None = None
        self._done = self._total = 0

    def report(self, plan: tuple[Param, ...], progress: Callable[[int, int], None] | None) -> None:
        """Call `progress` from now on, with the bytes of `plan` as the total."""
        self._progress = progress
        self._total = sum(param.numel * self._out_dtype(param).itemsize for param in plan)

    def load(self, param: Param) -> LinearWeight:
        """One runtime tensor and its scales; norms and the embedding come as a weight without scales."""
        weight = torch.empty(param.shape, dtype=self._out_dtype(param), device=self._device)
        scales: list[Tensor] = []
        row = 0
        for piece in param.pieces:
            out = weight[row : row + len(piece.rows)]
            row += len(piece.rows)
            if self._to_fp8 and param.kind == "linear":
                scales.append(self._quantize_into(out, piece))
            else:
                self._copy_into(out, piece)
        if weight.dtype != FP8:
            return LinearWeight(weight)
        if scales:
            return LinearWeight(weight, torch.cat(scales))
        return LinearWeight(weight, self._weight_scale(param), self._input_scale(param))

    def _out_dtype(self, param: Param) -> torch.dtype:
        fp8 = (self._to_fp8 and param.kind == "linear") or scheme_of(self._quant, param, param.pieces[0])
        return FP8 if fp8 else self._dtype

    def _copy_into(self, out: Tensor, piece: Piece) -> None:
        for rows, chunk in self._checkpoint.read_chunks(piece.tensor, piece.rows, piece.cols):
            part = out[rows.start - piece.rows.start : rows.stop - piece.rows.start]
            part.copy_(chunk)
            if self._verify or part.dtype != chunk.dtype:  # a conversion may overflow
                self._require_finite(part, chunk, piece.tensor)
            self._count(part.nbytes)

    def _quantize_into(self, out: Tensor, piece: Piece) -> Tensor:
        """-> scales, float32 [rows]. Whole rows are read, for their amax; of `cols` only the range is kept."""
        scales = torch.ones(out.shape[0], dtype=torch.float32, device=self._device)
        cols = piece.cols or Span(0, 0)
        for rows, chunk in self._checkpoint.read_chunks(piece.tensor, piece.rows):
            here = slice(rows.start - piece.rows.start, rows.stop - piece.rows.start)
            chunk = chunk.to(self._device)
            scales[here] = row_scales(chunk)
            if self._verify and not torch.isfinite(scales[here]).all():
                raise CheckpointError(f"{piece.tensor} holds NaN or infinity; download it again")
            if self._quotients.numel() < chunk.numel():
                self._quotients = torch.empty(chunk.numel(), dtype=torch.float32, device=self._device)
            quantize_rows(out[here], chunk[:, cols.start : cols.stop], scales[here], self._quotients)
            self._count(out[here].nbytes)
        return scales

    def _require_finite(self, part: Tensor, chunk: Tensor, name: str) -> None:
        if part.dtype == FP8:  # its only special values are the two NaN codes, 0x7f and 0xff
            bad = ((part.view(torch.uint8) & 0x7F) == 0x7F).any()
        else:
            bad = ~torch.isfinite(torch.stack(torch.aminmax(part))).all()
        if not bad:
            return
        if part.dtype == FP8 or not torch.isfinite(chunk).all():
            raise CheckpointError(f"{name} holds NaN or infinity; download it again")
        raise CheckpointError(f"{name} overflows {part.dtype} (stored as {chunk.dtype}); choose another dtype")

    def _weight_scale(self, param: Param) -> Tensor:
        """[1] if one scale serves all rows, else [N]: each row has that of the tensor that it comes from."""
        per_piece = []
        for piece in param.pieces:
            scale = read_scale(self._checkpoint, scale_name(piece.tensor, "weight_scale"))
            per_piece.append(scale if scale.numel() == 1 else scale[piece.rows.start : piece.rows.stop])
        first = per_piece[0]
        if all(scale.numel() == 1 and torch.equal(scale, first) for scale in per_piece):
            return first.to(self._device)
        rows = [s.expand(len(p.rows)) for s, p in zip(per_piece, param.pieces, strict=True)]
        return torch.cat(rows).to(self._device)

    def _input_scale(self, param: Param) -> Tensor | None:
        names = [scale_name(piece.tensor, "input_scale") for piece in param.pieces]
        found = [read_scale(self._checkpoint, name) for name in names if name in self._checkpoint]
        return torch.stack(found).amax(dim=0).to(self._device) if found else None

    def _count(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress:
            self._progress(self._done, self._total)


def read_scale(checkpoint: Checkpoint, name: str) -> Tensor:
    """A scale as float32 [n] on the host.

    Raises:
        CheckpointError: NaN, infinite, zero or negative.
    """
    scale = checkpoint.read(name).to(torch.float32, copy=True).view(-1)
    if not (torch.isfinite(scale) & (scale > 0)).all():
        bad = scale[~(torch.isfinite(scale) & (scale > 0))][0].item()
        raise CheckpointError(f"{name} is {bad}, want finite and > 0; the checkpoint is broken")
    return scale
