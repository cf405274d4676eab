"""Focal losses: cross entropy that counts easy rows less. And unlikelihood, which wants the target to be unlikely."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..statistics import RowStats
from . import catalogue
from .margin_form import check_not_negative, counted, power


@catalogue.row(
    formula="-(1 - p_y)^gamma log p_y",
    gradient="phi'(d) (1[j=y] - pi_j), phi' = -(1 - p_y)^gamma (gamma p_y softplus(-d) + sigma(-d))",
    source="Focal Loss for Dense Object Detection",
    published="1 - p_y by subtraction: 0 in float32 from d = 17 on; here e^(-softplus(d))",
)
def focal(stats: RowStats, *, gamma: float = 2.0) -> Tensor:
    """-(1 - p_y)^gamma log p_y, one value a row, 0 on ignored rows. Raises ValueError for gamma < 0.

    Lin, Goyal, Girshick, He and Dollar, "Focal Loss for Dense Object Detection" (2017).
    """
    check_not_negative(gamma=gamma)
    return counted(stats, power(gamma, stats.log1mp) * -stats.logp)


@catalogue.row(
    formula="-(1 - p_y)^g log p_y, g the first gamma_i whose p_y < threshold_i, else gamma",
    gradient="that of focal at the row's g, which is a constant",
    source="Calibrating Deep Neural Networks using Focal Loss",
    published="a Python loop over the rows, with a host sync each; here two comparisons",
)
def adaptive_focal(
    stats: RowStats, *, gamma: float = 3.0, below: Sequence[tuple[float, float]] = ((0.2, 5.0),)
) -> Tensor:
    """Focal loss whose gamma depends on the row's p_y: that of the first (threshold, gamma) in `below` with p_y < threshold.

    The default is the paper's FLSD-53: 5 below 0.2, else 3. Raises ValueError for a gamma < 0, and for thresholds that
    do not increase or are not in (0, 1].

    Mukhoti, Kulharia, Sanyal, Golodetz, Torr and Dokania, "Calibrating Deep Neural Networks using Focal Loss" (2020).
    """
    thresholds = [threshold for threshold, _ in below]
    if sorted(set(thresholds)) != thresholds or not all(0 < t <= 1 for t in thresholds):
        raise ValueError(f"thresholds must increase and be in (0, 1], got {thresholds}")
    check_not_negative(gamma=min([gamma, *(g for _, g in below)]))
    logp = stats.logp
    chosen = torch.full_like(logp, gamma)
    for threshold, lower in reversed(below):
        chosen = torch.where(logp.detach() < math.log(threshold), lower, chosen)
    return counted(stats, power(chosen, stats.log1mp) * -logp)


@catalogue.row(
    formula="-log(1 - p_y) = softplus(d)",
    gradient="phi'(d) (1[j=y] - pi_j), phi' = sigma(d)",
    source="Neural Text Generation with Unlikelihood Training",
    published="clamps 1 - p_y at 1e-5, so that the gradient is 0 where the loss is largest; here softplus(d)",
)
def unlikelihood(stats: RowStats) -> Tensor:
    """-log(1 - p_y) of a target that should not be said, one value a row, 0 on ignored rows.

    A row whose target is the only class (every other score -inf) has the value inf, and the gradient 0.

    Welleck, Kulikov, Roller, Dinan, Cho and Weston, "Neural Text Generation with Unlikelihood Training" (2019).
    """
    log1mp = stats.log1mp
    return torch.where(log1mp == -math.inf, math.inf, -log1mp)
