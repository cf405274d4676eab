"""Mode C for any loss that is a sum over rows: the user's function is called for each chunk of rows in the forward.

On the chunk's statistics, a few numbers a row, autograd gives the coefficients of the tile gradient; the row kernel writes
it over the logits, and two GEMMs take it away. So the logits are made once, where mode R makes them twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import autograd_terms, linear_terms, registry
from .autograd import Options, _differentiate, forward_mode_active, functorch_active, keeps_graph, linear_row_stats
from .autograd_terms import TermOperands
from .chunked import Chunked, RowKernels
from .contract import Needs
from .fused import denominator, direct
from .statistics import RowStats, coefficients, largest, pack
from .term_statistics import term_coefficients
from .wide import Asked

Rows = Callable[[RowStats], Tensor]

_chunked = Chunked(
    RowKernels(
        lambda *a: registry.run("row_stats", *a),
        lambda *a: registry.run("row_stats_backward", *a),
        lambda *a: registry.run("cross_entropy", *a),
    )
)


class Call(NamedTuple):
    """What the user asked for besides statistics."""

    loss: Rows
    reduction: str
    limit: int
    combination: tuple[float, float] | None = None  # the loss is this times (-log p of the target, term)


class Family(Protocol):
    """A linear head, its operands and the statistics that a loss of it reads."""

    def gradients(self, x: Tensor, w: Tensor, bias: Tensor | None, needs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, dx, dw, dbias), chunk by chunk."""
        ...

    def recompute(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """The same loss by mode R, whose second derivatives are PyTorch's."""
        ...


def _sum(s: RowStats, loss: Rows) -> Tensor:
    rows = loss(s)
    if rows.shape != s.shape:
        raise ValueError(f"a row loss returns one value a row, shape {tuple(s.shape)}; got {tuple(rows.shape)}")
    return torch.where(s.valid, rows, 0.0).sum()


def _share(target: Tensor | None, x: Tensor, ignore_index: int, reduction: str) -> Tensor:
    like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return 1 / denominator(target, x.shape[0], None, ignore_index, reduction, like)


def _mean_of_none(total: Tensor, share: Tensor) -> Tensor:
    """The total; NaN, as in torch, where no row counts: the share of a row is then 1 / 0, and no chunk has met it."""
    return total + 0 * share


def _differentiated(
    loss: Rows, share: Tensor, stats: Tensor, top: Tensor, named: Callable[[Tensor, Tensor], RowStats]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(share times the chunk's loss, its gradient with respect to stats, and to top)."""
    with torch.enable_grad():
        if loss(named(stats, top)).requires_grad:
            raise ValueError("separable=True: the loss closes over a tensor that needs a gradient; use separable=False")
        table, top = stats.detach().requires_grad_(), top.detach().requires_grad_()
        value = _sum(named(table, top), loss) * share
        g_table, g_top = torch.autograd.grad(value, (table, top), allow_unused=True)
    return value.detach(), torch.zeros_like(stats) if g_table is None else g_table, g_top


class RowFamily(NamedTuple):
    """Statistics of `row_stats`."""

    target: Tensor | None
    prob: Tensor | None
    column_weight: Tensor | None
    temperature: Tensor | None
    options: Options
    call: Call

    def gradients(self, x: Tensor, w: Tensor, bias: Tensor | None, needs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, dx, dw, dbias), chunk by chunk."""
        o, loss = self.options, self.call.loss
        share = _share(self.target, x, o.ignore_index, self.call.reduction)

        def chunk(
            stats: Tensor, argmax: Tensor, target: Tensor | None, prob: Tensor | None, warm: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            soft = prob is not None

            def named(table: Tensor, top: Tensor) -> RowStats:
                return pack(table, top, argmax, target, soft, w.shape[0], o, self.column_weight, warm)

            value, g, g_top = _differentiated(loss, share, stats, largest(stats, o.want, soft), named)
            return value, coefficients(g, g_top, stats, target is not None, soft, warm, o.want)

        row = (self.target, self.prob, self.column_weight, self.temperature)
        total, dx, dw, db = _chunked.linear_row_loss(x, w, bias, *row, *o, needs, self.call.limit, chunk)
        return _mean_of_none(total, share), dx, dw, db

    def recompute(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """The same loss by mode R."""
        o, row = self.options, (self.target, self.prob, self.column_weight, self.temperature)
        raw = linear_row_stats(x, w, bias, *row, o, self.call.limit)
        s = pack(*raw, self.target, self.prob is not None, w.shape[0], o, self.column_weight, self.temperature)
        return _sum(s, self.call.loss) * _share(self.target, x, o.ignore_index, self.call.reduction)


class TermFamily(NamedTuple):
    """Statistics of `row_terms`."""

    asked: Asked
    call: Call

    @property
    def _target(self) -> Tensor | None:
        listed = self.asked.operands.listed
        return None if listed is None or not listed.shape[1] else listed[:, 0]

    def _named(self, operands: TermOperands, table: Tensor, top: Tensor, argmax: Tensor) -> RowStats:
        target = None if self.asked.target is None or operands.listed is None else operands.listed[:, 0]
        asked = self.asked._replace(operands=operands, shape=torch.Size((table.shape[1],)), target=target)
        return asked.pack(table, top, argmax)

    def gradients(self, x: Tensor, w: Tensor, bias: Tensor | None, needs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, dx, dw, dbias), chunk by chunk."""
        o, loss = self.asked.options, self.call.loss
        share = _share(self._target, x, o.ignore_index, self.call.reduction)
        head, call = self.asked.head, self.call
        if call.combination is not None and x.device.type == "cpu":
            shares = [float(share) * factor for factor in call.combination]
            if linear_terms.can_fuse(x, self.asked.operands, head, o, shares[0]):
                stats, *gradients = linear_terms.fused(
                    x, w, bias, self.asked.operands, head, o, needs, call.limit, *shares
                )
                nothing = stats.new_empty(0)
                s = self._named(self.asked.operands, stats, nothing, nothing)
                return _sum(s, loss) * share, *gradients  # type: ignore[return-value]

        def chunk(stats: Tensor, argmax: Tensor, rows: TermOperands) -> tuple[Tensor, Tensor]:
            def named(table: Tensor, top: Tensor) -> RowStats:
                return self._named(rows, table, top, argmax)

            value, g, g_top = _differentiated(loss, share, stats, autograd_terms.largest(stats, o.want), named)
            return value, term_coefficients(g, g_top, stats, rows.temperature, o.want, o.term)

        total, dx, dw, db = linear_terms.separable(x, w, bias, self.asked.operands, head, o, needs, call.limit, chunk)
        return _mean_of_none(total, share), dx, dw, db

    def recompute(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """The same loss by mode R."""
        raw = autograd_terms.linear_row_terms(x, w, bias, self.asked, self.call.limit)
        s = self._named(self.asked.operands, *raw)
        o = self.asked.options
        return _sum(s, self.call.loss) * _share(self._target, x, o.ignore_index, self.call.reduction)


class _Separable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, family: Family, needs: int) -> Tensor:
        total, dx, dw, db = family.gradients(x, w, bias, needs)
        ctx.save_for_backward(x, w, bias, dx, dw, db)
        ctx.family, ctx.needs = family, needs
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, bias, dx, dw, db = ctx.saved_tensors
        if torch.is_grad_enabled():
            family: Family = ctx.family
            return *_differentiate(lambda *head: (family.recompute(*head),), (x, w, bias), (g,)), None, None
        grads = []
        for d, like, flag in (
            (dx, x, Needs.INPUT),
            (dw, w, Needs.WEIGHT),
            (db, w if bias is None else bias, Needs.BIAS),
        ):
            if keeps_graph() or g.device.type == "cuda":
                new = d * g
            else:  # the gradient that was made is one for an upstream gradient of 1
                new = d if direct(g, d) and g.item() == 1 else d.mul_(g)
            grads.append(new.to(like.dtype) if ctx.needs & flag else None)
        return *grads, None, None


def separable_loss(x: Tensor, w: Tensor, bias: Tensor | None, family: Family) -> Tensor:
    """The reduced loss; under torch.compile and torch.func, or where an operand is trained, by mode R."""
    trained = isinstance(family, RowFamily) and family.prob is not None and family.prob.requires_grad
    if isinstance(family, TermFamily):
        trained = any(t is not None and t.requires_grad for t in family.asked.operands)
    if torch.compiler.is_compiling() or functorch_active() or forward_mode_active() or trained:
        return family.recompute(x, w, bias)
    needs = int(x.requires_grad) * Needs.INPUT | int(w.requires_grad) * Needs.WEIGHT
    if bias is not None and bias.requires_grad:
        needs |= Needs.BIAS
    return _Separable.apply(x, w, bias, family, int(needs))
