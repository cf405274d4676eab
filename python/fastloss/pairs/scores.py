"""The dense matrix of a few rows and the classes of its pairs: what the reference of every pair op is made of.

float64 stays float64, everything else accumulates in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import PairNeeds
from ..reference import accumulator
from .pairing import PAIRING_LENGTH, Pairing, check_pairing

#: Numbers of the matrix that are held at a time.
BLOCK = 1 << 22


def _member(
    rows: Tensor | None, columns: Tensor | None, diagonals: tuple[int, ...], start: int, stop: int, n: int,
    device: torch.device,
) -> Tensor | None:  # fmt: skip
    """bool [stop - start, n] of the pairs that belong to a class, or None: no pair does."""
    found: Tensor | None = None

    def add(more: Tensor) -> None:
        nonlocal found
        found = more if found is None else found | more

    if rows is not None and columns is not None:
        add(rows[start:stop, None] == columns[None, :])
    elif rows is not None:
        bits = (rows[start:stop, :, None] >> torch.arange(32, device=device, dtype=torch.int32)) & 1
        add(bits.flatten(1)[:, :n] != 0)
    if diagonals:
        difference = torch.arange(n, device=device)[None, :] - torch.arange(start, stop, device=device)[:, None]
        for offset in diagonals:
            add(difference == offset)
    return found


class Scores(NamedTuple):
    """Rows start..stop of the matrix: dots <q_i, k_j>, z, and the classes."""

    start: int
    stop: int
    dots: Tensor
    z: Tensor
    negative: Tensor
    positive: Tensor


def valid_rows(x: Tensor, valid: Tensor | None) -> Tensor:
    x = accumulator(x)
    return x if valid is None else torch.where((valid != 0)[:, None], x, 0.0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in its own dtype: autocast, which is on while an op runs, would round it to 16 bits."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def scores(p: Pairing, start: int, stop: int) -> Scores:
    """The matrix of rows start..stop."""
    n, device = p.k.shape[0], p.device
    q = valid_rows(p.q[start:stop], None if p.row_valid is None else p.row_valid[start:stop])
    dots = product(q, valid_rows(p.k, p.column_valid).t())
    z = p.row_scale[start:stop, None].to(dots.dtype) * dots
    if p.column_scale is not None:
        z = z * p.column_scale.to(dots.dtype)
    excluded = _member(p.excluded_rows, p.excluded_columns, p.excluded_diagonals, start, stop, n, device)
    positive = _member(p.positive_rows, p.positive_columns, p.positive_diagonals, start, stop, n, device)
    allowed = torch.ones_like(dots, dtype=torch.bool) if excluded is None else ~excluded
    if p.row_valid is not None:
        allowed = allowed & (p.row_valid[start:stop, None] != 0)
    if p.column_valid is not None:
        allowed = allowed & (p.column_valid != 0)
    positive = torch.zeros_like(allowed) if positive is None else positive & allowed
    negative = allowed & ~positive
    if p.low is not None:  # what is not below is kept, so that a NaN stays and is seen
        negative = negative & ~(z.detach() < p.low[start:stop, None])
    if p.high is not None:
        negative = negative & ~(z.detach() > p.high[start:stop, None])
    if p.guide_q is not None and p.guide_k is not None and p.guide_limit is not None:
        guide = product(accumulator(p.guide_q[start:stop]), accumulator(p.guide_k).t())
        negative = negative & ~(guide.detach() > p.guide_limit[start:stop, None])
    return Scores(start, stop, dots, z, negative, positive)


def blocks(p: Pairing) -> Iterator[Scores]:
    """The whole matrix, a block of rows at a time."""
    m, n = p.shape
    step = max(1, BLOCK // max(n, 1))
    for start in range(0, m, step):
        yield scores(p, start, min(m, start + step))


def split(args: tuple[Any, ...]) -> tuple[Pairing, tuple[Any, ...]]:
    """The arguments of a pair op: its pairing, checked, and the rest."""
    p = Pairing(*args[:PAIRING_LENGTH])
    check_pairing(p)
    return p, args[PAIRING_LENGTH:]


class Gradients:
    """Sums up dq, dk and the gradients of the scales from blocks of dz."""

    def __init__(self, p: Pairing, needs: int) -> None:
        self.p, self.needs = p, needs
        (m, n), d = p.shape, p.q.shape[1]
        like = p.q.new_zeros((), dtype=p.statistic_dtype)
        self.dq = like.new_zeros((m, d) if needs & PairNeeds.Q else (0,))
        self.dk = like.new_zeros((n, d) if needs & PairNeeds.K else (0,))
        self.rows = like.new_zeros(m if needs & PairNeeds.ROW_SCALE else 0)
        self.columns = like.new_zeros(n if needs & PairNeeds.COLUMN_SCALE and p.column_scale is not None else 0)

    def add(self, s: Scores, dz: Tensor) -> None:
        """Take the gradient of these rows of the matrix."""
        p, rows = self.p, slice(s.start, s.stop)
        a = p.row_scale[rows, None].to(dz.dtype)
        b = dz.new_ones(()) if p.column_scale is None else p.column_scale.to(dz.dtype)
        ds = dz * a * b
        used = s.negative | s.positive
        dots = torch.where(used, s.dots, 0.0)
        if self.needs & PairNeeds.Q:
            self.dq[rows] = product(ds, valid_rows(p.k, p.column_valid))
        if self.needs & PairNeeds.K:
            valid = None if p.row_valid is None else p.row_valid[rows]
            self.dk += product(ds.t(), valid_rows(p.q[rows], valid))
        if len(self.rows):
            self.rows[rows] = (dz * b * dots).sum(1)
        if len(self.columns):
            self.columns += (dz * a * dots).sum(0)

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(dq, dk, drow_scale, dcolumn_scale)."""
        return self.dq.to(self.p.q.dtype), self.dk.to(self.p.k.dtype), self.rows, self.columns
