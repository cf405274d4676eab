"""RankMixup: a mixed sample shall not be more confident than the raw one, and confidences shall be ordered as the mixing is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..statistics import RowStats
from . import catalogue
from .margin_form import counted

PAPER = "RankMixup: Ranking-Based Mixup Training for Network Calibration"


def _check_shapes(raw: RowStats, *mixed: RowStats) -> None:
    for other in mixed:
        if other.shape != raw.shape:
            raise ValueError(f"one mixed row a raw row: shapes {tuple(raw.shape)} and {tuple(other.shape)}")


@catalogue.entry(
    formula="relu(max z_mixed - max z + margin)",
    gradient="1[j=argmax] on the mixed scores, -1[j=argmax] on the raw ones, where the relu is open",
    source=PAPER,
    statistics=("argmax",),
)
def mixup_ranking(
    raw: RowStats, mixed: RowStats, *, margin: float = 0.1, partner_differs: Tensor | None = None
) -> Tensor:
    """relu(max z_mixed - max z + margin), one value a row: the MRL of RankMixup, which adds 0.1 of its mean to cross entropy.

    raw, mixed: statistics with "argmax" of the raw samples' scores and of their mixtures', row by row.
    partner_differs (bool, the rows' shape): False where a sample was mixed with itself, which then costs nothing.
    Raises ValueError for different shapes.

    "RankMixup: Ranking-Based Mixup Training for Network Calibration", Noh, Park, Lee and Ham (2023).
    """
    _check_shapes(raw, mixed)
    rows = F.relu(mixed.max - raw.max + margin)
    if partner_differs is not None:
        rows = torch.where(partner_differs.reshape(raw.shape), rows, 0.0)
    return counted(raw, rows)


@catalogue.entry(
    formula="1 - min(D / I, I / D), D = sum_k r_k / log2(k + 1), r: confidences, the raw one first, then by falling share; "
    "I: the same of 1 and the shares",
    gradient="of the composition, by PyTorch; dr/dz_j = p_max (1[j=argmax] - p_j)",
    source=PAPER,
    statistics=("argmax",),
    published="1 - NDCG is a difference of numbers near 1; here |D - I| / max(D, I)",
)
def mixup_ndcg(raw: RowStats, mixed: Sequence[RowStats], shares: Tensor) -> Tensor:
    """How far the confidences of K mixtures are from the order, and the size, of their mixing shares: the M-NDCG of RankMixup.

    raw: statistics with "argmax" of the raw samples; mixed: those of K mixtures of each; shares [K, *rows]: the largest
    mixing coefficient of each mixture. One value a row in [0, 1). Raises ValueError for shapes that do not fit.

    "RankMixup: Ranking-Based Mixup Training for Network Calibration", Noh, Park, Lee and Ham (2023).
    """
    _check_shapes(raw, *mixed)
    if shares.shape != (len(mixed), *raw.shape):
        raise ValueError(f"shares must have shape {(len(mixed), *raw.shape)}, got {tuple(shares.shape)}")
    confidence = torch.stack([s.max_logp.exp() for s in (raw, *mixed)])
    ideal, order = shares.to(confidence.dtype).sort(0, descending=True)
    ideal = torch.cat((torch.ones_like(ideal[:1]) if len(mixed) else torch.ones_like(confidence), ideal))
    ordered = torch.cat((confidence[:1], confidence[1:].gather(0, order)))
    discount = torch.log2(torch.arange(2, 2 + len(ordered), device=ordered.device, dtype=ordered.dtype))
    discount = discount.reshape(-1, *(1 for _ in raw.shape))
    gain, best = (ordered / discount).sum(0), (ideal / discount).sum(0)
    return counted(raw, (gain - best).abs() / torch.maximum(gain, best))
