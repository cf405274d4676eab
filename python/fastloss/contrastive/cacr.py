"""CACR: doubly contrastive attraction and repulsion, with transport probabilities in place of a softmax cross entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses import catalogue
from ..pairs import pair_stats
from .dots import own_similarity, scale_of, unit
from .loss_module import LossModule


def _attraction(views: list[Tensor], tau: float, weight: float, detach: bool) -> Tensor:
    """Mean over queries and views of sum_p softmax_p(tau d_p) weight d_p, d_p = |x - x_p|^2."""
    stacked = torch.stack(views).to(torch.promote_types(views[0].dtype, torch.float32))  # [K, B, D]
    losses = []
    for i in range(len(views)):
        others = torch.cat((stacked[:i], stacked[i + 1 :]))
        distance = (stacked[i] - others).square().sum(2)
        share = torch.softmax(tau * distance, 0)
        losses.append(((share.detach() if detach else share) * distance).sum(0).mean())
    return weight * torch.stack(losses).mean()


def _augmented(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q', k', |q|^2) with <q'_i, k'_j> = <q_i, k_j> - |k_j|^2 / 2, so that -|q - k|^2 = 2 <q', k'> - |q|^2."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    half = k.square().sum(1, keepdim=True) / 2
    return torch.cat((q, torch.ones_like(half)), 1), torch.cat((k, -half), 1), q.square().sum(1)


def _repulsion(
    q: Tensor, k: Tensor, tau: float, weight: float, normalize: bool, rbf: float | None, detach: bool
) -> tuple[Tensor, Tensor]:
    """([B] sum_j softmax_j(-tau d_ij) (-weight d_ij) or the log of the RBF cost, [B] d_ii), j over the other samples."""
    own = torch.full((), 2.0, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if normalize:  # d = 2 - 2 s
        distance = 2 - 2 * own_similarity(q, k, True)
    else:
        q, k, own = _augmented(q, k)
        distance = own - 2 * own_similarity(q, k, False)
    second = None if rbf is None else (tau + rbf) / tau
    stats = pair_stats(q, k, scale=2 * tau, mean=rbf is None, second_scale=second, normalize=normalize, columns=False)
    if rbf is not None:  # log of E[e^(-rbf d)] under softmax(-tau d): two log-sum-exps of one sweep
        return stats.second_neg_lse - stats.neg_lse - rbf * own, distance
    mean = stats.neg_mean
    if detach:  # d lse = sum of softmax dz: the gradient with the weights fixed
        lse = stats.neg_lse
        mean = mean.detach() + (lse - lse.detach())
    return weight * (mean / tau - own), distance


@catalogue.entry(
    formula="mean of sum_p softmax_p(t+ d_p) alpha d_p, plus mean of sum_(j != i) softmax_j(-t- d_ij) (-beta d_ij)",
    gradient="through distances and weights: p (1 + z - E z) for the repulsion, one sweep (neg_mean)",
    source="Contrastive Attraction and Contrastive Repulsion for Representation Learning",
    published="t 1, alpha = beta = 1, unit vectors; debiased at tau+ 0.1, where the code has the opposite sign of d_ii",
)
def cacr_loss(
    views: Sequence[Tensor], *, tau_positive: float = 1.0, tau_negative: float = 1.0, alpha: float = 1.0,
    beta: float = 1.0, tau_plus: float = 0.0, rbf: float | None = None, detach_weights: bool = False,
    normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Contrastive attraction to the farthest positives, contrastive repulsion from the nearest negatives.

        attraction: mean over views and rows of sum over other views p of softmax_p(t+ d_p) alpha d_p
        repulsion:  mean over pairs of views of mean_i R_i,  R_i = sum_(j != i) softmax_j(-t- d_ij) (-beta d_ij)
        d = |x - y|^2

    Args:
        views: K >= 2 tensors [B, D], B >= 2; row i of each is a view of sample i.
        tau_positive, tau_negative: t+ and t-, > 0. alpha, beta: weights.
        tau_plus: in [0, 1): R_i <- (R_i + tau_plus beta d_ii) / (1 - tau_plus), the debiased repulsion (0.1 published).
        rbf: c > 0: the repulsion costs beta log mean_i sum_j softmax_j(-t- d_ij) e^(-c d_ij) instead (2 published).
        detach_weights: no gradient through the probabilities (the published version with a queue).
        normalize: divide the views by their norms (the published loss is of unit vectors).

    Raises ValueError and TypeError as `pair_stats`.
    Source: Contrastive Attraction and Contrastive Repulsion for Representation Learning.
    """
    views = list(views)
    if len(views) < 2 or any(v.dim() != 2 or v.shape != views[0].shape for v in views) or len(views[0]) < 2:
        raise ValueError(f"views must be two or more of one shape [B >= 2, D], got {[list(v.shape) for v in views]}")
    for name, value in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
        scale_of(value, name)
    if rbf is not None:
        scale_of(rbf, "rbf")
        if tau_plus or detach_weights:
            raise ValueError("rbf takes neither tau_plus nor detach_weights")
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus must be in [0, 1), got {tau_plus}")
    attracted = _attraction([unit(v) for v in views] if normalize else views, tau_positive, alpha, detach_weights)
    parts = []
    for i, q in enumerate(views):
        for k in views[i + 1 :]:
            repelled, distance = _repulsion(q, k, tau_negative, beta, normalize, rbf, detach_weights)
            if rbf is not None:
                parts.append(beta * (torch.logsumexp(repelled, 0) - math.log(repelled.shape[0])))
                continue
            if tau_plus:
                repelled = (repelled + tau_plus * beta * distance) / (1 - tau_plus)
            parts.append(repelled.mean())
    return attracted + torch.stack(parts).mean()


class CACRLoss(LossModule):
    """`cacr_loss` as a module."""

    def __init__(
        self, *, tau_positive: float = 1.0, tau_negative: float = 1.0, alpha: float = 1.0, beta: float = 1.0,
        tau_plus: float = 0.0, rbf: float | None = None, detach_weights: bool = False, normalize: bool = True,
    ) -> None:  # fmt: skip
        for name, value in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
            scale_of(value, name)
        super().__init__(
            cacr_loss, tau_positive=tau_positive, tau_negative=tau_negative, alpha=alpha, beta=beta,
            tau_plus=tau_plus, rbf=rbf, detach_weights=detach_weights, normalize=normalize,
        )  # fmt: skip
