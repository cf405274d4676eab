"""Losses of all pairs' squared similarities, from D x D Gram matrices: O(B D^2), and no B x B matrix at all.

    |Q K^T|^2 = <Q^T Q, K^T K>
    |X X^T - Y Y^T|^2 = (<U^T U, V^T V> + <M, M^T>) / 2,  |X Y^T - Y X^T|^2 = (<U^T U, V^T V> - <M, M^T>) / 2,
    U = X + Y, V = X - Y, M = U^T V

The second line has no large numbers to cancel where X and Y are near each other, unlike |X^T X|^2 - 2 |X^T Y|^2 + |Y^T Y|^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import catalogue
from .arguments import check_same_shape, check_weight, row_dots, unit, wide
from .loss_module import LossModule


def squared_similarities(q: Tensor, k: Tensor) -> Tensor:
    """sum_ij <q_i, k_j>^2 = <Q^T Q, K^T K>."""
    return ((q.t() @ q) * (k.t() @ k)).sum()


def consistency(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(|X X^T - Y Y^T|^2, |X Y^T - Y X^T|^2): within the modalities, and across them."""
    plus, minus = x + y, x - y
    cross = plus.t() @ minus
    both, twisted = squared_similarities(plus, minus), (cross * cross.t()).sum()
    return (both + twisted) / 2, (both - twisted) / 2


def _off_diagonal(c: Tensor) -> Tensor:
    """The sum of squares off the diagonal, without the diagonal in it."""
    return c.masked_fill(torch.eye(c.shape[0], dtype=torch.bool, device=c.device), 0.0).square().sum()


def _check_batch(x: Tensor) -> None:
    if x.shape[0] < 2:
        raise ValueError(f"the loss needs two samples or more, got {list(x.shape)}")


@catalogue.entry(
    formula="-2 mean_i <q_i, k_i> + mean over i != j of <q_i, k_j>^2",
    gradient="-2 k_i / B + 2 (K^T K q_i - <q_i, k_i> k_i) / (B (B - 1)) to q_i",
    source="Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss",
    published="the B x B matrix; embeddings scaled to norm sqrt(mu), mu = 1 to 10, by the caller",
)
def spectral_contrastive_loss(q: Tensor, k: Tensor, *, normalize: bool = False) -> Tensor:
    """The spectral contrastive loss of two views [B, D].

    Raises ValueError for other shapes or one sample. Memory: O(B D + D^2).
    Source: Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss.
    """
    check_same_shape(q, k)
    _check_batch(q)
    q, k, batch = unit(q, normalize), unit(k, normalize), q.shape[0]
    own = (q * k).sum(1)
    return -2 * own.mean() + (squared_similarities(q, k) - own.square().sum()) / (batch * (batch - 1))


@catalogue.entry(
    formula="l_in |X X^T - Y Y^T|^2 / B + l_cross |X Y^T - Y X^T|^2 / B",
    gradient="of the D x D forms",
    source="CyCLIP: Cyclic Contrastive Language-Image Pretraining",
    published="both weights 0.25, beside the CLIP loss; four B x B matrices",
)
def cyclip_loss(
    q: Tensor, k: Tensor, *, in_modal: float = 0.25, cross_modal: float = 0.25, normalize: bool = True
) -> Tensor:  # fmt: skip
    """CyCLIP's two consistencies, added to `clip_loss`: s_ij within images is that within texts, and s_ij = s_ji across.

    Args: q, k: [B, D]. The weights may be 0. Raises ValueError for other shapes. Memory: O(B D + D^2).
    Source: CyCLIP: Cyclic Contrastive Language-Image Pretraining.
    """
    check_same_shape(q, k)
    check_weight("in_modal", in_modal)
    check_weight("cross_modal", cross_modal)
    within, across = consistency(unit(q, normalize), unit(k, normalize))
    return (in_modal * within + cross_modal * across) / max(q.shape[0], 1)


def _standard(x: Tensor, eps: float) -> Tensor:
    """Each column less its mean, divided by its standard deviation over the batch (biased)."""
    x = wide(x)
    centred = x - x.mean(0)
    return centred * (centred.square().mean(0) + eps).rsqrt()


