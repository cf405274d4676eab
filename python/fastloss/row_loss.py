"""Any loss that is a function of `RowStats`, on logits or on a linear head, with a reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import margin_loss, margin_slopes
from .autograd import Options
from .engine import Head, check_grad_weight, check_rows, extra_bytes, head, options, row_stats, split_target
from .losses import catalogue
from .separable import Call, RowFamily, TermFamily, separable_loss
from .statistics import RowStats
from .terms import HLGauss, RowTerm, TeacherHead
from .wide import Wide

RowFunction = Callable[..., Tensor]


def check_reduction(reduction: str) -> None:
    """Raise ValueError for a reduction that is none."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')


def reduce_rows(rows: Tensor, stats: RowStats, reduction: str) -> Tensor:
    """Ignored rows count nothing: 0 under "none", left out of the sum and the count otherwise."""
    check_reduction(reduction)
    if rows.shape != stats.shape:
        raise ValueError(f"a row loss returns one value a row, shape {tuple(stats.shape)}; got {tuple(rows.shape)}")
    rows = torch.where(stats.valid, rows, 0.0)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / stats.valid.sum()


def row_loss(
    logits: Tensor, target: Tensor | None, loss: RowFunction, *, reduction: str = "mean", **arguments: Any
) -> Tensor:
    """loss(row_stats(logits, target, ...), ...), reduced over the rows that count.

    `loss` maps RowStats to one value a row: one of `fastloss.losses`, or the user's own. `arguments` are those of the
    loss (by the names in its signature) and those of `row_stats`; a loss of `fastloss.losses` names the statistics and
    the temperature that it needs by itself.

    >>> focal = lambda s: (1 - s.logp.exp()) ** 2 * -s.logp
    >>> fastloss.row_loss(logits, target, focal)  # doctest: +SKIP
    >>> fastloss.row_loss(logits, target, fastloss.losses.focal, gamma=3.0)  # doctest: +SKIP
    """
    own, engine = catalogue.split_arguments(loss, arguments)
    check_reduction(reduction)
    if (fused := _fused(logits, target, loss, own, engine, reduction)) is not None:
        return fused
    s = row_stats(logits, target, **engine)
    return reduce_rows(loss(s, **own), s, reduction)


_PLAIN = {"ignore_index", "logit_scale", "softcap", "shift", "stats", "temperature"}


def _margin_call(
    loss: RowFunction, own: dict[str, Any], engine: dict[str, Any], o: Options, reduction: str, limit: int = 0
) -> margin_loss.Call | None:
    """The loss as one of the margin alone, if it is one and nothing but the margin was asked for."""
    if not engine.keys() <= _PLAIN or (found := margin_slopes.find(loss, own)) is None:
        return None
    if o.softcap and found[0].scale != 1:  # softcap(z) / lam is not softcap(z / lam)
        return None
    known = catalogue.find(loss)
    if engine.get("temperature") is not None and (known is None or known.temperature is None):
        return None
    return margin_loss.Call(found[1], found[0], o, reduction, limit)


def _fused(
    logits: Tensor,
    target: Tensor | None,
    loss: RowFunction,
    own: dict[str, Any],
    engine: dict[str, Any],
    reduction: str,
) -> Tensor | None:
    """The loss with its gradient made in the forward, or None where that cannot be."""
    if target is None or target.is_floating_point() or reduction == "none" or logits.dim() < 1:
        return None
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    ignore_index = engine.get("ignore_index", -100)
    o = options(ignore_index, 0, engine.get("logit_scale", 1.0), engine.get("softcap"))
    call = _margin_call(loss, own, engine, o, reduction)
    if call is None:
        return None
    check_rows(logits, vocab, target, None)
    ids, _ = split_target(target, shape.numel(), vocab, shape, engine.get("shift", False), ignore_index)
    return None if ids is None else margin_loss.on_logits(logits.reshape(shape.numel(), vocab), ids, call)


def linear_row_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    loss: RowFunction,
    *,
    reduction: str = "mean",
    separable: bool | None = None,
    linear_bias: Tensor | None = None,
    max_extra_bytes: int | None = None,
    grad_weight: Tensor | None = None,
    **arguments: Any,
) -> Tensor:
    """loss(linear_row_stats(input, linear_weight, target, ...), ...), reduced: `row_loss` without the logits.

    separable=True says that each row's loss depends on that row's statistics alone and that `loss` closes over nothing
    that needs a gradient: `loss` is then called for each chunk of rows and the gradients are made in the forward, three
    GEMMs instead of four ("mean" and "sum" only, and not together with grad_weight). None: True for the row losses of
    `fastloss.losses` whose parameters are numbers, where that can be, else False.
    """
    own, engine = catalogue.split_arguments(loss, arguments)
    h = _head(input, linear_weight, target, linear_bias, grad_weight is not None, **engine)
    limit = extra_bytes(max_extra_bytes)
    reducible = reduction in ("mean", "sum") and grad_weight is None
    if separable is None:
        known = catalogue.find(loss)
        numbers = not any(isinstance(value, Tensor) for value in own.values())
        separable = reducible and numbers and known is not None and known.rows
    elif separable and not reducible:
        raise ValueError(f'separable=True takes reduction "mean" or "sum" and no grad_weight, got {reduction!r}')

    def rows(s: RowStats) -> Tensor:
        return loss(s, **own)

    if separable and torch.is_grad_enabled():
        margin = None if h.asked is not None else _margin_call(loss, own, engine, h.options, reduction, limit)
        if margin is not None and h.row[0] is not None:
            fused = margin_loss.on_head(h.x, h.w, h.bias, h.row[0], margin)
            if fused is not None:
                return fused
        call = Call(rows, reduction, limit, catalogue.combination(loss, own))
        family = RowFamily(*h.row, h.options, call) if h.asked is None else TermFamily(h.asked, call)
        return separable_loss(h.x, h.w, h.bias, family)
    check_grad_weight(grad_weight, linear_weight)
    s = h.stats(limit, grad_weight)
    return reduce_rows(rows(s), s, reduction)


def _head(
    input: Tensor, linear_weight: Tensor, target: Tensor | None, linear_bias: Tensor | None, adds_weight: bool, *,
    stats: Iterable[str] = (), column_weight: Tensor | None = None, temperature: float | Tensor | None = None,
    ignore_index: int = -100, logit_scale: float = 1.0, softcap: float | None = None, shift: bool = False,
    listed: Tensor | None = None, teacher: Tensor | TeacherHead | None = None, term: RowTerm | None = None,
    subset: Tensor | None = None, generated: HLGauss | None = None,
) -> Head:  # fmt: skip
    """The arguments of `linear_row_stats` with its defaults; a name that is none raises TypeError."""
    return head(
        input, linear_weight, target, linear_bias, stats, column_weight, temperature, ignore_index, logit_scale, softcap,
        shift, Wide(listed, teacher, term, subset, generated), adds_weight,
    )  # fmt: skip
