"""Alignment of two representations: TACO's bilinear InfoNCE, Glocal-IB's over time, SiamLIP's without negatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses import catalogue
from ..pairs import pair_nll
from .arguments import check_same_shape, row_dots, wide
from .reduction import check_reduction, reduce


@catalogue.entry(
    formula="-log softmax_j(x_i^T W k_j)_i",
    gradient="InfoNCE's with queries W^T x: dW = x^T (p - I) k / B",
    source="TACO: Temporal Latent Action-Driven Contrastive Loss for Visual Reinforcement Learning",
    published="W uniform in [0, 1), keys of a momentum encoder without gradient, no temperature, no normalisation",
)
def bilinear_info_nce_loss(x: Tensor, k: Tensor, weight: Tensor, *, reduction: str = "mean") -> Tensor:
    """InfoNCE with the trained similarity x^T W k (TACO, CURL): predicted latents against the latents that came.

    Args: x: [B, D]; k: [B, E] (detach a momentum encoder's); weight: [D, E]. reduction: "mean", "sum", "none" ([B]).
    Raises ValueError and TypeError as `pair_stats`. Memory: O(B E).
    Source: TACO: Temporal Latent Action-Driven Contrastive Loss for Visual Reinforcement Learning.
    """
    check_reduction(reduction)
    if x.dim() != 2 or k.dim() != 2 or weight.shape != (x.shape[1], k.shape[1]):
        raise ValueError(
            f"weight must be [D, E] for x [B, D] and k [B, E], got {[list(t.shape) for t in (weight, x, k)]}"
        )
    q = x @ weight
    check_same_shape(q, k)
    return reduce(pair_nll(q, k)[0], reduction)


class BilinearInfoNCE(nn.Module):
    """`bilinear_info_nce_loss` with its trained W, uniform in [0, 1) at the start, as published.

    Source: TACO: Temporal Latent Action-Driven Contrastive Loss for Visual Reinforcement Learning.
    """

    def __init__(self, features: int, key_features: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features, features if key_features is None else key_features))

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        """The mean loss of embeddings [B, D] and keys [B, E]."""
        return bilinear_info_nce_loss(x, k, self.weight)


@catalogue.entry(
    formula="mean over samples and times j of -log softmax_i(cos(p_i, z_j))_j, i and j the times of one sample",
    gradient="InfoNCE's, within each sample",
    source="Glocal Information Bottleneck for Time Series Imputation",
    published="the softmax runs over the predictions (dim 1 of p z^T); no temperature; z without gradient",
)
def glocal_alignment_loss(
    p: Tensor, z: Tensor, *, scale: float | Tensor = 1.0, softmax: str = "predictions", detach: bool = True
) -> Tensor:  # fmt: skip
    """Glocal-IB's alignment: at each time of each sample the global representation z picks out the prediction p of its own time.

    Args:
        p, z: [B, T, E], divided by their norms. scale: 1 / temperature.
        softmax: "predictions" (over p, as published) or "targets" (over z: InfoNCE with queries p).
        detach: no gradient into z, as published.

    Raises ValueError and TypeError as `pair_stats`. Memory: O(B T E).
    Source: Glocal Information Bottleneck for Time Series Imputation.
    """
    if p.dim() != 3 or p.shape != z.shape:
        raise ValueError(f"p and z must have one shape [B, T, E], got {list(p.shape)} and {list(z.shape)}")
    if softmax not in ("predictions", "targets"):
        raise ValueError(f"softmax must be 'predictions' or 'targets', got {softmax!r}")
    z = z.detach() if detach else z
    q, k = (z, p) if softmax == "predictions" else (p, z)
    return pair_nll(q, k, scale=scale, normalize=True)[0].mean()


@catalogue.entry(
    formula="mean of 2 - 2 cos(p, sg(v)) over both directions",
    gradient="-2 / 2B of the cosines to p",
    source="Improved baselines for vision-language pre-training",
    published="SiamLIP: predictions of one modality against projections of the other; every pair of crops counts alike",
)
def siamlip_loss(p_image: Tensor, v_text: Tensor, p_text: Tensor, v_image: Tensor) -> Tensor:
    """SiamLIP without negatives: the image's prediction meets the text's projection and the other way round, no gradient to v.

    Args: [B, D] each; normalised inside. For several crops take the mean over the pairs. Raises ValueError for other shapes.
    Source: Improved baselines for vision-language pre-training.
    """
    for x in (v_text, p_text, v_image):
        check_same_shape(p_image, x)
    cosines = [row_dots(p, v.detach(), True) for p, v in ((p_image, v_text), (p_text, v_image))]
    return wide(2 - torch.cat(cosines) * 2).mean()
