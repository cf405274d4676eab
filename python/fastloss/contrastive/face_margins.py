"""Softmax losses of class centres with an angular margin (ArcFace, CosFace), and UNPG, which adds the batch's own negatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..losses import catalogue
from ..pairs import SameId, pair_stats
from ..pairs.statistics import logaddexp, softplus
from .arguments import check_labels, check_scale, check_weight, log_sum_exp, unit
from .order_statistics import negative_order_statistics
from .reduction import check_reduction, reduce

#: Added under the root of sin^2, whose slope is infinite where a sample lies on its centre.
_SINE_EPS = 1e-12


def _with_margin(cosine: Tensor, margin: float, kind: str) -> Tensor:
    if kind == "cosface":
        return cosine - margin
    if kind != "arcface":
        raise ValueError(f"kind must be 'arcface' or 'cosface', got {kind!r}")
    sine = (1 - cosine.square()).clamp(min=_SINE_EPS).sqrt()
    return cosine * math.cos(margin) - sine * math.sin(margin)


def _margin_rows(
    x: Tensor, weight: Tensor, target: Tensor, scale: float, margin: float, kind: str, ignore_index: int,
    more: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(-log share of the own class [B], which rows count), `more` a further log-sum-exp in every denominator."""
    check_labels(x, target, "target")
    check_weight("margin", margin)
    if weight.dim() != 2 or weight.shape[1:] != x.shape[1:]:
        raise ValueError(f"weight must be [C, {x.shape[1]}], got {list(weight.shape)}")
    counted = target != ignore_index
    if target.device.type == "cpu" and bool((counted & ((target < 0) | (target >= weight.shape[0]))).any()):
        raise IndexError(f"target must be in [0, {weight.shape[0]}) or {ignore_index}, got {target.tolist()[:8]}")
    classes = torch.arange(weight.shape[0], device=target.device, dtype=target.dtype)
    stats = pair_stats(
        x, weight, scale=scale, positive=SameId(target, classes), row_valid=counted, columns=False, normalize=True
    )
    own = scale * _with_margin(stats.pos_sum / scale, margin, kind)
    others = stats.neg_lse
    if more is not None:
        others = logaddexp(others, more.expand_as(others))
    alone = others == -float("inf")
    return torch.where(alone, 0.0, softplus(torch.where(alone, 0.0, others - own))), counted


@catalogue.entry(
    formula="-log(e^(s c'_y) / (e^(s c'_y) + sum over j != y of e^(s c_j))), c = cosines with the centres, c'_y = "
    "cos(theta_y + m) (arcface) or c_y - m (cosface)",
    gradient="s (p_j - [j = y]) times d c'_y / d c_y at y",
    source="ArcFace: Additive Angular Margin Loss for Deep Face Recognition; CosFace: Large Margin Cosine Loss",
    published="arccos and cos of all B x C cosines, with an infinite slope at 1; here cos(theta + m) of the own class "
    "alone",
)
def angular_margin_loss(
    x: Tensor, weight: Tensor, target: Tensor, *, scale: float = 64.0, margin: float = 0.5, kind: str = "arcface",
    ignore_index: int = -1, reduction: str = "mean_valid",
) -> Tensor:  # fmt: skip
    """The margin softmax of face recognition, without the B x C logits.

    Args:
        x: [B, D]; weight: class centres [C, D]; both are divided by their norms. target: integers [B] in [0, C).
        scale: s; margin: m, an angle for "arcface", a cosine for "cosface" (whose published values are s = 64, m = 0.35).
        ignore_index: rows of this target do not count.
        reduction: "mean_valid" over rows that count, "mean" over all, "sum", "none" ([B]).

    Raises ValueError, TypeError, and on a CPU IndexError for a target out of range. Memory: O(B + C).
    Source: ArcFace: Additive Angular Margin Loss for Deep Face Recognition.
    """
    check_reduction(reduction)
    values, counted = _margin_rows(x, weight, target, scale, margin, kind, ignore_index, None)
    return reduce(values, reduction, counted)


