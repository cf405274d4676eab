"""In-batch losses that change how much hard negatives weigh: HCL, dual temperature, the hardest quantile, N-pairs."""

from __future__ import annotations

import math

import numpy
import torch
from torch import Tensor

from ..losses import catalogue
from ..pairs import Diagonal, pair_nll, pair_stats, row_topk
from ..pairs.arguments import Temperature, number
from ..pairs.scores import product
from ..pairs.statistics import INF
from .arguments import unit as wide_unit
from .dots import check_pair, finite_softplus, scale_of
from .loss_module import LossModule
from .ntxent import view_stats
from .reduction import check_reduction, reduce


def _debiased(lse: Tensor, positive: Tensor, count: int, tau_plus: float, floor: Tensor) -> Tensor:
    """log max((e^lse - tau_plus count e^positive) / (1 - tau_plus), e^floor), with no gradient where the floor holds."""
    if not tau_plus:
        return lse
    share = positive + math.log(tau_plus * count)
    shift = torch.maximum(lse, share).detach()
    rest = ((lse - shift).exp() - (share - shift).exp()) / (1 - tau_plus)
    above = rest > (floor - shift).exp()
    return torch.where(above, shift + torch.where(above, rest, 1.0).log(), floor)


@catalogue.entry(
    formula="-log e^p / (e^p + N_g), N_g = (N sum e^((1 + beta) z) / sum e^(beta z) - tau+ N e^p) / (1 - tau+), z = s / tau",
    gradient="through both sums over negatives, at scales 1 + beta and beta of one sweep",
    source="Contrastive Learning with Hard Negative Samples",
    published="beta 1, tau+ 0.1, tau 0.5; N_g at least N e^(-1 / tau)",
)
def hcl_loss(
    view1: Tensor, view2: Tensor, temperature: Temperature = 0.5, *, beta: float = 1.0, tau_plus: float = 0.1,
    normalize: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Contrastive learning with hard negatives: negatives weigh e^(beta z), and false ones among them are corrected for.

        L_i = log(e^p + N_g) - p,   p = s_ip / tau,   z = s_in / tau over the N = 2B - 2 negatives
        N_g = max((N sum e^((1 + beta) z) / sum e^(beta z) - tau_plus N e^p) / (1 - tau_plus), N e^(-1 / tau))

    beta = 0 is the debiased loss, with tau_plus = 0 NT-Xent.

    Args:
        view1, view2: [B, D], the two views; B >= 2.
        temperature: tau > 0. beta: concentration >= 0. tau_plus: the prior of a false negative, in [0, 1).
        normalize: similarities are cosines. reduction: "mean", "sum" or "none" ([2B]).

    Raises ValueError and TypeError as `pair_stats`. Source: Contrastive Learning with Hard Negative Samples.
    """
    check_reduction(reduction)
    check_pair(view1, view2, "the two views")
    scale = scale_of(temperature)
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be finite and >= 0, got {beta}")
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus must be in [0, 1), got {tau_plus}")
    b = view1.shape[0]
    if b < 2:
        raise ValueError(f"hcl_loss needs two samples at least, got {b}")
    count = 2 * b - 2
    if beta:
        both = torch.cat((view1, view2))
        stats = pair_stats(
            both, scale=beta * scale, second_scale=(1 + beta) / beta, positive=Diagonal(b, -b), normalize=normalize,
            columns=False,
        )  # fmt: skip
        negatives, positives = math.log(count) + stats.second_neg_lse - stats.neg_lse, stats.pos_sum / beta
    else:
        stats = view_stats(view1, view2, scale, normalize)
        negatives, positives = stats.neg_lse, stats.pos_sum
    floor = math.log(count) - number(scale, negatives.dtype, negatives.device)
    return reduce(finite_softplus(_debiased(negatives, positives, count, tau_plus, floor) - positives), reduction)


@catalogue.entry(
    formula="mean of sg((1 - p_inter) / (1 - p_intra)) (-log p_intra), p at tau and p_inter at dt_m tau",
    gradient="that of InfoNCE at tau, rows weighted by the ratio",
    source="Dual Temperature Helps Contrastive Learning Without Many Negative Samples: Towards Understanding and "
    "Simplifying MoCo",
    published="tau 0.1, dt_m 10; no gradient through the weight",
)
def dual_temperature_loss(
    q: Tensor, k: Tensor, temperature: float = 0.1, *, dt_m: float = 10.0, normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """InfoNCE at one temperature within a row, weighted across rows as at another.

        L_i = w_i (lse_j(s_ij / tau) - s_ii / tau),   w_i = (1 - p_ii at dt_m tau) / (1 - p_ii at tau), without gradient

    Args:
        q, k: [B, D]; k_i is the positive of q_i, the other k its negatives. Call it once for each direction.
        temperature: tau > 0 (intra-anchor). dt_m: the inter-anchor temperature is dt_m tau.
        normalize: similarities are cosines. reduction: "mean", "sum" or "none" ([B]).

    Raises ValueError and TypeError as `pair_stats`. Source: Dual Temperature Helps Contrastive Learning Without Many Negative
    Samples: Towards Understanding and Simplifying MoCo.
    """
    check_reduction(reduction)
    check_pair(q, k)
    scale = scale_of(temperature)
    inter = scale_of(dt_m, "dt_m")
    stats = pair_stats(q, k, scale=scale, second_scale=float(inter), normalize=normalize, columns=False)
    x = stats.neg_lse - stats.pos_sum  # 1 - p = sigmoid(x), -log p = softplus(x)
    x_inter = (stats.second_neg_lse - inter * stats.pos_sum).detach()
    some = stats.neg_count > 0
    x = torch.where(some, x, 0.0)
    fixed = x.detach()
    # softplus(x) / sigmoid(x) is 1 to all digits far below 0, where both may underflow; the slope of the product is
    # sigmoid(x_inter) everywhere.
    ratio = torch.where(fixed < -40, 1.0, finite_softplus(fixed) / torch.sigmoid(fixed.clamp(min=-40)))
    slope = torch.sigmoid(x_inter)
    return reduce(torch.where(some, slope * (ratio + (x - fixed)), 0.0), reduction)


#: Up to so many `row_topk` lists them; more are selected from a block of rows at a time.
TOPK_LIMIT = 16

#: Similarities that are held at a time.
_HELD = 1 << 20


def _selected(z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The numbers `count` and `count + 1` of each row of z in falling order; count < columns."""
    if z.device.type == "cpu":  # several times as fast as topk, which sorts what it finds
        parts = torch.from_numpy(numpy.partition(z.numpy(), z.shape[1] - count - 1, axis=1))
        return parts[:, -count:].amin(1), parts[:, -count - 1]
    best = z.topk(count + 1, dim=1).values
    return best[:, count - 1], best[:, count]


def _hardest(q: Tensor, k: Tensor, count: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The largest similarity of each row to a negative, and those numbered `count` and `count + 1`."""
    if count <= TOPK_LIMIT:
        best = row_topk(q, k, count + 1, normalize=normalize).values
        return best[:, 0], best[:, count - 1], best[:, count]
    queries, keys = wide_unit(q, normalize), wide_unit(k, normalize)
    found = []
    for start, part in zip(range(0, len(q), step := max(1, _HELD // len(k))), queries.split(step), strict=True):
        z = product(part, keys.t())
        z.diagonal(start).fill_(-INF)
        found.append(torch.stack((z.amax(1), *_selected(z, count))))
    largest, edge, below = torch.cat(found, 1)
    return largest, edge, below


@torch.no_grad()
def negative_threshold(q: Tensor, k: Tensor, count: int, normalize: bool) -> Tensor:
    """[B]: a similarity that exactly `count` negatives of a row exceed (more only among equal ones); count < B - 1."""
    largest, edge, below = _hardest(q, k, count, normalize)
    threshold = torch.where(below == -INF, edge, (edge + below) / 2)
    # The window is compared with numbers that were rounded otherwise: equal similarities shall all be kept.
    return threshold - 8 * torch.finfo(threshold.dtype).eps * torch.maximum(largest.abs(), threshold.abs())


@catalogue.entry(
    formula="-log e^(s_ii / tau) / (e^(s_ii / tau) + sum over s_ij in the upper quantile of row i of e^(s_ij / tau))",
    gradient="that of InfoNCE among the kept negatives",
    source="Understanding the Behaviour of Contrastive Loss",
    published="the quantile is a hyper-parameter",
)
def hard_quantile_loss(
    q: Tensor, k: Tensor, temperature: Temperature = 0.07, *, fraction: float = 0.1, normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """InfoNCE among the hardest negatives alone: those in the upper `fraction` of the similarities of each row.

    Args:
        q, k: [B, D]; k_i is the positive of q_i.
        temperature: tau > 0. fraction: in (0, 1], at least one negative is kept.
        normalize: similarities are cosines. reduction: "mean", "sum" or "none" ([B]).

    The threshold of a row has no gradient. It costs one more sweep of the matrix, of which for
    more than 16 negatives a row a block of 4 MiB is held.
    Raises ValueError and TypeError as `pair_stats`. Source: Understanding the Behaviour of Contrastive Loss.
    """
    check_reduction(reduction)
    check_pair(q, k)
    scale = scale_of(temperature)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    negatives = q.shape[0] - 1
    count = max(1, math.ceil(fraction * negatives - 1e-9))
    window = None
    if count < negatives:
        window = (negative_threshold(q.detach(), k.detach(), count, normalize), None)
    stats = pair_stats(q, k, scale=scale, window=window, normalize=normalize, columns=False)
    return reduce(stats.nll, reduction)


@catalogue.entry(
    formula="mean of log(1 + sum_(j != i) e^(<f_i, g_j> - <f_i, g_i>)) + weight / 4 (mean |f|^2 + mean |g|^2)",
    gradient="softmax - [i = j], and weight / 2B times each vector",
    source="Improved Deep Metric Learning with Multi-class N-pair Loss Objective",
    published="dot products without norms; weight 0.002 as in TensorFlow's npairs_loss",
)
def n_pairs_loss(anchors: Tensor, positives: Tensor, *, norm_weight: float = 0.002, reduction: str = "mean") -> Tensor:
    """N-pair loss: one positive and N - 1 negatives a row, dot products, and a penalty on the norms.

        L_i = log(1 + sum_(j != i) e^(<f_i, g_j> - <f_i, g_i>)) + norm_weight / 4 (|f_i|^2 + |g_i|^2)

    Args:
        anchors, positives: [B, D], one pair of each class.
        norm_weight: >= 0. reduction: "mean", "sum" or "none" ([B]).

    Raises ValueError and TypeError as `pair_stats`.
    Source: Improved Deep Metric Learning with Multi-class N-pair Loss Objective.
    """
    check_reduction(reduction)
    check_pair(anchors, positives, "anchors and positives")
    if not (norm_weight >= 0 and math.isfinite(norm_weight)):
        raise ValueError(f"norm_weight must be finite and >= 0, got {norm_weight}")
    values, _ = pair_nll(anchors, positives)
    if norm_weight:
        norms = sum(x.to(values.dtype).square().sum(1) for x in (anchors, positives))
        values = values + norm_weight / 4 * norms
    return reduce(values, reduction)


class HCLLoss(LossModule):
    """`hcl_loss` as a module."""

    def __init__(
        self, temperature: float = 0.5, *, beta: float = 1.0, tau_plus: float = 0.1, normalize: bool = True,
        reduction: str = "mean",
    ) -> None:  # fmt: skip
        scale_of(temperature)
        check_reduction(reduction)
        super().__init__(
            hcl_loss, temperature=temperature, beta=beta, tau_plus=tau_plus, normalize=normalize, reduction=reduction
        )


class DualTemperatureLoss(LossModule):
    """`dual_temperature_loss` as a module."""

    def __init__(
        self, temperature: float = 0.1, *, dt_m: float = 10.0, normalize: bool = True, reduction: str = "mean"
    ) -> None:
        scale_of(temperature)
        check_reduction(reduction)
        super().__init__(
            dual_temperature_loss, temperature=temperature, dt_m=dt_m, normalize=normalize, reduction=reduction
        )
