"""Statistics of x with itself: the matrix is symmetric, so its columns' statistics are its rows', and one product with
(dS + dSᵀ) makes the whole gradient: three products where two different operands take four.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract import NUM_PAIR_COLUMN_STATS, PairNeeds, PairWant
from . import reference
from .arguments import Made
from .autograd import Family, apply, functions
from .classes import Diagonal, PairMask, PairSets, SameId
from .pairing import PAIRING_LENGTH, Pairing

_ops = torch.ops.fastloss


def _symmetric_sets(sets: PairSets) -> bool:
    given = () if sets is None else (sets,) if isinstance(sets, (Diagonal, SameId, PairMask)) else tuple(sets)
    offsets = {o for s in given if isinstance(s, Diagonal) for o in s.offsets}
    return offsets == {-o for o in offsets} and all(
        isinstance(s, Diagonal) or (isinstance(s, SameId) and s.columns is None) for s in given
    )


def is_symmetric(made: Made, scale: float | Tensor, positive: PairSets, excluded: PairSets) -> bool:
    """Whether the matrix of x with itself, and its classes, are symmetric."""
    p = made.pairing
    one_scale = not isinstance(scale, Tensor) or scale.numel() == 1
    plain = all(x is None for x in (p.low, p.high, p.guide_q, made.boost, made.margin))
    return one_scale and plain and _symmetric_sets(positive) and _symmetric_sets(excluded)


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    return _ops.pair_stats.default(*inputs, None, None, 0, 1.0, 0)[:1]


def _backward(
    grads: tuple[Tensor, ...], outputs: tuple[Tensor, ...], inputs: list[Any], needs: int
) -> tuple[Tensor | None, ...]:
    """The gradient of a row's statistic reaches x_i from row i and, z being symmetric, from column i alike.

    a_i da_i + b_i db_i is what comes of the two scales together; each gets half, which is right for scales that are one
    number times what both sides share.
    """
    (grad,), (rows,) = grads, outputs
    p = Pairing(*inputs[:PAIRING_LENGTH])
    wanted = (PairNeeds.Q if needs & (PairNeeds.Q | PairNeeds.K) else 0) | (
        PairNeeds.ROW_SCALE if needs & (PairNeeds.ROW_SCALE | PairNeeds.COLUMN_SCALE) else 0
    )
    columns, column_grad = (t[:NUM_PAIR_COLUMN_STATS].contiguous() for t in (rows, grad))
    nothing = rows.new_empty(0, dtype=torch.float32)
    dx, _, da, _ = _ops.pair_stats_backward.default(
        grad, column_grad, rows, columns, nothing, *inputs, None, None, int(PairWant.COLUMNS), 1.0, 0, int(wanted)
    )
    if not wanted & PairNeeds.ROW_SCALE:
        return dx, None, None, None
    half = 0.5 * da
    return dx, None, half, None if p.column_scale is None else half * p.row_scale / p.column_scale


def _compose(*inputs: Any) -> tuple[Tensor, ...]:
    return reference.statistics(Pairing(*inputs), None, None, 0, 1.0)[:1]


_SELF = Family(_forward, 1, _backward, _compose)
_SELF_FUNCTIONS = functions(_SELF)


def self_stats(made: Made) -> Tensor:
    """The table [9, M] of a pairing that `is_symmetric` found to be so."""
    return apply(_SELF, _SELF_FUNCTIONS, tuple(made.pairing))[0]
