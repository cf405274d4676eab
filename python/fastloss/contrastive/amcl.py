"""AMCL: several projection heads, the hardest negative of each, and a temperature of each pair that is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..losses import catalogue
from ..pairs import Diagonal, row_topk
from .dots import edge_similarity, unit
from .reduction import check_reduction, reduce

PairTemperature = Callable[[Tensor, Tensor], Tensor]


def temperature_prior(tau: Tensor, dim: int) -> Tensor:
    """Omega(tau) = (dim / 2) log tau + 1 / tau."""
    return dim / 2 * tau.log() + 1 / tau


@catalogue.entry(
    formula="sum over heads of -s_ip / tau_p + max_n s_in / tau_n + beta (Omega(tau_p) - Omega(tau_n))",
    gradient="along two edges a row, and into the network of the temperatures; none through the choice of the hardest",
    source="Adaptive Multi-head Contrastive Learning",
    published="3 heads, beta 0.1, tau = 1e-5 + (2 - 1e-5) sigmoid(MLP)",
)
def amcl_loss(
    view1: Tensor, view2: Tensor, temperature: PairTemperature, *, beta: float = 0.1, normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Adaptive multi-head contrastive loss: of each head, the positive and the hardest negative, each at its own temperature.

        L_i = sum over heads of  -s_ip / tau_ip + s_in* / tau_in* + beta (Omega(tau_ip) - Omega(tau_in*)),
        n* = argmax over negatives of s_in,   Omega(tau) = (d / 2) log tau + 1 / tau

    Args:
        view1, view2: [B, C, D], C heads, B >= 2; negatives are the 2B - 2 views of other samples.
        temperature: of pairs (a [E, D], b [E, D]) -> tau [E] > 0; an `AdaptiveTemperature`.
        beta: weight of the prior. normalize: similarities are cosines, and the network sees unit vectors.
        reduction: "mean", "sum" or "none" ([2B]).

    The 2B x 2B similarities of a head are never stored. Raises ValueError and TypeError as `row_topk`.
    Source: Adaptive Multi-head Contrastive Learning.
    """
    check_reduction(reduction)
    if view1.dim() != 3 or view1.shape != view2.shape or view1.shape[0] < 2:
        raise ValueError(
            f"the two views must have one shape [B >= 2, heads, D], got {list(view1.shape)} and {list(view2.shape)}"
        )
    b, heads, dim = view1.shape
    rows = torch.arange(2 * b, device=view1.device)
    partner = (rows + b) % (2 * b)
    total = None
    for head in range(heads):
        x = torch.cat((view1[:, head], view2[:, head]))
        if normalize:
            x = unit(x)
        hardest = row_topk(x.detach(), count=1, positive=Diagonal(b, -b)).columns[:, 0]
        tau_positive, tau_negative = (temperature(x, x[other]) for other in (partner, hardest))
        positive, negative = (edge_similarity(x, x, rows, other, False) for other in (partner, hardest))
        prior = temperature_prior(tau_positive, dim) - temperature_prior(tau_negative, dim)
        values = negative / tau_negative - positive / tau_positive + beta * prior
        total = values if total is None else total + values
    if total is None:
        raise ValueError(f"the views have no heads: {list(view1.shape)}")
    return reduce(total, reduction)


class AdaptiveTemperature(nn.Module):
    """tau = low + (high - low) sigmoid(MLP([a; b])) of pairs a, b [E, D]: 2D -> hidden -> 1, computed in float32."""

    def __init__(self, dim: int, hidden: int = 128, low: float = 1e-5, high: float = 2.0) -> None:
        super().__init__()
        if not 0 < low < high:
            raise ValueError(f"0 < low < high is needed, got {low} and {high}")
        self.low, self.high = low, high
        self.network = nn.Sequential(nn.Linear(2 * dim, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """tau [E]."""
        dtype = torch.promote_types(a.dtype, torch.float32)
        score = self.network(torch.cat((a, b), 1).to(dtype)).squeeze(1)
        return self.low + (self.high - self.low) * torch.sigmoid(score)


class AMCLLoss(nn.Module):
    """`amcl_loss` with one network of temperatures, shared by the heads."""

    def __init__(self, dim: int, beta: float = 0.1, *, hidden: int = 128, normalize: bool = True) -> None:
        super().__init__()
        self.temperature = AdaptiveTemperature(dim, hidden)
        self.beta, self.normalize = beta, normalize

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """The mean loss of two views [B, heads, D]."""
        return amcl_loss(view1, view2, self.temperature, beta=self.beta, normalize=self.normalize)
