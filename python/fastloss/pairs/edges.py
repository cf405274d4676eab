"""The dot products along a list of edges, differentiable: sparse positives, hard negatives of a row's own, teachers' pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import _differentiate, batched, can_look, forward_mode_active, functorch_active
from ..reference import accumulator
from . import ops  # noqa: F401  (ops registers what torch.ops.fastloss holds)

_ops = torch.ops.fastloss


def _compose(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor]:
    return ((accumulator(q[rows]) * accumulator(k[columns])).sum(1),)


def gather_sum(x: Tensor, weight: Tensor, source: Tensor, target: Tensor, count: int) -> Tensor:
    """y_i = sum over the edges e with target_e = i of weight_e x_(source_e), [count, D], in the dtype of x."""
    order = torch.argsort(target, stable=True)  # stable: the sum has one order, so the result one value
    pointer = torch.searchsorted(target[order], torch.arange(count + 1, device=x.device))
    return _ops.edge_sum.default(x, weight[order], pointer, source[order])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, rows, columns = ctx.saved_tensors
    if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(grad)):
        dq, dk = _differentiate(lambda q, k: _compose(q, k, rows, columns), (q, k), (grad,))
        return dq, dk, None, None
    dq = dk = None
    if ctx.needs_input_grad[0]:
        dq = gather_sum(k, grad, columns, rows, q.shape[0])
    if ctx.needs_input_grad[1]:
        dk = gather_sum(q, grad, rows, columns, k.shape[0])
    return dq, dk, None, None


class _EdgeDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        _setup(ctx, inputs, inputs[0])
        return _ops.edge_dot.default(*inputs)

    backward = staticmethod(_backward)


class _EdgeDotFunctorch(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Tensor) -> Tensor:
        return _ops.edge_dot.default(*inputs)

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def _check_edges(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> None:
    if q.dim() != 2 or k.dim() != 2 or q.shape[1] != k.shape[1]:
        raise ValueError(f"q and k must be [M, D] and [N, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise TypeError(f"q and k must have one floating dtype, got {q.dtype} and {k.dtype}")
    for name, ids, limit in (("rows", rows, q.shape[0]), ("columns", columns, k.shape[0])):
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be int64 or int32 ids, got {ids.dtype}")
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and not functorch_active() and ids.numel():
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= limit:
                raise IndexError(f"{name} must be in [0, {limit}), got ids from {low} to {high}")
    if rows.dim() != 1 or rows.shape != columns.shape:
        raise ValueError(f"rows and columns must be [E] both, got {tuple(rows.shape)} and {tuple(columns.shape)}")


def edge_dot(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """<q_r, k_c> for each edge (r, c): float32 [E] (float64 for float64), differentiable with respect to q and k.

    Args:
        q: [M, D]; k: [N, D] of the same dtype. Products and sums are float32, float64 for float64.
        rows: [E] int64 ids in [0, M); columns: [E] in [0, N). Any order, also more than once.

    The gradient is summed by row and by column in the order of the edges: bit-equal from run to run. Nothing of size [E, D] is
    stored. Raises ValueError, TypeError, and on a CPU IndexError for ids out of range.
    """
    _check_edges(q, k, rows, columns)
    rows, columns = rows.long(), columns.long()
    if forward_mode_active():
        return _compose(q, k, rows, columns)[0]
    return (_EdgeDotFunctorch if functorch_active() else _EdgeDot).apply(q, k, rows, columns)


def edge_dot_csr(q: Tensor, k: Tensor, pointer: Tensor, columns: Tensor) -> Tensor:
    """`edge_dot` along a CSR list: row i has the columns[pointer[i]:pointer[i + 1]]. pointer: [M + 1] integers from 0 to E,
    falling nowhere (ValueError otherwise; its numbers are looked at on a CPU)."""
    if pointer.shape != (q.shape[0] + 1,):
        raise ValueError(f"pointer must have shape [{q.shape[0] + 1}], got {tuple(pointer.shape)}")
    if pointer.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"pointer must be int64 or int32, got {pointer.dtype}")
    if can_look(pointer):
        first, last = int(pointer[0]), int(pointer[-1])
        if (first, last) != (0, columns.shape[0]) or bool((pointer.diff() < 0).any()):
            raise ValueError(
                f"pointer must rise from 0 to {columns.shape[0]}, got {pointer.tolist()[:8]} from {first} to {last}"
            )
    rows = torch.repeat_interleave(
        torch.arange(q.shape[0], device=q.device), pointer.diff(), output_size=columns.shape[0]
    )
    return edge_dot(q, k, rows, columns)
