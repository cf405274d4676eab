"""pair_stats and its backward: allocation and launches. Rows go in chunks, so that no buffer grows with M * N.

Forward: one sweep for rows and columns (pair_stats_kernel), whose partial states pair_merge_kernel puts together. Backward:
a scratch of the gradient of <q, k> for a chunk of rows at a time (pair_gradient_kernel), and two library GEMMs that read it.
Nothing here waits for the GPU, and no sum depends on the order in which programs run.

Predictions for an H200 (790 TFLOP/s, 4.3 TB/s), bf16, diagonal positives, both directions. Not yet run. A unit is 2 M N D FLOP.

    32768 x 768 (a unit: 1.65 TFLOP, 2.1 ms)    forward 3.1-3.9 ms; backward 8.3-9.5 ms; together 11.5-13.4 ms
    8192 x 256 (a unit: 34 GFLOP, 0.044 ms)     forward 0.12-0.16 ms; backward 0.30-0.40 ms; together 0.42-0.56 ms

Forward: one unit in tiles of 128 x 128, whose product takes 6.1k clocks of an SM at D = 768 and 2k at D = 256; their sums take
about 2.4k more, not overlapped with one block an SM; partial states of columns are 67 MB each way. Backward: the same unit and
2.1 GB of scratch (0.5 ms of writing, partly hidden), two library GEMMs (2.3 ms each), and 1.6 GB for dK in fp32 over 8 chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .common import on_device, row_table
from .linear_row_stats import Tile, split_count
from .pair_gradient import PairGradients
from .pair_launch import Launch, numbers, padded
from .pair_stats_backward_kernels import pair_diagonal_gradient_kernel, pair_gradient_kernel
from .pair_stats_kernels import (
    COLUMNS,
    MEAN,
    NUM_COLUMN_STATS,
    NUM_ROW_STATS,
    SECOND,
    pair_merge_kernel,
    pair_stats_kernel,
)

#: Partial states of columns that are held at a time.
COLUMN_BYTES = 128 << 20
MERGE_BLOCK = 128


class _Merge:
    """pair_merge_kernel with all that does not change between chunks."""

    def __init__(self, launch: Launch, scores: Tensor | None, there: Tensor | None, want: int, second: float) -> None:
        self.launch, self.apart, self.want, self.second = launch, (scores, there), want, second

    def __call__(self, part: Tensor, table: Tensor, rows: bool, first: bool = True, last: bool = True) -> None:
        x = self.launch
        size, other = (x.m, x.n) if rows else (x.n, x.m)
        valid = (x.row_valid, x.column_valid) if rows else (x.column_valid, x.row_valid)
        count = x.count_of(valid[1], other) if last and not x.general else None
        shifts = [0, 0] if rows else x.offsets[:2]
        away = [offset if rows else -offset for offset in x.removed]
        pair_merge_kernel[(triton.cdiv(size, MERGE_BLOCK),)](
            part, table, *self.apart, *valid, count, part.shape[1], self.second, size, other, x.m, *shifts,
            *padded(away, 4), ROWS=rows, WANT=self.want, GENERAL=x.general, POSITIVE=x.in_tile,
            PD=len(x.positive_diagonals) if x.diagonals_apart else 0, REMOVED=len(away), FIRST=first, LAST=last,
            BLOCK=MERGE_BLOCK,
        )  # fmt: skip


def _extras(boost: Tensor | None, want: int) -> int:
    return (boost is not None) + bool(want & MEAN.value) + bool(want & SECOND.value)


def pair_stats(
    pairing: tuple[Any, ...],
    boost: Tensor | None,
    margin: Tensor | None,
    want: int,
    second: float,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
    chunk: int | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """rows [9, M] and columns [7, N] ([7, 0] if not wanted); `chunk` row blocks have their columns merged at a time."""
    want, boost, margin = int(want), numbers(boost), numbers(margin)
    columns_wanted = bool(want & COLUMNS.value)
    launch = Launch(pairing, tile, tma, _extras(boost, want), margin, columns_wanted)
    m, n = launch.m, launch.n
    row_blocks = triton.cdiv(m, launch.tile.rows)
    limit = max(8, COLUMN_BYTES // (4 * NUM_COLUMN_STATS * n)) if columns_wanted else row_blocks
    chunk = min(row_blocks, chunk or limit)
    splits = splits or split_count(launch.q, chunk, triton.cdiv(n, launch.tile.columns))
    rows, columns = launch.empty(NUM_ROW_STATS, m), launch.empty(NUM_COLUMN_STATS, n if columns_wanted else 0)
    row_part = launch.empty(NUM_ROW_STATS, splits, m)
    column_memory = launch.empty(NUM_COLUMN_STATS * chunk * n if columns_wanted else 0)
    merge = _Merge(launch, *launch.diagonal_scores(margin), want, second)
    with on_device(launch.q):
        for first in range(0, row_blocks, chunk):
            blocks = min(chunk, row_blocks - first)
            column_part = column_memory[: NUM_COLUMN_STATS * blocks * n if columns_wanted else 0]
            pair_stats_kernel[(blocks * splits,)](
                *launch.operands(), *launch.classes, boost, margin, row_part, column_part, first, blocks, splits, second,
                *launch.sizes, *launch.strides, *launch.offsets, WANT=want, **launch.options,
            )  # fmt: skip
            if columns_wanted:
                part = column_part.view(NUM_COLUMN_STATS, blocks, n)
                merge(part, columns, False, first == 0, first + blocks == row_blocks)
        merge(row_part, rows, True)
    return rows, columns


def pair_stats_backward(
    row_grad: Tensor,
    column_grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    pairing: tuple[Any, ...],
    boost: Tensor | None,
    margin: Tensor | None,
    want: int,
    second: float,
    needs: int,
    *,
    tile: Tile | None = None,
    chunk: int | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, drow_scale, dcolumn_scale, each empty unless needed; `chunk` rows of the scratch at a time."""
    want, boost, margin = int(want), numbers(boost), numbers(margin)
    launch = Launch(pairing, tile, tma, _extras(boost, want), margin, bool(want & COLUMNS.value), gradient=True)
    tables = tuple(row_table(t.float()) for t in (rows, row_grad, columns, column_grad))
    table_strides = tuple(t.stride(0) for t in tables)
    read = (row_grad[1], row_grad[3:5], row_grad[7:9], column_grad[1], column_grad[3:5])
    gradients = PairGradients(launch, needs, read, max(1.0, second), chunk)
    row_factor, column_factor = gradients.row_factor, gradients.column_factor

    def write(scratch: Tensor, first: int, count: int) -> None:
        grid = (triton.cdiv(count, launch.tile.rows) * triton.cdiv(launch.n, launch.tile.columns),)
        pair_gradient_kernel[grid](
            *launch.operands(), *launch.classes, boost, margin, *tables, row_factor, column_factor, gradients.lift, scratch,
            first, count, second, *launch.sizes, *launch.strides, *table_strides, *launch.offsets, WANT=want,
            **launch.options,
        )  # fmt: skip

    weight = None
    scores, there = launch.diagonal_scores(margin)
    if scores is not None:
        weight = torch.empty_like(scores)
        with on_device(launch.q):
            pair_diagonal_gradient_kernel[(triton.cdiv(launch.m, 128), len(scores))](
                scores, there, *tables, row_factor, column_factor, weight, launch.m, launch.n, *table_strides,
                *launch.offsets[:2], WANT=want, BLOCK=128,
            )  # fmt: skip
    return gradients.run(write, weight)
