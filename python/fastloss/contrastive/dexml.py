"""Losses with many labels and few positives a row: the decoupled softmax and the soft top-k loss of DEXML."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..autograd import can_look
from ..contract import PairFunction, PairMapStat
from ..losses import catalogue
from ..pairs import autograd, pair_stats
from ..pairs.arguments import Temperature, make_pairing, vector
from .dots import edge_similarity, finite_softplus, scale_of
from .loss_module import LossModule
from .reduction import check_reduction, reduce
from .sparse_positives import check_edges, edge_mask, row_counts, sample_edges


def _mean_over_positives(
    values: Tensor, rows: Tensor, m: int, weight: Tensor | None, chosen: Tensor | None, reduction: str
) -> Tensor:
    """Each row's mean over its (chosen) edges, weighted, reduced over the rows; rows without positives are not valid."""
    if weight is not None:
        values = values * weight.to(values.dtype)
    if chosen is not None:
        values = values.masked_fill(~chosen, 0.0)
    count = row_counts(rows, chosen, m, values.dtype)
    total = values.new_zeros(m).index_add(0, rows, values)
    return reduce(total / count.clamp(min=1), reduction, count > 0)


@catalogue.entry(
    formula="mean over rows and positives p of log(1 + e^(L_i - z_ip)), L_i = lse over the negatives of row i",
    gradient="-(1 - r_p) / |P| on positives, softmax of the negatives times mean (1 - r_p), r_p = sigmoid(z_ip - L_i)",
    source="Dual-Encoders for Extreme Multi-Label Classification",
    published="tau 0.05 (s 20); loss_sample draws one positive a row and leaves the others out",
)
def decoupled_softmax_loss(
    q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, temperature: Temperature = 0.05, *,
    weight: Tensor | None = None, loss_sample: bool = False, generator: torch.Generator | None = None,
    normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Decoupled softmax: each positive against all negatives of its row, but not against the row's other positives.

        L_i = mean over positives p of w_ip (log(e^(z_ip) + sum over negatives n of e^(z_in)) - z_ip),   z = s / tau

    Args:
        q: [M, D], queries; k: [N, D], labels.
        rows, columns: [E], the positives, an edge each (`rows_of` makes rows of a CSR pointer), each given once.
        temperature: tau > 0. weight: [E] >= 0, relevance of the positives.
        loss_sample: one positive a row is drawn (in proportion to `weight`), the others are left out altogether.
        normalize: similarities are cosines (the published encoder normalises its output).
        reduction: rows without positives count 0 ("mean") or not at all ("mean_valid"); "sum", "none" ([M]).

    Raises ValueError, TypeError, and on a CPU IndexError for edges out of range. The positives cost a bit a pair.
    Source: Dual-Encoders for Extreme Multi-Label Classification.
    """
    check_reduction(reduction)
    check_edges(rows, columns, weight)
    scale = scale_of(temperature)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"temperature must be a number or one element, got {list(scale.shape)}")
    similarity = edge_similarity(q, k, rows, columns, normalize)
    m = q.shape[0]
    stats = pair_stats(
        q, k, scale=scale, positive=edge_mask(rows, columns, m, k.shape[0]), normalize=normalize, columns=False
    )
    values = finite_softplus(stats.neg_lse[rows] - scale * similarity)
    chosen = sample_edges(rows, m, weight, generator) if loss_sample else None
    return _mean_over_positives(values, rows, m, weight, chosen, reduction)


def _check_top(top: float | Tensor, m: int, n: int) -> None:
    """Raise for what is not a number of labels, or one a row; their range is seen on a CPU."""
    if isinstance(top, bool) or not isinstance(top, (int, float, Tensor)):
        raise TypeError(f"top must be a number or a tensor, got {top!r}")
    least = most = top
    if isinstance(top, Tensor):
        if top.is_complex() or top.dtype == torch.bool:
            raise TypeError(f"top must be a number or a tensor of numbers, got {top.dtype}")
        if top.numel() != 1 and top.shape != (m,):
            raise ValueError(f"top must be a number, or a tensor [] or [{m}]; got {list(top.shape)}")
        if not can_look(top) or not top.numel():
            return
        least, most = (x.item() for x in top.detach().aminmax())
    if not (least > 0 and most < n):
        raise ValueError(
            f"top must be above 0 and below {n}, the number of labels, got {least if not least > 0 else most}"
        )


class _Refused(torch.autograd.Function):
    """A gradient that cannot be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "soft_topk_loss can be differentiated once: its threshold has no second derivative, so the gradient that was "
            "computed with create_graph=True cannot be differentiated again"
        )

    jvp = backward


