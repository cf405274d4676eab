"""Mode C for any loss that is a sum over rows: the user's function is called for each chunk of rows in the forward.

On the chunk's statistics, a few numbers a row, autograd gives the coefficients of the tile gradient; the row kernel writes
it over the logits, and two GEMMs take it away. So the logits are made once, where mode R makes them twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import registry
from .autograd import Options, _differentiate, forward_mode_active, functorch_active, keeps_graph, linear_row_stats
from .chunked import Chunked, RowKernels
from .contract import Needs
from .fused import denominator
from .statistics import RowStats, coefficients, largest, pack

Operands = Any  # the tuple x, w, bias, target, prob, column_weight, temperature

_chunked = Chunked(
    RowKernels(
        lambda *a: registry.run("row_stats", *a),
        lambda *a: registry.run("row_stats_backward", *a),
        lambda *a: registry.run("cross_entropy", *a),
    )
)


def _share(operands: Operands, o: Options, reduction: str) -> Tensor:
    x, target = operands[0], operands[3]
    like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return 1 / denominator(target, x.shape[0], None, o.ignore_index, reduction, like)


def _sum(s: RowStats, loss: Callable[[RowStats], Tensor]) -> Tensor:
    rows = loss(s)
    if rows.shape != s.shape:
        raise ValueError(f"a row loss returns one value a row, shape {tuple(s.shape)}; got {tuple(rows.shape)}")
    return (rows if s.target is None else torch.where(s.valid, rows, 0.0)).sum()


class _Separable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, rest: Operands, o: Options, loss: Any, reduction: str,
        limit: int, needs: int,
    ) -> Tensor:  # fmt: skip
        operands = (x, w, bias, *rest)
        share, column_weight = _share(operands, o, reduction), rest[2]

        def chunk(
            stats: Tensor, argmax: Tensor, target: Tensor | None, prob: Tensor | None, warm: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            soft = prob is not None
            with torch.enable_grad():
                constant = pack(
                    stats, largest(stats, o.want, soft), argmax, target, soft, w.shape[0], o, column_weight, warm
                )
                if loss(constant).requires_grad:
                    raise ValueError(
                        "separable=True: the loss closes over a tensor that needs a gradient; use separable=False"
                    )
                table = stats.detach().requires_grad_()
                top = largest(stats, o.want, soft).requires_grad_()
                s = pack(table, top, argmax, target, soft, w.shape[0], o, column_weight, warm)
                value = _sum(s, loss) * share
                g_table, g_top = torch.autograd.grad(value, (table, top), allow_unused=True)
            g_table = torch.zeros_like(stats) if g_table is None else g_table
            return value.detach(), coefficients(g_table, g_top, stats, target is not None, soft, warm, o.want)

        total, dx, dw, db = _chunked.linear_row_loss(*(*operands, *o, needs, limit, chunk))
        ctx.save_for_backward(x, w, bias, *rest, dx, dw, db)
        ctx.call, ctx.needs = (o, loss, reduction, limit), needs
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, bias, *rest, dx, dw, db = ctx.saved_tensors
        nothing = (None,) * 6
        if torch.is_grad_enabled():

            def compose(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor]:
                return (_recompute((x, w, bias, *rest), *ctx.call),)

            return *_differentiate(compose, (x, w, bias), (g,)), *nothing
        grads = []
        for d, like, flag in (
            (dx, x, Needs.INPUT),
            (dw, w, Needs.WEIGHT),
            (db, w if bias is None else bias, Needs.BIAS),
        ):
            new = d * g if keeps_graph() or g.device.type == "cuda" else d.mul_(g)
            grads.append(new.to(like.dtype) if ctx.needs & flag else None)
        return *grads, *nothing


def _recompute(operands: Operands, o: Options, loss: Any, reduction: str, limit: int) -> Tensor:
    """The same by mode R, whose second derivatives are PyTorch's."""
    _, w, _, target, prob, column_weight, warm = operands
    raw = linear_row_stats(*(*operands, o, limit))
    s = pack(*raw, target, prob is not None, w.shape[0], o, column_weight, warm)
    return _sum(s, loss) * _share(operands, o, reduction)


def separable_loss(operands: Operands, o: Options, loss: Any, reduction: str, limit: int) -> Tensor:
    """The reduced loss; under torch.compile and torch.func by mode R."""
    x, w, bias, *rest = operands
    prob = rest[1]
    if (
        torch.compiler.is_compiling()
        or functorch_active()
        or forward_mode_active()
        or (prob is not None and prob.requires_grad)
    ):
        return _recompute(operands, o, loss, reduction, limit)
    needs = int(x.requires_grad) * Needs.INPUT | int(w.requires_grad) * Needs.WEIGHT
    if bias is not None and bias.requires_grad:
        needs |= Needs.BIAS
    return _Separable.apply(x, w, bias, tuple(rest), o, loss, reduction, limit, int(needs))
