"""`Pairing`: the tensors that every pair op begins with, in the order of its schema (docs/design.md, "The pair contract")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairing(NamedTuple):
    """z_ij = row_scale_i column_scale_j <q_i, k_j>, and what makes a pair positive, negative or excluded."""

    q: Tensor
    k: Tensor
    row_scale: Tensor
    column_scale: Tensor | None = None
    row_valid: Tensor | None = None
    column_valid: Tensor | None = None
    positive_rows: Tensor | None = None
    positive_columns: Tensor | None = None
    positive_diagonals: tuple[int, ...] = ()
    excluded_rows: Tensor | None = None
    excluded_columns: Tensor | None = None
    excluded_diagonals: tuple[int, ...] = ()
    low: Tensor | None = None
    high: Tensor | None = None
    guide_q: Tensor | None = None
    guide_k: Tensor | None = None
    guide_limit: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """M rows and N columns."""
        return self.q.shape[0], self.k.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the operands live."""
        return self.q.device

    @property
    def statistic_dtype(self) -> torch.dtype:
        """float32, or float64 for float64 operands."""
        return torch.promote_types(self.q.dtype, torch.float32)


PAIRING_LENGTH = len(Pairing._fields)


def check_pairing(p: Pairing) -> None:
    """Kernels read all tensors by the shapes of q and k: another one would be read out of bounds."""
    if p.q.dim() != 2 or p.k.dim() != 2 or p.q.shape[1] != p.k.shape[1]:
        raise ValueError(f"q and k must be [M, D] and [N, D], got {tuple(p.q.shape)} and {tuple(p.k.shape)}")
    if p.q.dtype != p.k.dtype:
        raise TypeError(f"q and k must have one dtype, got {p.q.dtype} and {p.k.dtype}")
    m, n = p.shape
    for name, length in (
        ("row_scale", m), ("column_scale", n), ("row_valid", m), ("column_valid", n), ("positive_columns", n),
        ("excluded_columns", n), ("low", m), ("high", m), ("guide_limit", m),
    ):  # fmt: skip
        value: Tensor | None = getattr(p, name)
        if value is not None and value.shape != (length,):
            raise ValueError(f"{name} must have shape [{length}], got {tuple(value.shape)}")
    for name in ("positive", "excluded"):
        rows, columns = getattr(p, f"{name}_rows"), getattr(p, f"{name}_columns")
        shape = (m,) if columns is not None else (m, -(-n // 32))
        for ids in (rows, columns):
            if ids is not None and ids.dtype != torch.int32:
                raise TypeError(f"{name} ids must be int32, got {ids.dtype}")
        if (rows is None and columns is not None) or (rows is not None and rows.shape != shape):
            raise ValueError(
                f"{name}_rows must have shape {list(shape)}, got {None if rows is None else list(rows.shape)}"
            )
        if len(getattr(p, f"{name}_diagonals")) > 2:
            raise ValueError(f"{name} takes two diagonals at most, got {getattr(p, f'{name}_diagonals')}")
    guides = [p.guide_q, p.guide_k, p.guide_limit]
    if any(g is None for g in guides) != all(g is None for g in guides):
        raise ValueError("guide_q, guide_k and guide_limit go together")
    if p.guide_q is not None and p.guide_k is not None:
        a, b = p.guide_q, p.guide_k
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != m or b.shape[0] != n or a.shape[1] != b.shape[1]:
            raise ValueError(f"guides must be [{m}, E] and [{n}, E], got {tuple(a.shape)} and {tuple(b.shape)}")
        if a.dtype != b.dtype:
            raise TypeError(f"guides must have one dtype, got {a.dtype} and {b.dtype}")
