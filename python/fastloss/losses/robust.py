"""Losses made for noisy labels that need the margin (and, for the normalised cross entropy, the sum of the scores)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..statistics import RowStats
from . import catalogue
from .margin_form import check_above, check_not_negative, counted, expm1

_ASYMMETRIC = "Asymmetric Loss Functions for Learning with Noisy Labels"


@catalogue.row(
    formula="(1 - balance) (-log p_y) + balance A (1 - p_y)",
    gradient="phi'(d) (1[j=y] - pi_j), phi' = -sigma(-d) ((1 - balance) + balance A sigma(d))",
    source="Symmetric Cross Entropy for Robust Learning with Noisy Labels",
    published="p clamped at 1e-7 and the whole one-hot matrix; one repository exponentiates without a maximum",
)
def symmetric_cross_entropy(stats: RowStats, *, balance: float = 0.5, A: float = 4.0) -> Tensor:
    """(1 - balance) CE(y, p) + balance CE(p, y), in which log 0 is taken as -A: the second is A (1 - p_y).

    Wang's alpha CE + beta RCE is alpha = 1 - balance, beta = balance up to a factor. The same between two distributions,
    p and a teacher's q, is another loss. Raises ValueError for balance outside [0, 1] and A < 0.

    Wang, Ma, Chen, Luo, Yi and Bailey, "Symmetric Cross Entropy for Robust Learning with Noisy Labels" (2019).
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must be in [0, 1], got {balance}")
    check_not_negative(A=A)
    return counted(stats, balance * A * stats.log1mp.exp() - (1 - balance) * stats.logp)


@catalogue.row(
    formula="((a - p_y)^q - (a - 1)^q) / q",
    gradient="phi'(d) (1[j=y] - pi_j), phi' = -(a - p_y)^(q - 1) sigma(d) sigma(-d), a - p_y = (a - 1) + sigma(-d)",
    source=_ASYMMETRIC,
    published="the difference of two powers cancels as p_y -> 1; here (a - 1)^q expm1(q log1p((1 - p_y) / (a - 1))) / q",
)
def asymmetric_unhinged(stats: RowStats, *, a: float = 1.5, q: float = 0.9) -> Tensor:
    """((a - p_y)^q - (a - 1)^q) / q, the asymmetric unhinged loss (AUL). Raises ValueError for a <= 1 and q <= 0.

    Zhou, Liu, Jiang, Gao and Ji, "Asymmetric Loss Functions for Learning with Noisy Labels" (2021).
    """
    check_above(1, a=a)
    check_above(0, q=q)
    growth = torch.log1p(stats.log1mp.exp() / (a - 1))  # log((a - p_y) / (a - 1))
    return counted(stats, (a - 1) ** q / q * expm1(q * growth))


@catalogue.row(
    formula="((a + 1)^q - (a + p_y)^q) / q",
    gradient="phi'(d) (1[j=y] - pi_j), phi' = -(a + p_y)^(q - 1) sigma(d) sigma(-d)",
    source=_ASYMMETRIC,
    published="the difference of two powers cancels as p_y -> 1; here -(a + 1)^q expm1(q log1p(-(1 - p_y) / (a + 1))) / q",
)
def asymmetric_generalized(stats: RowStats, *, a: float = 1.0, q: float = 2.0) -> Tensor:
    """((a + 1)^q - (a + p_y)^q) / q, the asymmetric generalised cross entropy (AGCE).

    Raises ValueError for a <= 0 (a = 0 is `generalized_cross_entropy`) and q <= 0. Zhou et al. (2021), as above.
    """
    check_above(0, a=a, q=q)
    decay = torch.log1p(-stats.log1mp.exp() / (a + 1))  # log((a + p_y) / (a + 1))
    return counted(stats, -((a + 1) ** q) / q * expm1(q * decay))


@catalogue.row(
    formula="n / m, n = lse - z_y, m = sum_j (lse - z_j)",
    gradient="(1/m - V n/m^2) p_j - 1[j=y] / m + n/m^2",
    source="Normalized Loss Functions for Deep Learning with Noisy Labels",
    statistics=("sum",),
    published="V log-probabilities a row are stored and summed; here two numbers a row",
)
def normalized_cross_entropy(stats: RowStats) -> Tensor:
    """-log p_y / sum_j (-log p_j), in [0, 1]; 0 where there is one class only. Needs the statistic "sum".

    Ma, Huang, Wang, Romano, Erfani and Bailey, "Normalized Loss Functions for Deep Learning with Noisy Labels" (2020).
    """
    whole = stats.nll_sum
    some = whole != 0
    return counted(stats, torch.where(some, stats.nll / torch.where(some, whole, 1.0), 0.0))
