"""Margins on all pairs of a labelled batch: the contrastive loss, and the threshold-consistent margin loss."""

from __future__ import annotations

from torch import Tensor

from ..losses import catalogue
from ..pairs import PairMap, SameId, pair_map
from .arguments import check_labels, check_weight, wide
from .loss_module import LossModule


def _pairs(
    x: Tensor, labels: Tensor, k: Tensor | None, key_labels: Tensor | None, neg_margin: float, pos_margin: float,
    function: str, normalize: bool,
) -> PairMap:  # fmt: skip
    check_labels(x, labels)
    if (k is None) != (key_labels is None):
        raise ValueError("k and key_labels go together")
    if k is not None and key_labels is not None:
        check_labels(k, key_labels, "key_labels")
    return pair_map(
        x, k, function, neg_threshold=neg_margin, pos_threshold=pos_margin, positive=SameId(labels, key_labels),
        normalize=normalize,
    )  # fmt: skip


def _average(total: Tensor, count: Tensor) -> Tensor:
    return wide(total).sum() / count.sum().clamp(min=1)


@catalogue.entry(
    formula="mean over positives of max(m+ - s, 0)^p + mean over negatives of max(s - m-, 0)^p, p = 1 or 2",
    gradient="-p max(m+ - s, 0)^(p - 1) / count, p max(s - m-, 0)^(p - 1) / count",
    source="Dimensionality Reduction by Learning an Invariant Mapping (Hadsell et al. 2006), on similarities",
    published="pytorch-metric-learning averages over the pairs within the margins (average='active'); margins 1 and 0 "
    "for cosines",
)
def contrastive_loss(
    x: Tensor, labels: Tensor, k: Tensor | None = None, key_labels: Tensor | None = None, *, pos_margin: float = 1.0,
    neg_margin: float = 0.0, squared: bool = False, average: str = "active", normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Positives are pulled above `pos_margin`, negatives pushed below `neg_margin`: hinges of all pairs' similarities.

    Args:
        x: [B, D]; labels: integers [B]. k: [N, D] and key_labels [N]; None: x itself, without each row's pair with itself.
        pos_margin, neg_margin: in units of s, cosines with `normalize`.
        squared: hinges squared.
        average: "active", over the pairs with s <= pos_margin and those with s >= neg_margin, or "pairs", over all of them.

    0 where there is no pair. Raises ValueError and TypeError as `pair_map`. Memory: O(B + N).
    Source: Dimensionality Reduction by Learning an Invariant Mapping.
    """
    if average not in ("active", "pairs"):
        raise ValueError(f"average must be 'active' or 'pairs', got {average!r}")
    pairs = _pairs(
        x, labels, k, key_labels, neg_margin, pos_margin, "squared_hinge" if squared else "hinge", normalize
    )  # fmt: skip
    if average == "active":
        return _average(pairs.pos, pairs.pos_active) + _average(pairs.neg, pairs.neg_active)
    return _average(pairs.pos, pairs.pos_count) + _average(pairs.neg, pairs.neg_count)


@catalogue.entry(
    formula="l+ mean over positives with s <= m+ of (m+ - s) + l- mean over negatives with s >= m- of (s - m-)",
    gradient="-l+ / count of such positives, l- / count of such negatives; the counts have none",
    source="Threshold-Consistent Margin Loss for Open-World Deep Metric Learning",
    published="pytorch-metric-learning's TCM ignores ref_emb; k and key_labels are heeded here",
)
def tcm_loss(
    x: Tensor, labels: Tensor, k: Tensor | None = None, key_labels: Tensor | None = None, *, pos_margin: float = 0.9,
    neg_margin: float = 0.5, pos_weight: float = 1.0, neg_weight: float = 1.0, normalize: bool = True,
) -> Tensor:  # fmt: skip
    """The regulariser that makes one threshold serve all classes: a hinge on the hard positives and the hard negatives, each
    averaged over the hard ones.

    Args: x, labels, k, key_labels: as in `contrastive_loss`; margins are cosines with `normalize`.
    Added to a base loss. 0 where no pair is hard. Raises ValueError and TypeError as `pair_map`. Memory: O(B + N).
    Source: Threshold-Consistent Margin Loss for Open-World Deep Metric Learning.
    """
    for name, value in (("pos_weight", pos_weight), ("neg_weight", neg_weight)):
        check_weight(name, value)
    pairs = _pairs(x, labels, k, key_labels, neg_margin, pos_margin, "hinge", normalize)
    positive, negative = _average(pairs.pos, pairs.pos_active), _average(pairs.neg, pairs.neg_active)
    return pos_weight * positive + neg_weight * negative


class ContrastiveLoss(LossModule):
    """`contrastive_loss` as a module."""

    def __init__(
        self, pos_margin: float = 1.0, neg_margin: float = 0.0, *, squared: bool = False, average: str = "active",
        normalize: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(
            contrastive_loss, pos_margin=pos_margin, neg_margin=neg_margin, squared=squared, average=average,
            normalize=normalize,
        )  # fmt: skip


class TCMLoss(LossModule):
    """`tcm_loss` as a module."""

    def __init__(
        self, pos_margin: float = 0.9, neg_margin: float = 0.5, pos_weight: float = 1.0, neg_weight: float = 1.0, *,
        normalize: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(
            tcm_loss, pos_margin=pos_margin, neg_margin=neg_margin, pos_weight=pos_weight, neg_weight=neg_weight,
            normalize=normalize,
        )  # fmt: skip
