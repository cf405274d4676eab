"""Comp-sum losses: functions of the sum over the other classes of e^(z_j - z_y), one family from e^(-d) to 1 - p."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..statistics import RowStats
from . import catalogue
from .margin_form import check_above, counted, expm1

PAPER = "Cross-Entropy Loss Functions: Theoretical Analysis and Applications"
_NO_MAXIMUM = "published code exponentiates z_j - z_y as it is (inf in float32 from 88 on); here the margin form"


def _limit(x: Tensor) -> float:
    """The exponent from which comp-sum losses with tau < 1 go on as straight lines: e to it is still a number."""
    return 700.0 if x.dtype == torch.float64 else 80.0


@catalogue.row(
    formula="((1 / p_y)^(1 - tau) - 1) / (1 - tau); tau = 1: -log p_y",
    gradient="phi'(d) (1[j=y] - pi_j), phi' = -e^((1 - tau) softplus(-d)) sigma(-d)",
    source=PAPER,
    published=_NO_MAXIMUM,
)
def comp_sum(stats: RowStats, *, tau: float = 1.0) -> Tensor:
    """((1 / p_y)^(1 - tau) - 1) / (1 - tau), and -log p_y at tau = 1; one value a row, 0 on ignored rows.

    tau = 0: sum-exponential; 1: logistic (cross entropy); 1 < tau < 2: generalised cross entropy with q = tau - 1;
    2: mean absolute error. With tau < 1 value and gradient grow as e^((1 - tau) |d|): where (1 - tau) (-log p_y) is beyond 80
    (700 in float64) the loss goes on as a straight line, so that both stay finite. Raises ValueError for tau < 0.

    "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", Mao, Mohri and Zhong (2023).
    """
    if not tau >= 0:
        raise ValueError(f"tau must be >= 0, got {tau}")
    if tau == 1:
        return -stats.logp
    exponent = (tau - 1) * stats.logp
    if tau > 1:
        return expm1(exponent) / (1 - tau)
    limit = _limit(exponent)
    beyond = torch.relu(exponent - limit) * math.exp(limit)
    return (expm1(exponent.clamp(max=limit)) + beyond) / (1 - tau)


@catalogue.row(
    formula="-log p_y = softplus(-d)", gradient="phi'(d) (1[j=y] - pi_j), phi' = -sigma(-d)", source=PAPER,
    published="p_y - 1 cancels as p_y -> 1; here the margin form",
)  # fmt: skip
def logistic(stats: RowStats) -> Tensor:
    """-log p_y: the comp-sum loss of tau = 1, cross entropy without its extras."""
    return -stats.logp


@catalogue.row(
    formula="sum_{j != y} e^(z_j - z_y) = e^(-d)",
    gradient="phi'(d) (1[j=y] - pi_j), phi' = -e^(-d), constant from -log p_y = 80 on",
    source=PAPER,
    published=_NO_MAXIMUM,
)
def sum_exponential(stats: RowStats) -> Tensor:
    """e^(-d) = 1 / p_y - 1: the comp-sum loss of tau = 0, with its straight line beyond -log p_y = 80 (700 in float64)."""
    return comp_sum(stats, tau=0.0)


@catalogue.row(
    formula="(1 - p_y^q) / q",
    gradient="phi'(d) (1[j=y] - pi_j), phi' = -p_y^q sigma(-d)",
    source="Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    published="one repository builds an N x N matrix to pick p_y, another exponentiates without a maximum; here the margin form",
)
def generalized_cross_entropy(stats: RowStats, *, q: float = 0.7) -> Tensor:
    """(1 - p_y^q) / q, between cross entropy (q -> 0) and 1 - p_y (q = 1). Raises ValueError for q <= 0.

    Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels" (2018).
    """
    check_above(0, q=q)
    return -expm1(q * stats.logp) / q


@catalogue.row(
    formula="min((1 - p_y^q) / q, (1 - k^q) / q)",
    gradient="that of generalized_cross_entropy where p_y > k, else 0",
    source="Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
)
def truncated_generalized_cross_entropy(stats: RowStats, *, q: float = 0.7, k: float = 0.5) -> Tensor:
    """(1 - max(p_y, k)^q) / q: rows with p_y <= k are constant, taken for mislabelled.

    Raises ValueError for q <= 0 and k outside [0, 1). Zhang and Sabuncu (2018), with their k = 0.5.
    """
    if not 0 <= k < 1:
        raise ValueError(f"k must be in [0, 1), got {k}")
    rows = generalized_cross_entropy(stats, q=q)
    if k == 0:
        return rows
    return torch.where(stats.logp > math.log(k), rows, -math.expm1(q * math.log(k)) / q)


@catalogue.row(
    formula="factor (1 - p_y)",
    gradient="phi'(d) (1[j=y] - pi_j), phi' = -factor sigma(d) sigma(-d)",
    source="Robust Loss Functions under Label Noise for Deep Neural Networks",
    published="one repository sums 1[j=y] - p_j without the absolute value, which is always 0",
)
def mean_absolute_error(stats: RowStats, *, factor: float = 1.0) -> Tensor:
    """factor (1 - p_y); sum_j |1[j=y] - p_j| is this with factor 2.

    Ghosh, Kumar and Sastry, "Robust Loss Functions under Label Noise for Deep Neural Networks" (2017).
    """
    return counted(stats, factor * stats.log1mp.exp())


@catalogue.entry(
    formula="comp_sum(z, y) + nu sqrt(sum_j (a_y - a_j)^2), a = z' - z",
    gradient="of the norm D: (V a_y - sum a) / D on a_y, (a_j - a_y) / D on every a_j; 0 at D = 0",
    source=PAPER,
    statistics=("sum", "sumsq"),
)
def smooth_adversarial_comp_sum(stats: RowStats, difference: RowStats, *, tau: float = 1.0, nu: float = 1.0) -> Tensor:
    """comp_sum of the clean scores z plus nu times the l2 distance of the margins z_y - z_j under an attack z'.

    stats: `row_stats(z, y)`. difference: `row_stats(z' - z, y, stats="sumsq")`, the same target; on a linear head it is
    `linear_row_stats(x' - x, weight, y, stats="sumsq")`, no bias, and nothing of size V is stored. The search for x' is
    the caller's. One value a row, 0 on ignored rows; the norm's gradient at 0 is 0.
    Raises ValueError if the two have different shapes.

    "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", Mao, Mohri and Zhong (2023).
    """
    if stats.shape != difference.shape:
        raise ValueError(f"one row of difference a row: shapes {tuple(stats.shape)} and {tuple(difference.shape)}")
    above_mean = difference.nll_sum / difference.vocab - difference.nll  # a_y - mean a; an offset of a is in neither
    square = difference.vocab * (difference.variance + above_mean**2)
    moved = square > 0
    norm = torch.where(moved, torch.sqrt(torch.where(moved, square, 1.0)), 0.0)
    return counted(stats, comp_sum(stats, tau=tau) + nu * norm)
