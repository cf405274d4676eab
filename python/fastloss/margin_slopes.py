"""Which losses of the catalogue are functions of the margin alone, and their slopes in the kernels (margin_loss.py)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import losses
from .engine import row_stats
from .margin_loss import Rows, Slope
from .statistics import RowStats

# The numbers of csrc/margin_loss.h.
_CROSS_ENTROPY, _COMP_SUM, _TRUNCATED, _FOCAL, _UNLIKELIHOOD, _SYMMETRIC, _UNHINGED, _GENERAL, _SHIFTED, _PASS_AT_N = (
    range(10)
)
_STRAIGHT = 80.0  # the exponent from which comp-sum losses go on as straight lines in float32


def _ldr_rows(lam: float, margin: float) -> Rows:
    def rows(s: RowStats) -> Tensor:  # of statistics of z / lam
        return -lam * F.logsigmoid(s.margin - margin / lam) - lam * math.log(s.vocab)

    return rows


def _cross_entropy(class_weight: Tensor | None, label_smoothing: float, z_loss: float) -> Slope | None:
    plain = class_weight is None and not label_smoothing and not z_loss
    return Slope(_CROSS_ENTROPY) if plain else None


_SLOPES: dict[Callable[..., Any], Callable[..., Slope | None]] = {
    losses.cross_entropy: _cross_entropy,
    losses.logistic: lambda: Slope(_CROSS_ENTROPY),
    losses.comp_sum: lambda tau: Slope(_CROSS_ENTROPY) if tau == 1 else Slope(_COMP_SUM, tau, _STRAIGHT),
    losses.sum_exponential: lambda: Slope(_COMP_SUM, 0.0, _STRAIGHT),
    losses.generalized_cross_entropy: lambda q: Slope(_COMP_SUM, 1 + q, _STRAIGHT),
    losses.mean_absolute_error: lambda factor: Slope(_COMP_SUM, 2.0, _STRAIGHT, factor=factor),
    losses.truncated_generalized_cross_entropy: lambda q, k: Slope(_TRUNCATED, q, k),
    losses.focal: lambda gamma: Slope(_FOCAL, gamma),
    losses.unlikelihood: lambda: Slope(_UNLIKELIHOOD),
    losses.symmetric_cross_entropy: lambda balance, A: Slope(_SYMMETRIC, balance, A),
    losses.asymmetric_unhinged: lambda a, q: Slope(_UNHINGED, a, q),
    losses.asymmetric_generalized: lambda a, q: Slope(_GENERAL, a, q),
    losses.ldr_kl: lambda lam, margin: Slope(_SHIFTED, margin / lam, lam, scale=1 / lam) if lam > 0 else None,
    losses.pass_at_n: lambda n: Slope(_PASS_AT_N, n),
}


def find(loss: Callable[..., Tensor], parameters: dict[str, Any]) -> tuple[Slope, Rows] | None:
    """(the slope of the loss, its rows from the kernel's statistics), or None where it is no loss of the margin alone.

    `parameters` are those that were given; the others have their defaults.
    """
    make = _SLOPES.get(loss)
    if make is None:
        return None
    known = losses.catalogue.find(loss)
    full = {**({} if known is None else known.defaults), **parameters}
    if any(isinstance(value, Tensor) for value in full.values()):
        return None
    slope = make(**full)
    if slope is None:
        return None
    if loss is losses.ldr_kl:
        return slope, _ldr_rows(**full)
    _check(loss, tuple(sorted(parameters.items())))
    return slope, lambda s: loss(s, **parameters)


@functools.lru_cache(maxsize=1024)
def _check(loss: Callable[..., Tensor], parameters: tuple[tuple[str, Any], ...]) -> None:
    """Let the loss itself refuse its parameters, on statistics of one row: a kernel would take any number."""
    row = torch.zeros(1, 2)
    loss(row_stats(row, torch.zeros(1, dtype=torch.int64)), **dict(parameters))
