"""Losses of mixed examples: M3CoL's mixup contrastive loss and Metrix's mixed negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import catalogue
from ..pairs import edge_dot, pair_stats
from ..pairs.arguments import Temperature, number
from .arguments import check_same_shape, check_share, check_weight, unit, wide
from .loss_module import LossModule
from .reduction import check_reduction, reduce


def draw_mixture(
    batch: int, alpha: float = 0.15, *, device: torch.device | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """(permutation [batch], shares [batch] from Beta(alpha, alpha)): row i becomes share_i x_i + (1 - share_i) x_perm(i).

    M3CoL draws with alpha = 0.15, Metrix with 2.
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    gamma = torch._standard_gamma(torch.full((2, batch), float(alpha), device=device), generator=generator)
    shares = gamma[0] / gamma.sum(0).clamp(min=torch.finfo(gamma.dtype).tiny)
    return torch.randperm(batch, generator=generator, device=device), shares


@catalogue.entry(
    formula="rows: lse_j z_ij - b_i z_ii - (1 - b_i) z_i,perm(i), z = s cos(q_i, k_j); columns the same with the "
    "transposed targets; mean of both",
    gradient="(p_row - target + p_column c_j - target) s / 2B, c_j the sum of column j's targets",
    source="Harnessing Shared Relations via Multimodal Mixup Contrastive Learning for Multimodal Classification",
    published="where perm(i) = i the target b_i is overwritten by 1 - b_i; here they add up to 1. Temperature 0.1, "
    "Beta(0.15, 0.15)",
)
def mixup_info_nce_loss(
    mixed: Tensor, k: Tensor, permutation: Tensor, share: Tensor, scale: Temperature = 10.0, *, normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """M3CoL's contrastive loss: row i of `mixed`, made of share_i of example i and the rest of example perm(i), has two keys.

    Args:
        mixed: embeddings of the mixed examples [B, D]; k: of the unmixed other modality [B, D].
        permutation: int64 [B]; share: b [B] in [0, 1] (`draw_mixture`).
        scale: s = 1 / temperature. reduction: "mean", "sum", "none" ([B], half row i's and half column i's loss).

    Raises ValueError and TypeError as `pair_stats`, and on a CPU IndexError for a permutation out of range.
    Memory: O(B D). Source: Harnessing Shared Relations via Multimodal Mixup Contrastive Learning for Multimodal
    Classification.
    """
    check_reduction(reduction)
    check_same_shape(mixed, k)
    batch = mixed.shape[0]
    for name, x in (("permutation", permutation), ("share", share)):
        if x.shape != (batch,):
            raise ValueError(f"{name} must have shape [{batch}], got {list(x.shape)}")
    check_share(share)
    q, k = unit(mixed, normalize), unit(k, normalize)
    stats = pair_stats(q, k, scale=scale, positive=None)
    rows = torch.arange(batch, device=q.device)
    share = share.to(q.dtype)
    own = share * scale * edge_dot(q, k, rows, rows)
    other = (1 - share) * scale * edge_dot(q, k, rows, permutation)
    at_columns = torch.zeros_like(share).index_add(0, permutation, 1 - share)
    pulled = torch.zeros_like(own).index_add(0, permutation, other)
    row_loss = stats.neg_lse - own - other
    column_loss = (share + at_columns) * stats.columns.neg_lse - own - pulled
    return reduce((row_loss + column_loss) / 2, reduction)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a - b, dim=1)


@catalogue.entry(
    formula="max(d_ap - m+, 0) + max(m- - d_an, 0) + w (b max(d_mix - m+, 0) + (1 - b) max(m- - d_mix, 0)), d_mix = |a "
    "- b p - (1 - b) n|, d = Euclidean distances",
    gradient="of the distances, through the mixture to p (or a) and n",
    source="It Takes Two to Tango: Mixup for Deep Metric Learning",
    published="margins 0 and 0.5, Beta(2, 2), w = 0.4 for positive with negative, 0.3 for anchor with negative",
)
def metrix_loss(
    anchor: Tensor, positive: Tensor, negative: Tensor, share: Tensor | float, *, mixed: Tensor | None = None,
    pair: str = "positive-negative", weight: float = 0.4, pos_margin: float = 0.0, neg_margin: float = 0.5,
    normalize: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The contrastive loss of triplets with one more example a triplet: a mixture, that is positive by its share b.

    Args:
        anchor, positive, negative: [T, D]. share: b in [0, 1], a number or [T].
        mixed: embeddings [T, D] of mixtures made before (of inputs or features); None mixes the embeddings here:
            b p + (1 - b) n, or for pair="anchor-negative" b a + (1 - b) n.
        weight: w; pos_margin, neg_margin: on distances. reduction: "mean", "sum", "none" ([T]).

    Raises ValueError for shapes that do not match. Source: It Takes Two to Tango: Mixup for Deep Metric Learning.
    """
    check_reduction(reduction)
    check_weight("weight", weight)
    check_same_shape(anchor, positive)
    check_same_shape(anchor, negative)
    anchor, positive, negative = (unit(x, normalize) for x in (anchor, positive, negative))
    share = number(share, anchor.dtype, anchor.device)
    if share.shape not in ((), anchor.shape[:1]):
        raise ValueError(f"share must be a number or [{anchor.shape[0]}], got {list(share.shape)}")
    check_share(share)
    if mixed is not None:
        check_same_shape(anchor, mixed)
        mixed = unit(mixed, normalize)
    elif pair in ("positive-negative", "anchor-negative"):
        first = positive if pair == "positive-negative" else anchor
        mixed = share[..., None] * first + (1 - share[..., None]) * negative
    else:
        raise ValueError(f"pair must be 'positive-negative' or 'anchor-negative', got {pair!r}")
    between = _distance(anchor, mixed)
    clean = (_distance(anchor, positive) - pos_margin).relu() + (neg_margin - _distance(anchor, negative)).relu()
    mixture = share * (between - pos_margin).relu() + (1 - share) * (neg_margin - between).relu()
    return reduce(wide(clean + weight * mixture), reduction)


class MetrixLoss(LossModule):
    """`metrix_loss` as a module."""

    def __init__(
        self, *, pair: str = "positive-negative", weight: float = 0.4, pos_margin: float = 0.0, neg_margin: float = 0.5,
        normalize: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(
            metrix_loss, pair=pair, weight=weight, pos_margin=pos_margin, neg_margin=neg_margin, normalize=normalize
        )
