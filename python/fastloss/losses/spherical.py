"""Losses of the spherical family: functions of the target's score, the sum and the sum of squares of all scores.

They take `RowStats` (made with stats=("sum", "sumsq")) and `SphericalStats` alike. Scores must be finite.

Source: de Brebisson and Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family" (2016),
and "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family" (2016).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import catalogue

_SOURCE = "de Brebisson and Vincent 2016, the spherical loss family"
_SUMS = ("sum", "sumsq")


class Moments(Protocol):
    """What these losses read of a row."""

    @property
    def target_logit(self) -> Tensor: ...
    @property
    def centred_target_logit(self) -> Tensor: ...
    @property
    def sum(self) -> Tensor: ...
    @property
    def sumsq(self) -> Tensor: ...
    @property
    def variance(self) -> Tensor: ...
    @property
    def valid(self) -> Tensor: ...
    @property
    def vocab(self) -> int: ...


def _check(stats: Any, **positive: float) -> None:
    if stats.soft or stats.target is None:
        raise ValueError(
            "spherical losses need class ids as target, got " + ("probabilities" if stats.soft else "none")
        )
    if getattr(stats, "column_weight", None) is not None:
        raise ValueError("spherical losses take the unweighted sum of the scores: pass no column_weight")
    for name, value in positive.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number > 0, got {value}")


@catalogue.row(
    formula="softplus(a (b - Z)) / a,  Z = (z_y - mu) / s,  s^2 = sum_j (z_j - mu)^2 / V + eps",
    gradient="g = -sigma(a (b - Z)):  g ((1[j=y] - 1 / V) / s - Z (z_j - mu) / (V s^2))",
    source="de Brebisson and Vincent 2016, Z-loss",
    statistics=_SUMS,
    published="variance as a difference of raw moments and divided by s + 1e-12; here about a reference point, guarded",
)
def z_normalized_loss(stats: Moments, *, a: float = 1.0, b: float = 0.0, eps: float = 1e-12) -> Tensor:
    """The Z-loss softplus(a (b - Z)) / a with Z = (z_y - mean(z)) / sqrt(variance(z) + eps), 0 on ignored rows.

    It does not change when the scores of a row are shifted or scaled. a > 0 sets how soon a well classified row stops
    to count, b the Z to reach. `eps` only keeps a row of equal scores, whose Z is 0, from dividing by 0. Not to be
    confused with the z_loss of `cross_entropy`, which is a penalty on the log of the partition function.
    """
    _check(stats, a=a, eps=eps)
    z = stats.centred_target_logit / (stats.variance.clamp_min(0.0) + eps).sqrt()
    return torch.where(stats.valid, -F.logsigmoid(-a * (b - z)) / a, 0.0)


@catalogue.row(formula="sum_j z_j^2 - 2 z_y + 1", gradient="2 z_j - 2 [j=y]", source=_SOURCE, statistics=_SUMS)
def one_hot_mse(stats: Moments) -> Tensor:
    """The squared error |z - onehot(y)|^2 = sum_j z_j^2 - 2 z_y + 1, 0 on ignored rows."""
    _check(stats)
    return torch.where(stats.valid, stats.sumsq - 2 * stats.target_logit + 1, 0.0)


@catalogue.row(
    formula="log sum_j t_j - log t_y,  t_j = 1 + z_j + z_j^2 / 2",
    gradient="(1 + z_j) / sum_k t_k - 1[j=y] (1 + z_y) / t_y",
    source=_SOURCE,
    statistics=_SUMS,
)
def log_taylor_softmax(stats: Moments) -> Tensor:
    """-log of the Taylor softmax t_y / sum_j t_j with t_j = 1 + z_j + z_j^2 / 2, 0 on ignored rows."""
    _check(stats)
    # t_j = ((1 + z_j)^2 + 1) / 2 is a sum of positive terms, where 1 + z_j + z_j^2 / 2 cancels for negative z_j; so is
    # their sum, written with mean and variance
    mean = stats.sum / stats.vocab
    whole = stats.vocab * (stats.variance.clamp_min(0.0) + (1 + mean) ** 2 + 1)
    # one log of the ratio: where t_y is nearly all, two logs of large numbers would cancel
    return torch.where(stats.valid, (whole / ((1 + stats.target_logit) ** 2 + 1)).log(), 0.0)


@catalogue.row(
    formula="log sum_j (z_j^2 + eps) - log(z_y^2 + eps)",
    gradient="2 z_j / sum_k (z_k^2 + eps) - 1[j=y] 2 z_y / (z_y^2 + eps)",
    source=_SOURCE,
    statistics=_SUMS,
)
def log_spherical_softmax(stats: Moments, *, eps: float = 1e-2) -> Tensor:
    """-log of the spherical softmax (z_y^2 + eps) / sum_j (z_j^2 + eps), 0 on ignored rows."""
    _check(stats, eps=eps)
    whole = stats.sumsq + stats.vocab * eps
    return torch.where(stats.valid, (whole / (stats.target_logit**2 + eps)).log(), 0.0)
