"""Cross entropy, with everything torch.nn.CrossEntropyLoss has and the z-loss of PaLM."""

from __future__ import annotations

import torch
from torch import Tensor

from ..statistics import RowStats
from . import catalogue


@catalogue.row(
    formula="(1 - e) w_y (lse - z_y) + (e / V) sum_j w_j (lse - z_j) + z_loss lse^2",
    gradient="(1 - e) w_y phi'(d) (1[j=y] - pi_j), phi' = -sigma(-d); smoothing (e / V) (sum_j w_j p_j - w_j); 2 z_loss lse p_j",
    source="Szegedy et al. 2016 (smoothing); Chowdhery et al. 2022, PaLM (z-loss)",
    statistics=lambda label_smoothing=0.0, **_: ("sum",) if label_smoothing else (),
    published="p_y - 1 cancels as p_y -> 1 (gradient 0 at d = 20 in fp32); here the margin form",
)
def cross_entropy(
    stats: RowStats, *, class_weight: Tensor | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """(1 - e) w_y (lse - z_y) + (e / V) sum_j w_j (lse - z_j) + z_loss lse^2, one value a row, 0 on ignored rows.

    With target probabilities q the first term is (1 - e) sum_j q_j w_j (lse - z_j). Smoothing needs the statistic "sum";
    its weights w, and those of probabilities, are the `column_weight` that the statistics were made with.
    `class_weight` [V] is used here for w_y only.

    Label smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016).
    z-loss: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways" (2022); its coefficient there is 1e-4.
    """
    rows = stats.nll
    if class_weight is not None and not stats.soft:
        rows = rows * target_weight(stats.target, class_weight, stats.ignore_index, rows)
    if label_smoothing:
        rows = (1 - label_smoothing) * rows + (label_smoothing / stats.vocab) * stats.nll_sum
    if z_loss:
        rows = rows + z_loss * stats.lse**2
    return rows if stats.target is None else torch.where(stats.valid, rows, 0.0)


def target_weight(target: Tensor | None, class_weight: Tensor, ignore_index: int, like: Tensor) -> Tensor:
    """w_y of each row, 0 where the target is ignored (or is no class, which the kernels turn into NaN)."""
    if target is None:
        raise ValueError("class weights need class indices or probabilities as target, got no target")
    flat = target.reshape(-1)
    known = (flat != ignore_index) & (flat >= 0) & (flat < class_weight.shape[0])
    picked = class_weight.to(like.dtype)[torch.where(known, flat, 0)]
    return torch.where(known, picked, 0.0).reshape(like.shape)
