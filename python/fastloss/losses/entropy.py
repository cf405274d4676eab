"""Losses of the whole distribution: its entropies, the size of its normaliser, and the Brier score."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..statistics import RowStats
from . import catalogue
from .margin_form import check_above, check_temperature, counted, expm1


@catalogue.row(
    formula="coefficient lse^2",
    gradient="2 coefficient lse p_j",
    source="PaLM: Scaling Language Modeling with Pathways",
)
def lse_penalty(stats: RowStats, *, coefficient: float = 1e-4) -> Tensor:
    """coefficient lse^2, the z-loss of PaLM by itself: keeps the normaliser near 1. With or without a target.

    Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways" (2022); its use against instabilities: "Small-scale
    proxies for large-scale Transformer training instabilities". (`cross_entropy` has it as z_loss.)
    """
    return counted(stats, coefficient * stats.lse**2)


@catalogue.row(
    formula="-alpha H(p)",
    gradient="alpha p_j (z_j - E_p[z])",
    source="Asynchronous Methods for Deep Reinforcement Learning",
    statistics=("entropy",),
)
def entropy_bonus(stats: RowStats, *, alpha: float = 0.01) -> Tensor:
    """-alpha H(p), to be added to a loss: more entropy is better. With or without a target; needs "entropy".

    Mnih et al., "Asynchronous Methods for Deep Reinforcement Learning" (2016), with alpha = 0.01.
    """
    return counted(stats, -alpha * stats.entropy)


@catalogue.row(
    formula="-log p_y - alpha H(p)",
    gradient="phi'(d) (1[j=y] - pi_j) + alpha p_j (z_j - E_p[z]), phi' = -sigma(-d)",
    source="Regularizing Neural Networks by Penalizing Confident Output Distributions",
    statistics=("entropy",),
    published="mean over rows and classes, p clamped; here a value a row, nothing clamped",
)
def confidence_penalty(stats: RowStats, *, alpha: float = 0.1) -> Tensor:
    """-log p_y - alpha H(p), one value a row, 0 on ignored rows; needs "entropy".

    Pereyra, Tucker, Chorowski, Kaiser and Hinton, "Regularizing Neural Networks by Penalizing Confident Output
    Distributions" (2017), with alpha = 0.1.
    """
    return counted(stats, -stats.logp - alpha * stats.entropy)


@catalogue.row(
    formula="log V - H(p) = KL(p || uniform)",
    gradient="p_j (z_j - E_p[z])",
    source="Regularizing Neural Networks by Penalizing Confident Output Distributions",
    statistics=("entropy",),
)
def max_entropy(stats: RowStats) -> Tensor:
    """log V - H(p), the divergence of p from the uniform distribution: >= 0, and 0 there. Without a target, as for
    samples of no known class; needs "entropy"."""
    return counted(stats, math.log(max(stats.vocab, 1)) - stats.entropy)


def _tsallis_statistics(q: float = 2.0, **_: object) -> tuple[str, ...]:
    return ("entropy",) if q == 1 else ("tempered_lse",)


def _tsallis_temperature(q: float = 2.0, **_: object) -> float | None:
    return None if q == 1 else 1 / _checked(q)


def _checked(q: float) -> float:
    check_above(0, q=q)
    return q


@catalogue.row(
    formula="(1 - sum_j p_j^q) / (q - 1), normalised: / ((1 - V^(1 - q)) / (q - 1)); q = 1: H(p) / log V",
    gradient="-(q / (q - 1)) P_q (p_j^(q) - p_j), P_q = sum p^q, p^(q) = softmax(q z)",
    source="Possible generalization of Boltzmann-Gibbs statistics",
    statistics=_tsallis_statistics,
    temperature=_tsallis_temperature,
    published="DynMoLE adds 1e-5 to every p, which then sum to more than 1; here the entropy of p itself",
)
def tsallis_entropy(stats: RowStats, *, q: float = 2.0, normalize: bool = False) -> Tensor:
    """(1 - sum_j p_j^q) / (q - 1), Tsallis's entropy of index q > 0; q = 1 is Shannon's, q = 2 Gini's impurity.

    normalize: divided by its largest value, so that it is in [0, 1]. One value a row, 0 on ignored rows; with or without a
    target. sum_j p_j^q is a second log-sum-exp, at temperature 1/q: "tempered_lse", which `row_loss` asks for.
    Raises ValueError for q <= 0 and for statistics at another temperature.

    Tsallis, "Possible generalization of Boltzmann-Gibbs statistics" (1988).
    """
    classes = math.log(max(stats.vocab, 1))
    if q == 1:
        rows = stats.entropy
        return counted(stats, rows / classes if normalize and classes else rows)
    check_temperature(stats, "1 / q", 1 / _checked(q))
    if stats.target is None:
        missing = -expm1(stats.rest_log_power_sum)
    else:
        larger, smaller = torch.maximum(stats.logp, stats.log1mp), torch.minimum(stats.logp, stats.log1mp)
        two = -expm1(q * larger) - torch.exp(q * smaller)  # of the target against the rest as one class
        missing = two - torch.exp(q * stats.log1mp) * expm1(stats.rest_log_power_sum)
    largest = -math.expm1((1 - q) * classes)
    rows = missing / largest if normalize and classes else missing / (q - 1)
    return counted(stats, rows)


@catalogue.row(
    formula="sum_j (p_j - 1[j=y])^2 = (1 - p_y)^2 (1 + sum_{j != y} pi_j^2)",
    gradient="2 p_j^2 - 2 (sum p^2 - p_y) p_j - 2 p_y 1[j=y]",
    source="Verification of Forecasts Expressed in Terms of Probability",
    statistics=("tempered_lse",),
    temperature=0.5,
    published="1 - 2 p_y + sum p^2 cancels as p_y -> 1; here a product of positive numbers",
)
def brier(stats: RowStats) -> Tensor:
    """sum_j (p_j - 1[j=y])^2, one value a row, 0 on ignored rows.

    sum_j p_j^2 is a log-sum-exp at temperature 1/2: needs "tempered_lse" there, which `row_loss` asks for.
    Raises ValueError for statistics at another temperature.

    Brier, "Verification of Forecasts Expressed in Terms of Probability" (1950).
    """
    check_temperature(stats, "0.5", 0.5)
    return counted(stats, torch.exp(2 * stats.log1mp) * (1 + stats.rest_log_power_sum.exp()))
