"""KaLM-Embedding-V2: focal InfoNCE, and hard negatives mixed online."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import catalogue
from ..pairs.arguments import Temperature
from .dots import scale_of, unit
from .info_nce import info_nce
from .loss_module import LossModule


@catalogue.entry(
    formula="mean of (1 - p_i)^gamma (-log p_i), p_i the InfoNCE softmax of the positive",
    gradient="through the weight too: (1 - p)^gamma (1 + gamma p log p / (1 - p)) times that of InfoNCE",
    source="KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model",
    published="gamma 0.5, temperature 0.02",
)
def focal_info_nce(
    q: Tensor, k: Tensor, temperature: Temperature = 0.02, *, gamma: float = 0.5, negatives: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Focal InfoNCE of KaLM-Embedding-V2: samples that are solved weigh less.

        L_i = (1 - p_i)^gamma (-log p_i),   p_i = e^(s_ii / tau) / (sum over keys and hard negatives of all rows)

    Args:
        q, k: [B, D]; negatives: [B, M, D] hard negatives (`mix_hard_negatives` makes more), negatives of every row.
        temperature: tau > 0. gamma: >= 0. reduction: "mean", "sum" or "none" ([B]).

    `info_nce(focal_gamma=)` takes all other options. Raises ValueError and TypeError as it.
    Source: KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model.
    """
    return info_nce(q, k, scale_of(temperature), negatives=negatives, focal_gamma=gamma, reduction=reduction)


@catalogue.entry(
    formula="pair: norm(lambda h_a + (1 - lambda) h_b); list: norm(sum_m lambda_m h_m), lambda uniform on the simplex",
    gradient="into the hard negatives",
    source="KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model",
    published="the distribution of lambda is not published: uniform here",
)
def mix_hard_negatives(
    negatives: Tensor, count: int, mode: str = "pair", *, normalize: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Further hard negatives of each row: convex mixtures of its own, divided by their norm.

        pair:  lambda h_a + (1 - lambda) h_b of two different ones;   list:  sum over all of lambda_m h_m

    Args:
        negatives: [B, M, D], M >= 2. count: how many are made of each row.
        mode: "pair" or "list". normalize: divide each negative by its norm first (mixtures always are).
        generator: of the random numbers, on the device of `negatives`.

    Returns [B, count, D] in the dtype of `negatives`, differentiable: append it to them. Raises ValueError for shapes and modes.
    Source: KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model.
    """
    if negatives.dim() != 3 or negatives.shape[1] < 2:
        raise ValueError(f"negatives must be [B, M, D] with M >= 2, got {list(negatives.shape)}")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count must be an integer >= 1, got {count!r}")
    if mode not in ("pair", "list"):
        raise ValueError(f"mode must be pair or list, got {mode!r}")
    b, m, d = negatives.shape
    device = negatives.device
    if normalize:
        negatives = unit(negatives)
    if mode == "list":  # exponentials over their sum are uniform on the simplex
        share = -torch.rand(b, count, m, device=device, generator=generator).clamp_min(1e-30).log()
        return unit((share / share.sum(2, keepdim=True)).to(negatives.dtype) @ negatives)
    first = torch.randint(m, (b, count), device=device, generator=generator)
    second = (first + torch.randint(1, m, (b, count), device=device, generator=generator)) % m
    share = torch.rand(b, count, 1, device=device, generator=generator).to(negatives.dtype)
    a, other = (negatives.gather(1, at[..., None].expand(b, count, d)) for at in (first, second))
    return unit(share * a + (1 - share) * other)


class FocalInfoNCELoss(LossModule):
    """`focal_info_nce` as a module."""

    def __init__(self, temperature: float = 0.02, *, gamma: float = 0.5, reduction: str = "mean") -> None:
        scale_of(temperature)
        super().__init__(focal_info_nce, temperature=temperature, gamma=gamma, reduction=reduction)
