# SPDX-License-Identifier: Apache-2.0
"""How the numbers of a step reach the device, and its results the host, while the host goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WORD_BYTES = 8


@dataclass(frozen=True)
class Column:
    """Numbers of one type; the place of the columns behind it depends on `room` alone, not on how many there are."""

    values: Sequence[int] | Sequence[float] | np.ndarray
    dtype: torch.dtype = torch.int64
    room: int | None = None  # None: as many as there are


class Staging:
    """A block of device memory [reserved + capacity] of 64-bit words that columns are laid into, in order.

    Two pinned buffers take turns, so that one can be filled while the copy from the other awaits its turn on the
    device: `load` may be called while the step of the last `load` is in flight, but not that of the one before.
    """

    def __init__(self, reserved: int, capacity: int, device: torch.device) -> None:
        self._hosts = [torch.empty(capacity, dtype=torch.int64, pin_memory=device.type == "cuda") for _ in range(2)]
        self.memory = torch.zeros(reserved + capacity, dtype=torch.int64, device=device)
        self._target = self.memory[reserved:]

    def load(self, columns: Sequence[Column]) -> list[Tensor]:
        """The columns on the device: views that the next `load` overwrites."""
        self._hosts.reverse()
        host, begin, views = self._hosts[0], 0, []
        for column in columns:
            room = len(column.values) if column.room is None else column.room
            end = begin + -(-room * column.dtype.itemsize // WORD_BYTES)
            assert len(column.values) <= room and end <= len(host), (len(column.values), room, end, len(host))
            host[begin:end].view(column.dtype).numpy()[: len(column.values)] = column.values
            views.append(self._target[begin:end].view(column.dtype)[: len(column.values)])
            begin = end
        self._target[:begin].copy_(host[:begin], non_blocking=True)
        return views


def upload(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the values on the device, for what is too rare to be staged."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class Fetch:
    """Tensors on their way to the host, as they are now on the current stream."""

    def __init__(self, *tensors: Tensor) -> None:
        on_gpu = tensors[0].is_cuda
        self._hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=on_gpu) for t in tensors]
        for host, tensor in zip(self._hosts, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> list[list]:
        """Their values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [host.tolist() for host in self._hosts]