class _Once(torch.autograd.Function):
    """The threshold itself, whose gradient `_Refused` hands on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(threshold: Tensor) -> Tensor:
        return threshold.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return cast(Tensor, _Refused.apply(grad))

    jvp = backward


def soft_topk_threshold(
    q: Tensor, k: Tensor, top: float | Tensor, scale: Temperature, normalize: bool, iterations: int = 24
) -> Tensor:
    """t [M] with sum_j sigmoid(z_ij + t_i) = top, differentiable once.

    Bisection over sums of sigmoids, no gradient, nothing kept; two Newton steps to full precision, the second of which is made of
    differentiable sums: its derivative is that of the implicit function, dt / dz_j = -sigmoid'_j / sum sigmoid'.
    """
    m, n = q.shape[0], k.shape[0]
    dtype = torch.promote_types(q.dtype, torch.float32)
    target = vector("top", top, m, q, dtype)

    def sums(threshold: Tensor) -> tuple[Tensor, Tensor]:
        p = make_pairing(q, k, scale, None, None, None, None, None, None, None, normalize).pairing
        table = autograd.pair_map(p, -threshold, None, int(PairFunction.SIGMOID))
        return table[PairMapStat.NEG], table[PairMapStat.NEG_SLOPE].detach()

    with torch.no_grad():
        margin = 10 + torch.log(torch.tensor(float(n), dtype=dtype, device=q.device))
        low = -pair_stats(q, k, scale=scale, positive=None, normalize=normalize, columns=False).neg_max - margin
        high = pair_stats(-q, k, scale=scale, positive=None, normalize=normalize, columns=False).neg_max + margin
        for _ in range(iterations):
            middle = (low + high) / 2
            below = sums(middle)[0] < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        found = (low + high) / 2
        total, slope = sums(found)
        step = (target - total) / slope.clamp_min(torch.finfo(slope.dtype).tiny)
        found = torch.clamp(found + step, low, high)
    total, slope = sums(found)
    safe = slope.clamp_min(torch.finfo(slope.dtype).tiny)
    flat = slope <= torch.finfo(slope.dtype).tiny  # every sigmoid is 0 or 1: the threshold does not move
    return cast(Tensor, _Once.apply(found + torch.where(flat, 0.0, (target - total) / safe)))


@catalogue.entry(
    formula="mean over rows and positives p of -log sigmoid(alpha (s_ip + t_i)), sum_j sigmoid(alpha (s_ij + t_i)) = K",
    gradient="through t by the implicit function theorem: one sweep, never a graph of the bisection",
    source="Dual-Encoders for Extreme Multi-Label Classification",
    published="K 5, alpha 2, s = cosine / 0.05",
)
def soft_topk_loss(
    q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, temperature: Temperature = 0.05, *, top: float | Tensor = 5,
    alpha: float = 2.0, weight: Tensor | None = None, normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Soft top-k: every positive shall be among the K best labels of its row.

        L_i = -mean over positives p of w_ip log sigmoid(alpha (x_ip + t_i)),   x = s / tau,
        t_i such that sum over all labels j of sigmoid(alpha (x_ij + t_i)) = K

    Args:
        q: [M, D]; k: [N, D]; rows, columns: [E], the positives, an edge each.
        temperature: tau > 0. top: 0 < K < N, a number or [M]. alpha: > 0.
        weight, normalize, reduction: as `decoupled_softmax_loss`.

    Costs 29 sweeps over the pairs and one in the backward. Raises as `decoupled_softmax_loss`, and RuntimeError where its
    gradient is differentiated again (the threshold's derivative is that of one Newton step, right to the first order alone).
    Source: Dual-Encoders for Extreme Multi-Label Classification.
    """
    check_reduction(reduction)
    check_edges(rows, columns, weight)
    scale = scale_of(temperature)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"temperature must be a number or one element, got {list(scale.shape)}")
    _check_top(top, q.shape[0], k.shape[0])
    scale = scale / scale_of(alpha, "alpha")
    z = scale * edge_similarity(q, k, rows, columns, normalize)
    threshold = soft_topk_threshold(q, k, top, scale, normalize)
    values = finite_softplus(-(z + threshold[rows]))
    return _mean_over_positives(values, rows, q.shape[0], weight, None, reduction)


class DecoupledSoftmaxLoss(LossModule):
    """`decoupled_softmax_loss` as a module: called with q, k, rows, columns."""

    def __init__(self, temperature: float = 0.05, *, loss_sample: bool = False, normalize: bool = False) -> None:
        scale_of(temperature)
        super().__init__(decoupled_softmax_loss, temperature=temperature, loss_sample=loss_sample, normalize=normalize)


class SoftTopKLoss(LossModule):
    """`soft_topk_loss` as a module: called with q, k, rows, columns."""

    def __init__(
        self, temperature: float = 0.05, *, top: float = 5, alpha: float = 2.0, normalize: bool = False
    ) -> None:
        scale_of(temperature)
        super().__init__(soft_topk_loss, temperature=temperature, top=top, alpha=alpha, normalize=normalize)
