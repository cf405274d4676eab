"""KoLeo: embeddings spread by their distances to the nearest neighbour; alone, and beside InfoNCE as for wearables."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import catalogue
from ..pairs import pair_nll, row_topk
from ..pairs.arguments import Temperature
from .arguments import check_same_shape, check_weight, unit
from .loss_module import LossModule
from .reduction import check_reduction, reduce


@catalogue.entry(
    formula="-mean_i log(|x_i - x_nn(i)| + eps), nn(i) the nearest other row",
    gradient="-(x_i - x_nn) / (|x_i - x_nn| (|x_i - x_nn| + eps)) / B to x_i, the negative to x_nn; the choice has "
    "none",
    source="DINOv2: Learning Robust Visual Features without Supervision; Spreading vectors for similarity search",
    published="the B x B matrix of cosines; eps 1e-8, weight 0.1 in DINOv2",
)
def koleo_loss(x: Tensor, *, eps: float = 1e-8, normalize: bool = True, reduction: str = "mean") -> Tensor:
    """The Kozachenko-Leonenko estimate of the negative entropy: -mean log of the distance to the nearest neighbour.

    Args:
        x: [B, D]; divided by their norms with `normalize`, else of unit norm already (nearest is the largest product).
        reduction: "mean", "mean_valid" (rows with a neighbour: all but that of a batch of one), "sum", "none" ([B]).

    Equal rows have the finite value -log eps and no gradient. Raises ValueError and TypeError as `row_topk`. Memory: O(B D).
    Source: DINOv2: Learning Robust Visual Features without Supervision.
    """
    check_reduction(reduction)
    if eps <= 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    x = unit(x, normalize)
    nearest = row_topk(x.detach(), count=1).columns[:, 0]
    found = nearest >= 0
    distance = torch.linalg.vector_norm(x - x[nearest.clamp(min=0)], dim=1)
    return reduce(-(torch.where(found, distance, 1.0) + eps).log(), reduction, found)


@catalogue.entry(
    formula="mean_i -log softmax_j(s <q_i, k_j>)_i + lambda KoLeo(q)",
    gradient="InfoNCE's, and KoLeo's to q",
    source="Large-scale Training of Foundation Models for Wearable Biosignals",
    published="keys of a momentum encoder (0.99), temperature 0.04, lambda 0.1 (recalled, not read in code)",
)
def info_nce_koleo_loss(
    q: Tensor, k: Tensor, scale: Temperature = 25.0, *, koleo_weight: float = 0.1, normalize: bool = True
) -> Tensor:  # fmt: skip
    """InfoNCE of q against the keys k of a momentum encoder, plus `koleo_weight` times `koleo_loss` of q.

    Args: q, k: [B, D]; k is used as given (detach a momentum encoder's). scale: s = 1 / temperature.
    Raises ValueError and TypeError as `pair_stats`. Memory: O(B D).
    Source: Large-scale Training of Foundation Models for Wearable Biosignals.
    """
    check_same_shape(q, k)
    check_weight("koleo_weight", koleo_weight)
    info_nce = pair_nll(q, k, scale=scale, normalize=normalize)[0].mean()
    return info_nce + koleo_weight * koleo_loss(q, normalize=normalize)


class KoLeoLoss(LossModule):
    """`koleo_loss` as a module."""

    def __init__(self, *, eps: float = 1e-8, normalize: bool = True, reduction: str = "mean") -> None:
        super().__init__(koleo_loss, eps=eps, normalize=normalize, reduction=reduction)
