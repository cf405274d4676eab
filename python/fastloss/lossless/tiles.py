"""The `tiles` layout: units of 16 x 128 in the order of mma.m16n8k16's A fragments (docs/design.md)."""

from __future__ import annotations

from torch import Tensor


def to_tiles(x: Tensor, columns: int) -> Tensor:
    """The 1-D row-major numbers of a matrix of `columns` columns (whole 16-row bands), in tile order."""
    # row = 16 R + 8 r0 + g; column = 128 C + 16 i + 8 r1 + 2 t + h; lane = 4 g + t; number = 8 i + 4 r1 + 2 r0 + h
    parts = x.reshape(-1, 2, 8, columns // 128, 8, 2, 4, 2)  # R r0 g C i r1 t h
    return parts.permute(0, 3, 2, 6, 4, 5, 1, 7).reshape(-1)  # R C g t i r1 r0 h


def from_tiles(x: Tensor, columns: int) -> Tensor:
    """The other way round."""
    parts = x.reshape(-1, columns // 128, 8, 4, 8, 2, 2, 2)  # R C g t i r1 r0 h
    return parts.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(-1)  # R r0 g C i r1 t h
