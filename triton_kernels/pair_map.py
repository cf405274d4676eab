"""pair_map and its backward: allocation and launches. The backward is that of pair_stats with another gradient of z."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .common import on_device, row_table
from .linear_row_stats import Tile, split_count
from .pair_gradient import PairGradients, largest
from .pair_launch import Launch, numbers, padded
from .pair_map_kernels import (
    NUM_MAP_STATS,
    SQUARED_HINGE,
    pair_map_diagonal_kernel,
    pair_map_gradient_kernel,
    pair_map_kernel,
    pair_map_merge_kernel,
)


def _largest_slope(launch: Launch, function: int, *thresholds: Tensor | None) -> Tensor | float:
    """A bound of phi', by which fp16 gradients are lifted less."""
    if function != SQUARED_HINGE.value or launch.q.dtype != torch.float16:
        return 1.0
    z = [largest(t.float().norm(dim=1)) for t in (launch.q, launch.k)] + [largest(launch.row_scale)]
    z += [largest(launch.column_scale)] if launch.column_scale is not None else []
    moved = [largest(t) for t in thresholds if t is not None]
    return 2.0 * (torch.stack(z).prod() + sum(moved) + 1.0)


def pair_map(
    pairing: tuple[Any, ...],
    neg_threshold: Tensor | None,
    pos_threshold: Tensor | None,
    function: int,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
    tma: bool | None = None,
) -> Tensor:
    """The table [8, M]."""
    launch = Launch(pairing, tile, tma, extras=1)  # phi and phi' at once
    m, n, function = launch.m, launch.n, int(function)
    neg_threshold, pos_threshold = numbers(neg_threshold), numbers(pos_threshold)
    row_blocks = triton.cdiv(m, launch.tile.rows)
    splits = splits or split_count(launch.q, row_blocks, triton.cdiv(n, launch.tile.columns))
    part, table = launch.empty(NUM_MAP_STATS.value, splits, m), launch.empty(NUM_MAP_STATS.value, m)
    scores, there = launch.diagonal_scores()
    count = None if launch.general else launch.count_of(launch.column_valid, n)
    with on_device(launch.q):
        pair_map_kernel[(row_blocks * splits,)](
            *launch.operands(), *launch.classes, neg_threshold, pos_threshold, part, splits, *launch.sizes, *launch.strides,
            *launch.offsets, FUNCTION=function, **launch.options,
        )  # fmt: skip
        pair_map_merge_kernel[(triton.cdiv(m, 128),)](
            part, table, scores, there, launch.row_valid, launch.column_valid, count, pos_threshold, splits, m, n,
            *padded(launch.removed, 4), FUNCTION=function, GENERAL=launch.general, PD=0 if scores is None else len(scores),
            REMOVED=len(launch.removed), BLOCK=128,
        )  # fmt: skip
    return table


def pair_map_backward(
    grad: Tensor,
    pairing: tuple[Any, ...],
    neg_threshold: Tensor | None,
    pos_threshold: Tensor | None,
    function: int,
    needs: int,
    *,
    tile: Tile | None = None,
    chunk: int | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, drow_scale, dcolumn_scale, each empty unless needed; `chunk` rows of the scratch at a time."""
    launch = Launch(pairing, tile, tma, gradient=True)
    function = int(function)
    neg_threshold, pos_threshold, grad = numbers(neg_threshold), numbers(pos_threshold), row_table(grad.float())
    gain = _largest_slope(launch, function, neg_threshold, pos_threshold)
    gradients = PairGradients(launch, needs, (grad[:2],), gain, chunk)
    row_factor, column_factor = gradients.row_factor, gradients.column_factor

    def write(scratch: Tensor, first: int, count: int) -> None:
        grid = (triton.cdiv(count, launch.tile.rows) * triton.cdiv(launch.n, launch.tile.columns),)
        pair_map_gradient_kernel[grid](
            *launch.operands(), *launch.classes, neg_threshold, pos_threshold, grad, row_factor, column_factor,
            gradients.lift, scratch, first, count, *launch.sizes, *launch.strides, grad.stride(0), *launch.offsets,
            FUNCTION=function, **launch.options,
        )  # fmt: skip

    weight = None
    scores, there = launch.diagonal_scores()
    if scores is not None:
        weight = torch.empty_like(scores)
        with on_device(launch.q):
            pair_map_diagonal_kernel[(triton.cdiv(launch.m, 128), len(scores))](
                scores, there, grad, pos_threshold, row_factor, column_factor, weight, launch.m, grad.stride(0),
                *launch.offsets[:2], FUNCTION=function, BLOCK=128,
            )  # fmt: skip
    return gradients.run(write, weight)
