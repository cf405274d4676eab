"""Losses of two views of a batch, each sample's other view its positive: NT-Xent (SimCLR), DCL and DCLW, MACL."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..losses import catalogue
from ..pairs import Diagonal, PairStats, pair_nll, pair_stats
from ..pairs.arguments import Temperature
from ..pairs.statistics import logaddexp
from .dots import check_pair, finite_softplus, own_similarity, scale_of
from .loss_module import LossModule
from .reduction import check_reduction, reduce


def two_views(view1: Tensor, view2: Tensor) -> Tensor:
    """[2B, D] of two views [B, D], B > 0."""
    check_pair(view1, view2, "the two views")
    if not view1.shape[0]:
        raise ValueError(f"the two views have no rows, got {list(view1.shape)}")
    return torch.cat((view1, view2))


def view_stats(view1: Tensor, view2: Tensor, scale: Temperature, normalize: bool, mean: bool = False) -> PairStats:
    """Statistics of both views with both: positives are a sample's two views, negatives the 2B - 2 others."""
    both, b = two_views(view1, view2), view1.shape[0]
    return pair_stats(both, scale=scale, positive=Diagonal(b, -b), normalize=normalize, columns=False, mean=mean)


@catalogue.entry(
    formula="mean over both views of lse_(j != i)(s_ij / tau) - s_ip / tau, p the other view of i",
    gradient="(softmax - [j = p]) / tau, of a symmetric matrix in three products",
    source="A Simple Framework for Contrastive Learning of Visual Representations",
    published="tau 0.5, cosines",
)
def ntxent_loss(
    view1: Tensor, view2: Tensor, temperature: Temperature = 0.5, *, bank: Tensor | None = None,
    bank_valid: Tensor | None = None, normalize: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """NT-Xent of SimCLR: each of the 2B vectors against its other view and the 2B - 2 vectors of other samples.

        L_i = log(e^(s_ip / tau) + sum over negatives n of e^(s_in / tau)) - s_ip / tau

    Args:
        view1, view2: [B, D]; row i of both are the two views of sample i.
        temperature: tau > 0, a number or a trained tensor.
        bank: [N, D] further negatives for every row (a memory bank). No gradient flows into it.
        bank_valid: bool [N], what of the bank is filled.
        normalize: similarities are cosines (the published loss).
        reduction: "mean", "sum" or "none" ([2B], the first view first).

    Raises ValueError and TypeError as `pair_stats`. Memory: O(B D).
    Source: A Simple Framework for Contrastive Learning of Visual Representations.
    """
    check_reduction(reduction)
    scale = scale_of(temperature)
    both = two_views(view1, view2)
    if bank is None:
        b = view1.shape[0]
        return reduce(pair_nll(both, scale=scale, positive=Diagonal(b, -b), normalize=normalize)[0], reduction)
    stats = view_stats(view1, view2, scale, normalize)
    more = pair_stats(
        both, bank.detach(), scale=scale, positive=None, column_valid=bank_valid, normalize=normalize, columns=False
    )
    return reduce(finite_softplus(logaddexp(stats.neg_lse, more.neg_lse) - stats.pos_sum), reduction)


@catalogue.entry(
    formula="mean of lse over negatives of s_ij / tau - w_i s_ip / tau; DCL: w = 1; DCLW: w = 2 - B softmax(s_ip / sigma)_i",
    gradient="the softmax of the negatives alone, -w on the positive",
    source="Decoupled Contrastive Learning",
    published="tau 0.1, sigma 0.5; negatives of both views; no gradient through w",
)
def dcl_loss(
    view1: Tensor, view2: Tensor, temperature: Temperature = 0.1, *, weighted: bool = False, sigma: float = 0.5,
    within: bool = True, normalize: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Decoupled contrastive learning: InfoNCE whose denominator leaves the positive out.

        L_i = lse over negatives n (s_in / tau) - w_i s_ip / tau

    Args:
        view1, view2: [B, D], B >= 2 for a finite loss: a row without negatives counts its positive alone.
        temperature: tau > 0.
        weighted: DCLW: w_i = 2 - B softmax over the batch of (s_ip / sigma), a von Mises-Fisher weight without gradient
            that lifts samples whose views are far apart.
        within: negatives are of both views (2B - 2, as published); False: of the other view alone (B - 1).
        normalize: similarities are cosines.
        reduction: "mean", "sum" or "none" ([2B], the first view first).

    Raises ValueError and TypeError as `pair_stats`. Source: Decoupled Contrastive Learning.
    """
    check_reduction(reduction)
    scale = scale_of(temperature)
    positive_temperature = scale_of(sigma, "sigma")
    if within:
        stats = view_stats(view1, view2, scale, normalize)
        negatives, positives = stats.neg_lse, stats.pos_sum
    else:
        check_pair(view1, view2, "the two views")
        stats = pair_stats(view1, view2, scale=scale, normalize=normalize)
        negatives = torch.cat((stats.neg_lse, stats.columns.neg_lse))
        positives = torch.cat((stats.pos_sum, stats.columns.pos_sum))
    if weighted:
        own = own_similarity(view1.detach(), view2.detach(), normalize)
        weight = 2 - view1.shape[0] * torch.softmax(own * positive_temperature, 0)
        positives = weight.repeat(2) * positives
    return reduce(torch.where(negatives == -math.inf, 0.0, negatives) - positives, reduction)


@catalogue.entry(
    formula="mean of V_i (lse_(j != i)(s_ij / t) - s_ip / t), t = tau (1 + alpha (mean s_ip - A0)), V = 1 / (1 - p_i)",
    gradient="that of NT-Xent at t, times V; none through V and t",
    source="Model-Aware Contrastive Learning: Towards Escaping the Dilemmas",
    published="tau 0.1, alpha 0.5, A0 0",
)
def macl_loss(
    view1: Tensor, view2: Tensor, temperature: float = 0.1, *, alpha: float = 0.5, target_alignment: float = 0.0,
    normalize: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Model-aware contrastive learning: NT-Xent whose temperature follows how well the positives are aligned.

        A = mean over positives of s_ip,   t = tau (1 + alpha (A - A0)),   L_i = (lse_(j != i)(s_ij / t) - s_ip / t) / (1 - p_i)

    p_i is the softmax of the positive; neither A nor 1 / (1 - p_i) has a gradient.

    Args:
        view1, view2: [B, D], the two views.
        temperature, alpha in [0, 1], target_alignment (A0 in [0, 1]): as above.
        normalize, reduction: as `ntxent_loss`.

    Raises ValueError and TypeError as `pair_stats`.
    Source: Model-Aware Contrastive Learning: Towards Escaping the Dilemmas.
    """
    check_reduction(reduction)
    check_pair(view1, view2, "the two views")
    scale_of(temperature)
    for name, value in (("alpha", alpha), ("target_alignment", target_alignment)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    alignment = own_similarity(view1.detach(), view2.detach(), normalize).mean()
    adapted = temperature * (1 + alpha * (alignment - target_alignment))
    stats = view_stats(view1, view2, scale_of(adapted, "the adapted temperature"), normalize)
    rest = torch.sigmoid((stats.neg_lse - stats.pos_sum).detach())  # 1 - p, in which nothing cancels
    return reduce(stats.nll / (rest + 1e-8), reduction)


class NTXentLoss(LossModule):
    """`ntxent_loss` of SimCLR as a module."""

    def __init__(self, temperature: float = 0.5, *, normalize: bool = True, reduction: str = "mean") -> None:
        scale_of(temperature)
        super().__init__(ntxent_loss, temperature=temperature, normalize=normalize, reduction=reduction)


class DCLLoss(LossModule):
    """`dcl_loss` as a module; `weighted=True` for DCLW."""

    def __init__(
        self, temperature: float = 0.1, *, weighted: bool = False, sigma: float = 0.5, within: bool = True,
        normalize: bool = True, reduction: str = "mean",
    ) -> None:  # fmt: skip
        scale_of(temperature)
        super().__init__(
            dcl_loss, temperature=temperature, weighted=weighted, sigma=sigma, within=within, normalize=normalize,
            reduction=reduction,
        )  # fmt: skip


class MACLLoss(LossModule):
    """`macl_loss` as a module."""

    def __init__(self, temperature: float = 0.1, *, alpha: float = 0.5, target_alignment: float = 0.0) -> None:
        scale_of(temperature)
        super().__init__(macl_loss, temperature=temperature, alpha=alpha, target_alignment=target_alignment)
