"""Backward-compatible training: new embeddings that the old model's gallery understands (BCT, BT^2)."""

from __future__ import annotations

from torch import Tensor

from ..functional import linear_cross_entropy
from ..losses import catalogue
from .arguments import check_same_shape, check_weight, row_dots


def _frozen_head(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    return linear_cross_entropy(
        features, weight.detach(), target, linear_bias=None if bias is None else bias.detach()
    )  # fmt: skip


@catalogue.entry(
    formula="CE(W phi, y) + 10 CE(W_old phi, y), W_old frozen",
    gradient="of two linear cross entropies to phi, and to W",
    source="$BT^2$: Backward-compatible Training with Basis Transformation (its baseline BCT, Towards "
    "Backward-Compatible Representation Learning)",
    published="weight 10",
)
def bct_loss(
    features: Tensor, weight: Tensor, target: Tensor, old_weight: Tensor, *, bias: Tensor | None = None,
    old_bias: Tensor | None = None, compatibility: float = 10.0,
) -> Tensor:  # fmt: skip
    """Cross entropy with the new head and, `compatibility` times, with the old model's frozen head.

    Args: features: [B, D]; weight: [C, D]; old_weight: [C', D], no gradient; target: integers [B].
    Raises as `linear_cross_entropy`. Neither head's logits are stored.
    Source: $BT^2$: Backward-compatible Training with Basis Transformation.
    """
    check_weight("compatibility", compatibility)
    new = linear_cross_entropy(features, weight, target, linear_bias=bias)
    return new + compatibility * _frozen_head(features, old_weight, old_bias, target)


@catalogue.entry(
    formula="CE(W phi, y) + 10 CE(W_old a, y) + 5 (1 - cos(a, phi_old)) + 1 (1 - cos(b, phi'))",
    gradient="of two linear cross entropies and two cosines; none to W_old, phi_old, phi'",
    source="$BT^2$: Backward-compatible Training with Basis Transformation",
    published="weights 10, 5 and 1",
)
def bt2_loss(
    features: Tensor, weight: Tensor, target: Tensor, old_part: Tensor, old_weight: Tensor, old_features: Tensor,
    new_part: Tensor, independent_features: Tensor, *, bias: Tensor | None = None, old_bias: Tensor | None = None,
    compatibility: float = 10.0, old_cosine: float = 5.0, new_cosine: float = 1.0,
) -> Tensor:  # fmt: skip
    """BT^2: after the basis transformation one part of the embedding is compatible with the old model, another keeps what a new
    model trained alone knows.

    Args:
        features: [B, D] with the new head weight [C, D]; target: integers [B].
        old_part: a [B, E], with the old head old_weight [C', E] (frozen) and the old model's old_features [B, E].
        new_part: b [B, F], with independent_features phi' [B, F] of the independently trained new model.

    Raises as `linear_cross_entropy`, ValueError for shapes that do not match.
    Source: $BT^2$: Backward-compatible Training with Basis Transformation.
    """
    for name, value in (("compatibility", compatibility), ("old_cosine", old_cosine), ("new_cosine", new_cosine)):
        check_weight(name, value)
    check_same_shape(old_part, old_features)
    check_same_shape(new_part, independent_features)
    loss = linear_cross_entropy(features, weight, target, linear_bias=bias)
    loss = loss + compatibility * _frozen_head(old_part, old_weight, old_bias, target)
    loss = loss + old_cosine * (1 - row_dots(old_part, old_features.detach(), True)).mean()
    return loss + new_cosine * (1 - row_dots(new_part, independent_features.detach(), True)).mean()
