"""RMT: test-time adaptation with a mean teacher and contrastive pull towards the source's prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import catalogue
from ..losses.distillation import mean_teacher_cross_entropy
from ..pairs import SameId, pair_stats, row_topk
from ..pairs.arguments import Temperature
from ..row_loss import row_loss
from .arguments import check_same_shape


def nearest_prototypes(x: Tensor, prototypes: Tensor) -> Tensor:
    """The prototype [B, D] of largest cosine of each row of x [B, D]; no gradient."""
    nearest = row_topk(x.detach(), prototypes.detach(), 1, among="both", normalize=True)
    return prototypes.detach()[nearest.columns[:, 0]]


@catalogue.entry(
    formula="mean over 3B views of lse over the other views of z - mean of z over the two of the same sample, z = s "
    "cos",
    gradient="supervised contrastive, with the sample as the label",
    source="Robust Mean Teacher for Continual and Gradual Test-Time Adaptation",
    published="temperature 0.1; a 3B x 3B matrix",
)
def view_contrast_loss(views: list[Tensor] | tuple[Tensor, ...], scale: Temperature = 10.0) -> Tensor:
    """Supervised contrastive loss (positives outside the log) of several views of each sample, all anchors.

    Args: views: two or more [B, D], as RMT's projections of prototype, sample and augmented sample; normalised inside.
    scale: 1 / temperature. Raises ValueError and TypeError as `pair_stats`. Memory: O(B D).
    Source: Robust Mean Teacher for Continual and Gradual Test-Time Adaptation.
    """
    if len(views) < 2:
        raise ValueError(f"view_contrast_loss takes two views or more, got {len(views)}")
    for v in views[1:]:
        check_same_shape(views[0], v)
    sample = torch.arange(views[0].shape[0], device=views[0].device).repeat(len(views))
    stats = pair_stats(torch.cat(list(views)), scale=scale, positive=SameId(sample), normalize=True)
    return (stats.lse - stats.pos_mean).mean()


@catalogue.entry(
    formula="w_ce mean (S(x, ema) + S(aug, ema)) / 2 + w_c view_contrast(prototype, x, aug), S(a, b) = -(1/2) sum q_b "
    "log p_a - (1/2) sum p_a log q_b",
    gradient="of the symmetric cross entropies and the contrast; none to the teacher",
    source="Robust Mean Teacher for Continual and Gradual Test-Time Adaptation",
    published="both weights 1, temperature 0.1, projection of 128, teacher's momentum 0.999",
)
def rmt_loss(
    logits: Tensor, augmented_logits: Tensor, teacher_logits: Tensor, views: list[Tensor] | tuple[Tensor, ...], *,
    scale: Temperature = 10.0, cross_entropy_weight: float = 1.0, contrast_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """The loss of one step of adaptation on unlabelled test samples.

    Args:
        logits, augmented_logits: the student's [B, C]; teacher_logits: the mean teacher's [B, C], no gradient.
        views: projections [B, D] of the nearest prototype (`nearest_prototypes`), the sample and its augmentation.

    Raises ValueError and TypeError as `row_loss` and `pair_stats`.
    Source: Robust Mean Teacher for Continual and Gradual Test-Time Adaptation.
    """
    teacher = teacher_logits.detach()
    entropies = [
        row_loss(student, None, mean_teacher_cross_entropy, teacher=teacher) for student in (logits, augmented_logits)
    ]
    return cross_entropy_weight * sum(entropies) / 2 + contrast_weight * view_contrast_loss(views, scale)
