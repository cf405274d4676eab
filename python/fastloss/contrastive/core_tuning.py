"""Core-tuning: supervised contrastive learning with focal weights, and hard pairs mixed from features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..losses import catalogue
from ..pairs import Diagonal, SameId, pair_stats, row_topk
from ..pairs.arguments import Temperature
from ..pairs.statistics import INF
from .dots import scale_of
from .loss_module import LossModule
from .reduction import check_reduction, reduce


@catalogue.entry(
    formula="mean over i of sum over positives p of -(1 - p_ip) log p_ip / B, p_ij = softmax over j != i of s_ij / tau",
    gradient="through the weight: -(1 - p - p log p) on log p_ip",
    source="Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning",
    published="tau 0.07; divided by B inside and by the rows with positives outside",
)
def focal_supcon_loss(
    x: Tensor, labels: Tensor, temperature: Temperature = 0.07, *, divide_by: str = "batch", normalize: bool = True,
    reduction: str = "mean_valid",
) -> Tensor:  # fmt: skip
    """Core-tuning's focal SupCon: hard positives weigh more, and the weight is trained through.

        L_i = (1 / n) sum over positives p of -(1 - p_ip) log p_ip,   p_ij = e^(z_ij) / sum over j != i of e^(z_ij),   z = s / tau

    Args:
        x: [B, D]; labels: integers [B].
        temperature: tau > 0.
        divide_by: n is B ("batch", published) or the number of positives of the row ("positives").
        normalize: similarities are cosines.
        reduction: "mean_valid" over rows with positives (published), "mean", "sum" or "none" ([B]).

    Costs two sweeps. Raises ValueError and TypeError as `pair_stats`. Source: Unleashing the Power of Contrastive Self-Supervised
    Visual Models via Contrast-Regularized Fine-Tuning.
    """
    check_reduction(reduction)
    if divide_by not in ("batch", "positives"):
        raise ValueError(f"divide_by must be batch or positives, got {divide_by!r}")
    scale = scale_of(temperature)
    among = pair_stats(x, scale=scale, positive=SameId(labels), normalize=normalize, mean=True, columns=False)
    whole = pair_stats(x, scale=scale, normalize=normalize, mean=True, columns=False)  # all pairs are its negatives
    some = among.has_positive
    lse = torch.where(some, whole.neg_lse, 0.0)
    # sum_p p_ip log p_ip = E[z - lse] over all - P(negatives) E[z - lse] over the negatives
    negatives = torch.where(among.neg_count > 0, (among.neg_lse - lse).exp(), 0.0)
    entropy = (whole.neg_mean - lse) - negatives * (among.neg_mean - lse)
    values = (lse * among.pos_count - among.pos_sum) + torch.where(some, entropy, 0.0)
    divisor = x.shape[0] if divide_by == "batch" else among.pos_count.clamp(min=1)
    return reduce(values / divisor, reduction, some)


class MixedPairs(NamedTuple):
    """share x_first + (1 - share) x_second: features [2B, D], indices and share [2B]. Targets are mixed alike."""

    features: Tensor
    first: Tensor
    second: Tensor
    share: Tensor


@catalogue.entry(
    formula="lambda x_(hardest positive) + (1 - lambda) x_(hardest negative); lambda x_(random) + (1 - lambda) x_i",
    gradient="into the features; none through the choice",
    source="Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning",
    published="lambda uniform, at least 0.8 in the second; a class of one takes sample 0 in the code, itself here",
)
def mix_hard_pairs(
    x: Tensor, labels: Tensor, *, least_share: float = 0.8, generator: torch.Generator | None = None
) -> MixedPairs:
    """Core-tuning's hard pairs: first B negative ones, a random sample with a little of row i; then B positive ones, of the
    hardest positive and the hardest negative of row i by cosine.

    Args:
        x: [B, D]; labels: integers [B]. least_share: of the random sample in a negative pair, in [0, 1].
        generator: of the random numbers, on the device of x.

    A row without a positive (or negative) takes itself. Raises ValueError and TypeError as `row_topk`.
    Source: Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning.
    """
    if not 0 <= least_share <= 1:
        raise ValueError(f"least_share must be in [0, 1], got {least_share}")
    fixed, b, device = x.detach(), x.shape[0], x.device
    own = torch.arange(b, device=device)
    same = SameId(labels)
    nearest = row_topk(fixed, count=1, positive=same, normalize=True)
    farthest = row_topk(-fixed, fixed, 1, among="positive", positive=same, excluded=Diagonal(), normalize=True)
    negative, positive = (torch.where(t.values[:, 0] == -INF, own, t.columns[:, 0]) for t in (nearest, farthest))
    other = torch.randperm(b, device=device, generator=generator)
    share = torch.rand(2, b, device=device, generator=generator, dtype=torch.promote_types(x.dtype, torch.float32))
    share[0].clamp_(min=least_share)
    first, second, share = torch.cat((other, positive)), torch.cat((own, negative)), share.flatten()
    part = share[:, None].to(x.dtype)
    return MixedPairs(part * x[first] + (1 - part) * x[second], first, second, share)


class FocalSupConLoss(LossModule):
    """`focal_supcon_loss` as a module."""

    def __init__(self, temperature: float = 0.07, *, divide_by: str = "batch", normalize: bool = True) -> None:
        scale_of(temperature)
        super().__init__(focal_supcon_loss, temperature=temperature, divide_by=divide_by, normalize=normalize)
