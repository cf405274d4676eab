"""`Spill`: bytes that wait on the disk until it is known where they belong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

import torch
from torch import Tensor


class Spill:
    """Keeps tensors of bytes in `file`, which is open for writing and reading. Several threads may use it at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._lock, self._end = file, threading.Lock(), 0

    def keep(self, part: Tensor) -> Callable[[], Tensor]:
        """Write a 1-D uint8 tensor of the CPU; what reads it back, into memory of its own."""
        with self._lock:
            at = self._file.seek(self._end)
            self._end += self._file.write(part.numpy().data)
        return partial(self._read, at, part.numel())

    def _read(self, at: int, count: int) -> Tensor:
        part = torch.empty(count, dtype=torch.uint8, device="cpu")
        with self._lock:
            self._file.seek(at)
            if self._file.readinto(part.numpy().data) != count:  # type: ignore[attr-defined]
                raise OSError("bytes that were written a moment ago are not there any more")
        return part