@catalogue.entry(
    formula="sum_a (1 - C_aa)^2 + lambda sum over a != b of C_ab^2, C = correlations over the batch of the dimensions "
    "of both views",
    gradient="-2 (1 - C_aa) and 2 lambda C_ab to C, through the standardisation",
    source="Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
    published="lambda 0.0051, eps 1e-5",
)
def barlow_twins_loss(
    q: Tensor, k: Tensor, *, off_diagonal: float = 0.0051, eps: float = 1e-5, standardize: bool = True, scale: float = 1.0
) -> Tensor:  # fmt: skip
    """Barlow Twins: the cross-correlation matrix of two views [B, D] is the identity.

    Args: off_diagonal: lambda. standardize: off where a batch norm did it before; then C = Q^T K / B. scale: of the whole.
    BarLIP (Improved baselines for vision-language pre-training) is standardize=False, off_diagonal=5e-3, scale=0.025.

    Raises ValueError for other shapes or one sample. Memory: O(B D + D^2).
    Source: Barlow Twins: Self-Supervised Learning via Redundancy Reduction.
    """
    check_same_shape(q, k)
    check_weight("off_diagonal", off_diagonal)
    _check_batch(q)
    q, k = (_standard(x, eps) if standardize else wide(x) for x in (q, k))
    c = q.t() @ k / q.shape[0]
    return scale * ((c.diagonal() - 1).square().sum() + off_diagonal * _off_diagonal(c))


@catalogue.entry(
    formula="s mean (q - k)^2 + v mean over dimensions and views of max(1 - std, 0) + c sum over views of sum_(a != b) "
    "Cov_ab^2 / D",
    gradient="of the three parts; std = sqrt(variance + 1e-4)",
    source="VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
    published="weights 25, 25, 1; unbiased variance and covariance",
)
def vicreg_loss(
    q: Tensor, k: Tensor, *, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0, eps: float = 1e-4
) -> Tensor:  # fmt: skip
    """VICReg of two views [B, D]: near each other, each dimension with a standard deviation of 1, dimensions uncorrelated.

    Raises ValueError for other shapes or one sample. Memory: O(B D + D^2).
    Source: VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning.
    """
    check_same_shape(q, k)
    _check_batch(q)
    for name, value in (("invariance", invariance), ("variance", variance), ("covariance", covariance)):
        check_weight(name, value)
    loss = invariance * (wide(q) - wide(k)).square().mean()
    for x in (wide(q), wide(k)):
        centred = x - x.mean(0)
        deviation = (centred.square().sum(0) / (x.shape[0] - 1) + eps).sqrt()
        loss = loss + variance * (1 - deviation).relu().mean() / 2
        loss = loss + covariance * _off_diagonal(centred.t() @ centred / (x.shape[0] - 1)) / x.shape[1]
    return loss


@catalogue.entry(
    formula="M1^2 + max(M2 - 1 / D, 0), M1 and M2 the means of s and of s^2 over the pairs i != j",
    gradient="2 M1 and 2 s [M2 > 1 / D] over the number of pairs",
    source="Learning Spread-Out Local Feature Descriptors (global orthogonal regularization)",
    published="weight 1 beside a triplet loss; a random subset of pairs there, all pairs here",
)
def gor_loss(q: Tensor, k: Tensor, *, normalize: bool = True) -> Tensor:
    """Global orthogonal regularization: pairs that do not match have cosines like those of random directions.

    Args: q, k: [B, D], row i of both matching; k = q for one set. Raises ValueError for other shapes or one sample.
    Memory: O(B D + D^2). Source: Learning Spread-Out Local Feature Descriptors.
    """
    check_same_shape(q, k)
    _check_batch(q)
    q, k, batch = unit(q, normalize), unit(k, normalize), q.shape[0]
    own, pairs = row_dots(q, k), batch * (batch - 1)
    first = ((q.sum(0) * k.sum(0)).sum() - own.sum()) / pairs
    second = (squared_similarities(q, k) - own.square().sum()) / pairs
    return first.square() + (second - 1 / q.shape[1]).relu()


class CyCLIPLoss(LossModule):
    """`cyclip_loss` as a module."""

    def __init__(self, in_modal: float = 0.25, cross_modal: float = 0.25, *, normalize: bool = True) -> None:
        super().__init__(cyclip_loss, in_modal=in_modal, cross_modal=cross_modal, normalize=normalize)


class BarlowTwinsLoss(LossModule):
    """`barlow_twins_loss` as a module."""

    def __init__(
        self, off_diagonal: float = 0.0051, *, eps: float = 1e-5, standardize: bool = True, scale: float = 1.0
    ) -> None:  # fmt: skip
        super().__init__(barlow_twins_loss, off_diagonal=off_diagonal, eps=eps, standardize=standardize, scale=scale)


class VICRegLoss(LossModule):
    """`vicreg_loss` as a module."""

    def __init__(
        self, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0, *, eps: float = 1e-4
    ) -> None:  # fmt: skip
        super().__init__(vicreg_loss, invariance=invariance, variance=variance, covariance=covariance, eps=eps)
