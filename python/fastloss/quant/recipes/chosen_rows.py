"""Rows of a table, with a gradient that is summed in one order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...pairs.edges import gather_sum


def rows_sum(x: Tensor, index: Tensor, count: int) -> Tensor:
    """[count, D]: the sum of the rows of x [M, D] whose index is j, for every j; in the order of the rows, without
    atomics."""
    rows = torch.arange(x.shape[0], device=x.device)
    return gather_sum(x.contiguous(), x.new_ones(x.shape[0]), rows, index, count)


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = table.shape[0]
        return table[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _Summed.apply(grad, index, ctx.count), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(index)
        return rows_sum(x, index, count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _Chosen.apply(grad, index), None, None


def chosen_rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for int64 [M]: the gradient of a row of the table is the sum over where it was chosen, bit-equal from
    run to run on a GPU too."""
    return _Chosen.apply(table, index)