@torch.no_grad()
def whiskers(x: Tensor, labels: Tensor, width: float = 1.5) -> tuple[Tensor, Tensor]:
    """(Q1 - w IQR, Q3 + w IQR) of the cosines of all pairs of rows with different labels, exact; x of unit norm."""
    counts = torch.unique(labels, return_counts=True)[1]
    pairs = labels.numel() ** 2 - int((counts * counts).sum())
    if pairs == 0:
        infinite = x.new_full((), float("inf"))
        return -infinite, infinite
    each = pairs // 2
    first, third = negative_order_statistics(x, labels, [int(0.25 * each), int(0.75 * each)])
    spread = width * (third - first)
    return first - spread, third + spread


@catalogue.entry(
    formula="-log(e^(s c'_y) / (e^(s c'_y) + sum over j != y of e^(s c_j) + sum over n in SN' of e^(s n))), SN' = "
    "cosines of the batch's pairs with different labels within [Q1 - w IQR, Q3 + w IQR], the same for every row",
    gradient="that of the margin softmax; to each pair in SN' s e^(s n) times the sum over rows of 1 / denominator",
    source="Unified Negative Pair Generation toward Well-discriminative Feature Space for Face Recognition",
    published="concatenates the list to every row: B x B^2 / 2 numbers; here one log-sum-exp of it serves all rows",
)
def unpg_loss(
    x: Tensor, weight: Tensor, target: Tensor, *, scale: float = 64.0, margin: float = 0.5, kind: str = "arcface",
    width: float = 1.5, ignore_index: int = -1, reduction: str = "mean_valid",
) -> Tensor:  # fmt: skip
    """`angular_margin_loss` whose denominators also hold the similarities of the batch's own negative pairs, but for outliers.

    Args: as in `angular_margin_loss`; width: w of the whiskers. Each pair counts once. Rows that are ignored are in no pair.
    The quartiles are exact order statistics (numbers int(l / 4) and int(3 l / 4) of the l cosines, as published), found in
    a pass over blocks of the matrix, and have no gradient; they read sizes from the device.

    Raises as `angular_margin_loss`. Memory: O(B + C) and one block of similarities.
    Source: Unified Negative Pair Generation toward Well-discriminative Feature Space for Face Recognition.
    """
    check_reduction(reduction)
    check_weight("width", width)
    check_labels(x, target, "target")
    kept = target != ignore_index
    normed, labels = unit(x[kept]), target[kept]
    window = whiskers(normed.detach(), labels, width)
    batch = pair_stats(
        normed, scale=scale, excluded=SameId(labels), window=window, columns=False
    )  # fmt: skip
    shared = log_sum_exp(batch.neg_lse) - math.log(2)
    values, counted = _margin_rows(x, weight, target, scale, margin, kind, ignore_index, shared)
    return reduce(values, reduction, counted)


class AngularMarginLoss(nn.Module):
    """`angular_margin_loss`, or with `unpg=True` `unpg_loss`, with its class centres, drawn by xavier_uniform_ as published.

    Source: ArcFace: Additive Angular Margin Loss for Deep Face Recognition; Unified Negative Pair Generation toward
    Well-discriminative Feature Space for Face Recognition.
    """

    def __init__(
        self, in_features: int, num_classes: int, scale: float = 64.0, margin: float = 0.5, kind: str = "arcface",
        unpg: bool = False, width: float = 1.5,
    ) -> None:  # fmt: skip
        super().__init__()
        check_scale("scale", scale)
        check_weight("margin", margin)
        check_weight("width", width)
        _with_margin(torch.zeros(()), margin, kind)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.xavier_uniform_(self.weight)
        self.scale, self.margin, self.kind, self.unpg, self.width = scale, margin, kind, unpg, width

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """The mean loss of embeddings [B, D] and classes [B]."""
        if self.unpg:
            return unpg_loss(
                x, self.weight, target, scale=self.scale, margin=self.margin, kind=self.kind, width=self.width
            )
        return angular_margin_loss(x, self.weight, target, scale=self.scale, margin=self.margin, kind=self.kind)
