"""The MW loss: the smooth count of negatives that score above positives (Mann and Whitney's U), and the AUC it bounds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..losses import catalogue
from ..pairs import pair_histogram, pair_map
from ..pairs.arguments import Temperature
from ..pairs.classes import PairSets
from ..pairs.engine import DIAGONAL
from ..pairs.statistics import softplus
from .arguments import check_same_shape, row_dots, wide
from .dots import scale_of
from .loss_module import LossModule
from .reduction import check_reduction, reduce

#: Numbers of softplus(center - positive) that are held at a time.
_HELD = 1 << 20


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
    published="pooled: by a histogram of the negatives, relative error 2e-6 at 1024 bins and scale 20; temperature not "
    "given",
)
def mw_loss(
    q: Tensor, k: Tensor, scale: Temperature = 1.0, *, mode: str = "query", positive: PairSets = DIAGONAL,
    excluded: PairSets = None, bins: int = 1024, normalize: bool = False, reduction: str = "mean",
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
        bins: of the histogram. The error falls with the square of bins / (range of z).
        reduction: "mean"; of mode "query" also "mean_valid" (rows with a negative), "sum" and "none", [B].

    Raises ValueError and TypeError as `pair_map`, and for an unknown mode. Memory: O(M + N + bins). Pooled reads the largest
    norm from the device.
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
    bound = _bound(q, k, scale, normalize)
    counts = pair_histogram(
        q, k, bins=bins, low=-bound, high=bound, scale=scale, positive=positive, excluded=excluded, normalize=normalize
    )
    pairs = counts.neg.sum().detach().clamp(min=1)
    if positive is DIAGONAL and excluded is None:
        check_same_shape(q, k)
        own = scale * row_dots(q, k, normalize)
        return _compared(counts.neg / pairs, counts.centers, own).sum() / max(q.shape[0], 1)
    positives = counts.pos.sum().detach().clamp(min=1)
    each = softplus(counts.centers[:, None] - counts.centers[None, :]) @ (counts.pos / positives)
    return (counts.neg / pairs) @ each


def _compared(share: Tensor, centers: Tensor, own: Tensor) -> Tensor:
    """sum_g share_g softplus(center_g - own_p) of each positive p, [P]: what is between is made again in the backward."""

    def some(part: Tensor, share: Tensor) -> Tensor:
        return softplus(centers[None, :] - part[:, None]) @ share

    step = max(1, _HELD // centers.shape[0])
    return torch.cat([checkpoint(some, part, share, use_reentrant=False) for part in own.split(step)])


def _bound(q: Tensor, k: Tensor, scale: Temperature, normalize: bool) -> float:
    """A number that no |z| exceeds."""
    with torch.no_grad():
        largest = torch.as_tensor(scale, dtype=torch.float64).max().item()
        if not normalize:
            norms = [torch.linalg.vector_norm(wide(x), dim=1) for x in (q, k)]
            largest *= float(norms[0].max() * norms[1].max()) if q.shape[0] and k.shape[0] else 0.0
    if not 0 <= largest < float("inf"):
        raise ValueError(f"the pooled loss needs finite embeddings and a scale > 0: the bound of |z| is {largest}")
    return max(largest * (1 + 1e-4), torch.finfo(torch.float32).tiny * 2**20)  # rounding must not reach the last bin


class MWLoss(LossModule):
    """`mw_loss` as a module."""

    def __init__(
        self, scale: float = 1.0, *, mode: str = "query", bins: int = 1024, normalize: bool = False
    ) -> None:  # fmt: skip
        scale_of(scale, "scale")
        _check_mode(mode)
        _check_bins(bins)
        super().__init__(mw_loss, scale=scale, mode=mode, bins=bins, normalize=normalize)
