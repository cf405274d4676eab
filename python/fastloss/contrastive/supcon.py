"""Supervised contrastive learning: every vector of the same label is a positive."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import catalogue
from ..pairs import SameId, pair_stats
from ..pairs.arguments import Temperature, positive_numbers
from .dots import scale_of
from .loss_module import LossModule
from .reduction import check_reduction, reduce

MODES = ("out", "in", "mil_nce")


@catalogue.entry(
    formula="out: mean over positives p of -log p_ip; in: -log mean over p of p_ip; p_ij = softmax over j != i of s_ij / tau",
    gradient="out: (softmax - 1 / |P|) / tau on positives; in: softmax - softmax among the positives",
    source="Supervised Contrastive Learning",
    published="out, tau 0.07, factor tau / base_tau; rows without positives are dropped (mean_valid); 0 in some codes (mean)",
)
def supcon_loss(
    x: Tensor, labels: Tensor, keys: Tensor | None = None, key_labels: Tensor | None = None,
    temperature: Temperature = 0.07, *, mode: str = "out", base_temperature: float | None = None,
    normalize: bool = True, reduction: str = "mean_valid",
) -> Tensor:  # fmt: skip
    """Supervised contrastive loss: the denominator holds all positives and all negatives.

        out:      L_i = lse_j(z_ij) - mean over positives of z_ip
        in:       L_i = lse_j(z_ij) - lse over positives (z_ip) + log |P_i|
        mil_nce:  in, without log |P_i| (the share of the positives)                z = s / tau

    Args:
        x: [M, D], anchors; several views of a sample are several rows of one label.
        labels: integers [M].
        keys, key_labels: [N, D] and [N] to contrast with; None: x with itself, never a row with itself.
        temperature: tau > 0. base_temperature: multiplies the loss by tau / base_temperature; None: by 1.
        mode: "out" (published as the better), "in" or "mil_nce".
        normalize: similarities are cosines; False where the caller's vectors are as wanted.
        reduction: what rows without positives count: "mean_valid" nothing, "mean" 0; "sum", "none" ([M], 0 there).

    Raises ValueError and TypeError as `pair_stats`. Source: Supervised Contrastive Learning; mil_nce: End-to-End Learning of
    Visual Representations from Uncurated Instructional Videos.
    """
    check_reduction(reduction)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if (keys is None) != (key_labels is None):
        raise ValueError("keys and key_labels come together")
    scale = scale_of(temperature)
    stats = pair_stats(x, keys, scale=scale, positive=SameId(labels, key_labels), normalize=normalize, columns=False)
    some = stats.has_positive
    values = stats.nll
    if mode == "out":  # lse - mean = (lse - pos_lse) + (pos_lse - mean), the first of which does not cancel
        values = values + torch.where(some, stats.pos_lse, 0.0) - stats.pos_mean
    elif mode == "in":
        values = values + stats.pos_count.clamp(min=1).log()
    if base_temperature is not None:
        positive_numbers("base_temperature", base_temperature)
        values = values * (temperature / base_temperature)
    return reduce(values, reduction, some)


class SupConLoss(LossModule):
    """`supcon_loss` as a module."""

    def __init__(
        self, temperature: float = 0.07, *, mode: str = "out", base_temperature: float | None = None,
        normalize: bool = True, reduction: str = "mean_valid",
    ) -> None:  # fmt: skip
        scale_of(temperature)
        super().__init__(
            supcon_loss, temperature=temperature, mode=mode, base_temperature=base_temperature, normalize=normalize,
            reduction=reduction,
        )  # fmt: skip
