"""CRC-32C by the fastest backend: of a tensor's bytes, and of a few bytes."""

from __future__ import annotations

from torch import Tensor

from .. import registry
from .crc32c_table import of_bytes

__all__ = ["of", "of_blocks", "of_bytes"]


def of(part: Tensor) -> int:
    """crc32c of a 1-D uint8 tensor."""
    return int(registry.run("crc32c", part, max(part.numel(), 1))[0]) if part.numel() else 0


def of_blocks(part: Tensor, block: int) -> Tensor:
    """crc32c of every `block` bytes (int64)."""
    return registry.run("crc32c", part, block)
