"""Metrics of all pairs of a batch, without the similarity matrix: the ROC curve's area, and how much a threshold's use differs
from class to class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..losses import catalogue
from ..pairs.arguments import make_pairing
from ..pairs.classes import PairSets, SameId
from ..pairs.engine import DIAGONAL, pair_histogram
from ..pairs.scores import blocks
from .arguments import check_labels
from .order_statistics import negative_order_statistics


@catalogue.entry(
    formula="P(z_p > z_n) + P(z_p = z_n) / 2 over all positives p and negatives n of the batch",
    gradient="none: a metric",
    source="Optimizing What Matters: AUC-Driven Learning for Robust Neural Retrieval",
)
@torch.no_grad()
def roc_auc(
    q: Tensor, k: Tensor | None = None, *, positive: PairSets = DIAGONAL, excluded: PairSets = None,
    row_valid: Tensor | None = None, column_valid: Tensor | None = None, normalize: bool = False, bins: int | None = None,
) -> Tensor:  # fmt: skip
    """The area under the ROC curve of similarities as scores for "belongs together", float64 []; 1 less it is the area over
    the curve (AoC) that `mw_loss` bounds.

    Exact (bins=None): the positives are sorted (memory O(number of positives), up to four megabytes of similarities beside
    them) and each negative is found among them. With `bins`: from histograms, in O(bins); pairs of one bin count a half.

    Args: as in `pair_stats`. NaN where there is no positive or no negative; a NaN similarity is no pair. Raises as `pair_stats`.
    """
    if k is None and positive is DIAGONAL:
        positive = None
    if bins is not None:
        bound = 1.0 + 1e-4
        if not normalize:
            norms = [torch.linalg.vector_norm(x.double(), dim=1).amax() for x in (q, q if k is None else k)]
            bound = float(norms[0] * norms[1]) * bound
        counts = pair_histogram(
            q, k, bins=bins, low=-bound, high=bound, positive=positive, excluded=excluded, row_valid=row_valid,
            column_valid=column_valid, normalize=normalize,
        )  # fmt: skip
        neg, pos = counts.neg.double(), counts.pos.double()
        won = (pos * (neg.cumsum(0) - neg / 2)).sum()
        return won / (neg.sum() * pos.sum())
    p = make_pairing(q, k, 1.0, None, positive, excluded, row_valid, column_valid, None, None, normalize).pairing
    found = torch.cat([s.z[s.positive] for s in blocks(p)] or [q.new_zeros(0)])
    positives = found[~found.isnan()].sort().values
    won = torch.zeros((), dtype=torch.float64, device=q.device)
    negatives = torch.zeros((), dtype=torch.int64, device=q.device)
    for s in blocks(p):
        z = s.z[s.negative]
        z = z[~z.isnan()]
        lower, upper = (torch.searchsorted(positives, z, right=right) for right in (False, True))
        won += (
            (len(positives) - lower) + (len(positives) - upper)
        ).sum() / 2  # those above, and half of the equal ones
        negatives += z.numel()
    return won / (negatives.double() * len(positives))


@catalogue.entry(
    formula="mean over classes i and distances d in [d_min, d_max] of (U_i(d) - mean_i U_i(d))^2, U_i = harmonic mean "
    "of class i's sensitivity and specificity when pairs up to distance d are accepted",
    gradient="none: a metric",
    source="Threshold-Consistent Margin Loss for Open-World Deep Metric Learning",
)
@torch.no_grad()
def operating_point_inconsistency(
    x: Tensor, labels: Tensor, *, false_accepts: tuple[float, float] = (0.01, 0.1), thresholds: int = 101
) -> Tensor:
    """OPIS: how much the use of one distance threshold for all classes differs from class to class, float64 [].

    Embeddings are normalised; d = |x_i - x_j|. Class i's sensitivity at d is the share of its pairs with d_ij <= d, its
    specificity the share of the pairs with one end in it that have d_ij > d; U_i is their harmonic mean. d runs over `thresholds`
    equal steps (trapezoidal rule) from the distance at which the smaller to that at which the larger share of all negative pairs
    is falsely accepted. Classes with a single sample have no sensitivity and are left out. (epsilon-OPIS, which compares the best
    and worst classes, is not here.)

    Args: x: [B, D]; labels: integers [B]. Raises ValueError for shares not in (0, 1) and for a batch without positives or
    negatives. Memory: O(classes x thresholds) and a block of similarities; reads sizes from the device.
    Source: Threshold-Consistent Margin Loss for Open-World Deep Metric Learning.
    """
    check_labels(x, labels)
    if not 0 < false_accepts[0] <= false_accepts[1] < 1:
        raise ValueError(f"false_accepts must be two rising shares in (0, 1), got {false_accepts}")
    if thresholds < 2:
        raise ValueError(f"thresholds must be >= 2, got {thresholds}")
    classes, index, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    batch = x.shape[0]
    negatives = batch * batch - int((sizes * sizes).sum())
    if negatives == 0 or not bool((sizes > 1).any()):
        raise ValueError(f"a batch needs positive and negative pairs, got classes of sizes {sizes.tolist()[:8]}")
    unit = torch.nn.functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
    p = make_pairing(unit, None, 1.0, None, SameId(index), None, None, None, None, None, False).pairing
    # Each pair once in the order statistics, twice in the matrix.
    ranks = [(negatives - 1 - math.floor(share * (negatives - 1))) // 2 for share in false_accepts]
    nearest, farthest = ((2 - 2 * z).clamp(min=0).sqrt() for z in negative_order_statistics(unit, index, ranks))
    steps = torch.linspace(0, 1, thresholds, dtype=torch.float64, device=x.device)
    distances = nearest.double() + (farthest - nearest).double() * steps
    accepted = [torch.zeros(len(classes), thresholds, dtype=torch.float64, device=x.device) for _ in range(2)]
    for s in blocks(p):
        # the first distance of the grid at which a pair is accepted; `thresholds` for none
        first = torch.searchsorted(distances, (2 - 2 * s.z.double()).clamp(min=0).sqrt())
        of_class = index[s.start : s.stop, None] * (thresholds + 1) + first
        for total, member in zip(accepted, (s.positive, s.negative), strict=True):
            counts = torch.bincount(of_class[member], minlength=len(classes) * (thresholds + 1))
            total += counts.view(len(classes), -1)[:, :thresholds].cumsum(1)
    sizes = sizes.double()[:, None]
    sensitivity = accepted[0] / (sizes * (sizes - 1)).clamp(min=1)
    specificity = 1 - accepted[1] / (sizes * (batch - sizes)).clamp(min=1)
    utility = 2 * sensitivity * specificity / (sensitivity + specificity).clamp(min=1e-300)
    utility = utility[sizes[:, 0] > 1]
    spread = (utility - utility.mean(0)).square().mean(0)
    return (spread[1:] + spread[:-1]).mean() / 2
