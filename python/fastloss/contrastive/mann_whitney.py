"""The MW loss: the smooth count of negatives that score above positives (Mann and Whitney's U), and the AUC it bounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..losses import catalogue
from ..pairs import pair_histogram, pair_map, pair_stats
from ..pairs.arguments import Temperature
from ..pairs.classes import PairSets
from ..pairs.engine import DIAGONAL
from ..pairs.statistics import INF, softplus
from .arguments import check_same_shape, row_dots
from .dots import scale_of
from .loss_module import LossModule
from .reduction import check_reduction, reduce

#: Numbers of softplus(center - positive) that are held at a time.
_HELD = 1 << 20

#: softplus(x) is x for x above this and 0 below its negative, to all digits of float64.
_BEND = 40.0


def _check_mode(mode: str) -> None:
    if mode not in ("query", "pooled"):
        raise ValueError(f"mode must be 'query' or 'pooled', got {mode!r}")


def _check_bins(bins: int) -> None:
    if not isinstance(bins, int) or bins < 2:
        raise ValueError(f"bins must be an integer >= 2, got {bins!r}")


@catalogue.entry(
    formula="query: mean over i, j != i of softplus(z_ij - z_ii); pooled: mean over all positives p and all negatives "
    "n of the batch of softplus(z_n - z_p)",
    gradient="sigmoid(z_n - z_p) / count to n, the negative sum to p",
    source="Optimizing What Matters: AUC-Driven Learning for Robust Neural Retrieval",
    published="pooled: by a histogram of the negatives between the smallest and the largest z; at 2048 bins and scale 20 the "
    "value is right to 1e-5, the gradient to 1e-3; temperature not given",
)
def mw_loss(
    q: Tensor, k: Tensor, scale: Temperature = 1.0, *, mode: str = "query", positive: PairSets = DIAGONAL,
    excluded: PairSets = None, bins: int = 2048, normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """mean over positives p and negatives n of softplus(z_n - z_p), z = s <q, k>: an upper bound (over log 2) of the area over
    the ROC curve.

    mode "query": each row's negatives against its own positive k_i (the diagonal). "pooled": all negatives of the batch against
    all positives, P x N comparisons, without the similarity matrix and without comparing: the negatives are counted in a
    histogram H of `bins` linear bins, and with f(x) = mean_p softplus(x - z_p) the loss is sum_g H_g f(x_g) / N. Positives
    other than the diagonal are counted in a histogram too. The gradient is the exact one of what is returned.

    Args:
        q, k: [B, D]; pooled with `positive`: [M, D] and [N, D].
        scale: s > 0, a number or a trained tensor.
        positive, excluded: as in `pair_stats`; positive: pooled only.
        bins: of the histogram, over the z that occur: of the diagonal's negatives those within 40 of a positive's, beyond which
            softplus is 0 or linear. The relative error of the value falls with the square of (range of z) / bins, that of the
            gradient with (range of z) / bins: over a range of 100, 2048 bins give about 1e-5 and 5e-4, over one of
            thousands (one positive that large) 5e-4 and 2e-2.
        reduction: "mean"; of mode "query" also "mean_valid" (rows with a negative), "sum" and "none", [B].

    Raises ValueError and TypeError as `pair_map`, and for an unknown mode. Memory: O(M + N + bins). Pooled costs
    two sweeps more, for the range of z, and reads it from the device.
    Source: Optimizing What Matters: AUC-Driven Learning for Robust Neural Retrieval.
    """
    check_reduction(reduction)
    _check_mode(mode)
    if mode == "query":
        if positive is not DIAGONAL:
            raise ValueError("mode 'query' compares with the diagonal; other positives need mode='pooled'")
        check_same_shape(q, k)
        own = scale * row_dots(q, k, normalize)
        pairs = pair_map(
            q, k, "softplus", neg_threshold=own, scale=scale, excluded=excluded, normalize=normalize
        )  # fmt: skip
        return reduce(pairs.neg / pairs.neg_count.clamp(min=1), reduction, pairs.neg_count > 0)
    if reduction != "mean":
        raise ValueError(f"the pooled loss has no rows: reduction must be 'mean', got {reduction!r}")
    return _pooled(q, k, scale, positive, excluded, bins, normalize)


def _pooled(
    q: Tensor, k: Tensor, scale: Temperature, positive: PairSets, excluded: PairSets, bins: int, normalize: bool
) -> Tensor:
    exact = positive is DIAGONAL and excluded is None
    if exact:
        check_same_shape(q, k)
    low, high, more = _span(q, k, scale, positive, excluded, normalize, exact)
    sets: dict[str, Any] = {"scale": scale, "positive": positive, "excluded": excluded, "normalize": normalize}
    counts = pair_histogram(q, k, bins=bins, low=low, high=high, **sets)
    pairs = counts.neg.sum().detach().clamp(min=1)
    share = counts.neg / pairs
    if not exact:
        positives = counts.pos.sum().detach().clamp(min=1)
        return _compared(share, counts.centers, counts.centers) @ (counts.pos / positives)
    own = scale * row_dots(q, k, normalize)
    loss = _compared(share, counts.centers, own).sum() / max(q.shape[0], 1)
    if more:  # up there softplus is its argument: what exceeds the last center is a sum
        loss = loss + pair_map(q, k, "hinge", neg_threshold=high, **sets).neg.sum() / pairs
    return loss


def _compared(share: Tensor, centers: Tensor, own: Tensor) -> Tensor:
    """sum_g share_g softplus(center_g - own_p) of each positive p, [P]: what is between is made again in the backward."""

    def some(part: Tensor, share: Tensor) -> Tensor:
        return softplus(centers[None, :] - part[:, None]) @ share

    step = max(1, _HELD // centers.shape[0])
    return torch.cat([checkpoint(some, part, share, use_reentrant=False) for part in own.split(step)])


def _span(
    q: Tensor, k: Tensor, scale: Temperature, positive: PairSets, excluded: PairSets, normalize: bool, exact: bool
) -> tuple[float, float, bool]:
    """(first center, last center, whether negatives lie beyond the last): all z, or where no positive is counted in bins
    (`exact`) the negatives among which softplus(z_n - z_p) bends: far below all positives it is 0, far above linear."""
    if not q.numel() or not k.numel():
        return 0.0, 1.0, False
    with torch.no_grad():
        options: dict[str, Any] = {
            "scale": scale,
            "positive": positive,
            "excluded": excluded,
            "normalize": normalize,
            "columns": False,
        }
        above, below = pair_stats(q, k, **options), pair_stats(-q, k, **options)
        ends = [x.amax() for x in (above.neg_max, below.neg_max, above.pos_max, below.pos_max)]
        factor = torch.as_tensor(scale, device=q.device).amax().to(ends[0].dtype)
        finite = (q.isfinite().all() & k.isfinite().all()).to(ends[0].dtype)
        read = torch.stack([*ends, factor, finite]).tolist()  # one wait for the device
    largest, smallest, largest_positive, smallest_positive = read[0], -read[1], read[2], -read[3]
    if largest == -INF:
        return 0.0, 1.0, False
    found = [x for x in (largest, smallest, largest_positive, smallest_positive) if abs(x) != INF or x == largest]
    if not (read[5] and 0 <= read[4] < INF and all(math.isfinite(x) for x in found)):
        raise ValueError(
            f"the pooled loss needs finite embeddings and a scale > 0, got scale {read[4]} and z in {found}"
        )
    if not exact:
        low, high = min(found), max(found)
    else:
        low = max(smallest, min(smallest_positive, largest) - _BEND)
        high = min(largest, max(largest_positive, smallest) + _BEND)
    # Rounding in another kernel must not reach beyond the last bin, nor may a step be rounding itself.
    rounding = torch.finfo(above.neg_max.dtype).eps * max(abs(low), abs(high), abs(largest - smallest))
    pad = max(1e-4 * (high - low), 64 * rounding, torch.finfo(torch.float32).tiny * 2**20)
    return low - pad, high + pad, largest > high + pad


class MWLoss(LossModule):
    """`mw_loss` as a module."""

    def __init__(
        self, scale: float = 1.0, *, mode: str = "query", bins: int = 2048, normalize: bool = False
    ) -> None:  # fmt: skip
        scale_of(scale, "scale")
        _check_mode(mode)
        _check_bins(bins)
        super().__init__(mw_loss, scale=scale, mode=mode, bins=bins, normalize=normalize)
