"""From the gradient of <q, k>, a chunk of rows at a time, to the gradients of q, k and the scales: what the backwards share.

Two library GEMMs read the scratch. The scales cost nothing more: z is linear in a_i, so a_i da_i = <q_i, dq_i>, in fp32
before dq is rounded; where a scale is 0, the scratch is made with a 1 in its place and what it adds to dq and dk is dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .common import on_device
from .linear_row_stats import add_product, lift_of, whole_tiles
from .pair_launch import Launch

Q, K, ROW_SCALE, COLUMN_SCALE = 1, 2, 4, 8  # bits of `needs`
#: Rows of the scratch are chosen so that it takes about this much.
SCRATCH_BYTES = 256 << 20


def largest(*tensors: Tensor) -> Tensor:
    """The largest finite absolute value of all, a device scalar."""
    return torch.stack([torch.where(t.isfinite(), t.abs(), 0.0).amax().float() for t in tensors if t.numel()]).amax()


def _valid(x: Tensor, valid: Tensor | None) -> Tensor:
    """Rows that are not valid read as zeros: 0 times whatever they hold may be NaN."""
    return x if valid is None else torch.where((valid != 0)[:, None], x, 0.0)


class _Side:
    """One operand of the GEMMs: its rows that count, and the scale in the form that divides."""

    def __init__(self, x: Tensor, scale: Tensor | None, valid: Tensor | None, differentiate: bool) -> None:
        self.x = self.operand = _valid(x, valid)
        self.scale = self.factor = None
        if scale is not None:
            self.factor = scale if valid is None else torch.where(valid != 0, scale, 0.0)
            if differentiate:
                self.scale, self.operand = scale, _valid(self.x, scale)
                self.factor = torch.where(self.factor == 0, 1.0, self.factor)

    def scale_gradient(self, gradient: Tensor, first: int, valid: Tensor | None) -> Tensor:
        """<x, dx> / scale of the rows of `gradient`, which begin at `first`."""
        part = slice(first, first + len(gradient))
        made = (self.x[part].float() * gradient).sum(1) / self.factor[part]
        return made if valid is None else torch.where(valid[part] != 0, made, 0.0)

    def dropped(self, gradient: Tensor, first: int) -> Tensor:
        """`gradient`, 0 where the scale is 0."""
        return gradient if self.scale is None else _valid(gradient, self.scale[first : first + len(gradient)])


class PairGradients:
    """The chunks of one backward. `row_factor` and `column_factor` multiply the gradient of z in the scratch, as does *lift."""

    def __init__(
        self, launch: Launch, needs: int, upstream: tuple[Tensor, ...], gain: float | Tensor, chunk: int | None
    ) -> None:
        """upstream: what multiplies terms of at most `gain`; fp16 is lifted by their size."""
        self.launch = launch
        self.needs = needs if launch.column_scale is not None else needs & ~COLUMN_SCALE
        self.rows = _Side(launch.q, launch.row_scale, launch.row_valid, bool(self.needs & ROW_SCALE))
        self.columns = _Side(launch.k, launch.column_scale, launch.column_valid, bool(self.needs & COLUMN_SCALE))
        self.row_factor, self.column_factor = self.rows.factor, self.columns.factor
        self.lift = self.unlift = None
        if launch.q.dtype == torch.float16:
            bound = gain * largest(*upstream) * largest(self.row_factor)
            if self.column_factor is not None:
                bound = bound * largest(self.column_factor)
            self.lift, self.unlift = lift_of(bound, torch.float16)
        rows = chunk or max(1024, SCRATCH_BYTES // (launch.n * launch.q.element_size()))
        self.chunk = min(launch.m, whole_tiles(rows, launch.tile.rows))

    def run(
        self, write: Callable[[Tensor, int, int], None], weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(dq, dk, drow_scale, dcolumn_scale). write(scratch [count, N], first, count) makes the gradient of <q, k> of these
        rows; weight [diagonals, M] is that of the pairs on diagonals."""
        x, needs = self.launch, self.needs
        q, k = self.rows.operand, self.columns.operand
        row_side, column_side = bool(needs & (Q | ROW_SCALE)), bool(needs & (K | COLUMN_SCALE))
        dq = x.q.new_empty(x.q.shape if needs & Q else (0,))
        dk = x.empty(*x.k.shape).zero_() if column_side else x.empty(0)
        row_scale = x.empty(x.m if needs & ROW_SCALE else 0)
        column_scale = x.empty(0)
        memory = x.q.new_empty(self.chunk * x.n if row_side or column_side else 0)
        with on_device(x.q):
            for first in range(0, x.m, self.chunk) if row_side or column_side else ():
                count = min(self.chunk, x.m - first)
                scratch = memory[: count * x.n].view(count, x.n)
                write(scratch, first, count)
                if row_side:
                    part = x.empty(count, x.d).zero_()
                    add_product(part, scratch, k, self.unlift)
                    self._add_diagonals(part, first, first, count, weight, k, 1)
                    if needs & ROW_SCALE:
                        row_scale[first : first + count] = self.rows.scale_gradient(part, first, x.row_valid)
                    if needs & Q:
                        dq[first : first + count] = self.rows.dropped(part, first)
                if column_side:
                    add_product(dk, scratch.T, q[first : first + count], self.unlift)
                    self._add_diagonals(dk, 0, first, count, weight, q, 0)
            if needs & COLUMN_SCALE:
                column_scale = self.columns.scale_gradient(dk, 0, x.column_valid)
        dk = self.columns.dropped(dk, 0).to(x.k.dtype) if needs & K else x.k.new_empty(0)
        return dq, dk, row_scale, column_scale

    def _add_diagonals(
        self, total: Tensor, base: int, first: int, count: int, weight: Tensor | None, x: Tensor, to_rows: int
    ) -> None:
        """Add weight_i x_j to row i of `total` (to_rows), or weight_i x_i to row j, for the pairs (i, j) on diagonals with i in
        first : first + count; `total` begins at row `base`."""
        if weight is None:
            return
        for offset, w in zip(self.launch.positive_diagonals, weight, strict=True):
            start, stop = max(first, -offset), min(first + count, self.launch.n - offset)
            if start < stop:
                here, there = (0, offset) if to_rows else (offset, 0)
                total[start + here - base : stop + here - base] += (
                    w[start:stop, None] * x[start + there : stop + there].float()
                )
