"""Label-distributionally robust losses: a softened maximum of margins, at one temperature or at one for every sample."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..statistics import RowStats
from . import catalogue
from .margin_form import check_above, check_temperature, counted

PAPER = "Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and Adaptivity"


@catalogue.row(
    formula="lam log((1/V) sum_j e^((z_j - z_y + margin 1[j != y]) / lam)) = lam softplus(margin/lam - d_lam) - lam log V",
    gradient="-sigma(margin/lam - d_lam) (1[j=y] - pi_j), pi = softmax of the rest at temperature lam",
    source=PAPER,
    statistics=("tempered_lse",),
    temperature="lam",
    published="exponentiates z_j - z_y + margin without a maximum; here the margin at temperature lam",
)
def ldr_kl(stats: RowStats, *, lam: float = 1.0, margin: float = 2.0) -> Tensor:
    """lam log((1/V) sum_j e^((z_j - z_y + margin 1[j != y]) / lam)), one value a row, 0 on ignored rows.

    lam -> 0 is the multi-class hinge max_j (z_j - z_y + margin 1[j != y]), lam -> inf its mean. Needs "tempered_lse" at
    temperature lam, which `row_loss` asks for. Raises ValueError for statistics at another temperature.

    "Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and Adaptivity", Zhu,
    Ying and Yang (2023).
    """
    check_temperature(stats, "lam", lam)
    rows = -lam * F.logsigmoid(stats.tempered_margin - margin / lam)
    return counted(stats, rows - lam * math.log(stats.vocab))


@catalogue.row(
    formula="LDR-KL at the sample's own lam_i, - (alpha log V / (2 initial)) (lam_i - initial)^2",
    gradient="that of ldr_kl at lam_i, which is a constant",
    source=PAPER,
    statistics=("tempered_lse",),
    temperature="lam",
    published="adds 1e-5 to p and normalises again before the entropy, which is then not that of p; here the entropy itself",
)
def aldr_kl(stats: RowStats, *, lam: Tensor, initial: float = 1.0, alpha: float = 1.0, margin: float = 1.0) -> Tensor:
    """LDR-KL whose lam is one number a row, minus what it costs to move it from `initial` (the paper's lam_0).

    lam: a tensor of the rows' shape, taken as a constant: from `AdaptiveLambda`. Raises ValueError for statistics at
    another temperature, for initial <= 0 and alpha <= 0. Zhu, Ying and Yang (2023), as above.
    """
    check_above(0, initial=initial, alpha=alpha)
    check_temperature(stats, "lam", lam)
    if stats.temperature is None:
        raise ValueError("aldr_kl needs statistics at the temperatures lam")
    own = stats.temperature.reshape(stats.shape)
    rows = -own * F.logsigmoid(stats.tempered_margin - margin / own)
    classes = math.log(stats.vocab)
    return counted(stats, rows - own * classes - alpha * classes / (2 * initial) * (own - initial) ** 2)


class AdaptiveLambda(torch.nn.Module):
    """The lam_i of every training sample, moved by the entropy of its own prediction: confident samples get a small one.

        lam_i <- initial (1 - KL_i / (alpha log V)),   KL_i = log V - H(softmax(z / lam_i))

    One number a sample, in the buffer `lam`, so that checkpoints have it. A step:

        lam = adaptive(index)                                             # those of the batch, [rows]
        h = row_stats(logits / lam[:, None], stats="entropy").entropy     # at the old lam; of a linear head: input / lam
        adaptive.update(index, h.detach(), classes=V)
        loss = row_loss(logits, target, aldr_kl, lam=adaptive(index))

    Updating after the loss instead lets lam lag by one step. `floor` times `initial` is the least lam, since a temperature
    must be > 0 (published: the 1e-5 added to p has that effect). Raises ValueError for samples < 1, initial, alpha or
    floor <= 0, and fewer than 2 classes.
    """

    lam: Tensor

    def __init__(self, samples: int, *, initial: float = 1.0, alpha: float = 1.0, floor: float = 1e-3) -> None:
        super().__init__()
        check_above(0, samples=samples, initial=initial, alpha=alpha, floor=floor)
        self.initial, self.alpha, self.floor = initial, alpha, floor
        self.register_buffer("lam", torch.full((samples,), float(initial)))

    def forward(self, index: Tensor) -> Tensor:
        """lam of the samples `index` (int64, any shape)."""
        return self.lam[index]

    @torch.no_grad()
    def update(self, index: Tensor, entropy: Tensor, *, classes: int) -> None:
        """Set lam of the samples `index` from the entropies of their predictions at their old lam (same shape)."""
        if index.shape != entropy.shape:
            raise ValueError(f"one entropy a sample: index {tuple(index.shape)}, entropy {tuple(entropy.shape)}")
        check_above(1, classes=classes)
        spread = math.log(classes)
        divergence = (spread - entropy.to(self.lam)).clamp(min=0)
        lam = self.initial * (1 - divergence / (self.alpha * spread))
        self.lam[index] = lam.clamp(min=self.floor * self.initial)


@catalogue.entry(
    formula="z_j V / sum_i |z_i|", gradient="beta (g_j - sign(z_j) <g, z> / sum_i |z_i|), beta = V / sum_i |z_i|", source=PAPER
)  # fmt: skip
def l1_normalize(logits: Tensor) -> Tensor:
    """Scores [..., V] divided by their mean absolute value, as ALDR-KL takes them; a row of zeros stays zeros."""
    size = logits.abs().mean(-1, keepdim=True)
    return logits / torch.where(size == 0, 1.0, size)


@catalogue.entry(
    formula="softplus(z_j) V / sum_i softplus(z_i)", gradient="of the composition, by PyTorch", source=PAPER
)
def softplus_normalize(logits: Tensor) -> Tensor:
    """softplus of the scores [..., V], divided by its mean, as LDR-KL takes them; through logs, so that very low rows count."""
    log_softplus = torch.where(logits < -30, logits, torch.log(-F.logsigmoid(-logits.clamp(min=-30))))
    return torch.exp(log_softplus - log_softplus.logsumexp(-1, keepdim=True)) * logits.shape[-1]
