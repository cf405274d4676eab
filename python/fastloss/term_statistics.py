"""Upstream gradients of the statistics of `row_terms` -> coefficients of the gradient's terms (docs/design.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Term, TermCoef, TermStat, Want
from .reference_terms import RAW


def term_coefficients(
    grad: Tensor, grad_top: Tensor | None, stats: Tensor, temperature: Tensor | None, want: int, term: int
) -> Tensor:
    """[17 + K, N] -> [10 + K, N], for the gradient with respect to the scores.

    With p = softmax(z / T): dE_p[x_j]/dz_j = p_j (x_j - E_p[x]) / T, plus p_j where x is z itself.
    """
    k = stats.shape[0] - TermStat.LISTED
    coef = torch.zeros(TermCoef.LISTED + k, stats.shape[1], dtype=stats.dtype, device=stats.device)
    warm = 1.0 if temperature is None else temperature.to(stats.dtype)
    total = grad[TermStat.LOGSUM] / warm
    if want & Want.ENTROPY:
        g = grad[TermStat.MEAN]
        coef[TermCoef.ALL_Z] = g / warm
        # In this order, since for an entropy the first two cancel exactly and leave the small third.
        total = (total + g) - g * (stats[TermStat.MEAN] / warm)
    if want & Want.TEACHER_MEAN:
        g = grad[TermStat.TEACHER_MEAN] / warm
        coef[TermCoef.ALL_T] = g
        total = total - torch.where(g == 0, 0.0, g * stats[TermStat.TEACHER_MEAN])
    if want & Want.SCORE_MEAN:
        coef[TermCoef.TEACHER] = grad[TermStat.SCORE_MEAN]
    if want & Want.TERM:
        g = grad[TermStat.TERM] / warm
        coef[TermCoef.TERM] = g
        if term not in RAW:
            total = total - torch.where(g == 0, 0.0, g * stats[TermStat.SLOPE])
    if want & Want.SUBSET:
        coef[TermCoef.SUBSET] = grad[TermStat.SUBSET_LOGSUM]
    if want & Want.SUM:
        coef[TermCoef.COLUMN] = grad[TermStat.SUM]
    if want & Want.SUMSQ:
        coef[TermCoef.LINEAR] = 2 * grad[TermStat.SUMSQ]
    if want & Want.ARGMAX and grad_top is not None:
        coef[TermCoef.ARG] = grad_top
    coef[TermCoef.REST], coef[TermCoef.ALL] = grad[TermStat.REST_LOGSUM], total
    coef[TermCoef.LISTED :] = grad[TermStat.LISTED :]
    return coef


#: The term with the roles of scores and teacher exchanged; absent: no gradient of the teacher.
EXCHANGED = (Term.KL, Term.MIXTURE, Term.TOTAL_VARIATION, Term.LOG_COSH)


def exchanged(term: int, a: float, b: float, c: float) -> tuple[int, float, float, float]:
    """The same function of (teacher, scores)."""
    if term == Term.KL:
        return term, b, a, c
    if term == Term.MIXTURE:
        return term, b, a, 1 - c
    return term, a, b, c


def exchanged_stats(stats: Tensor) -> Tensor:
    """The statistics [17, N] that the kernel reads when scores and teacher change places."""
    swapped = torch.zeros_like(stats[: TermStat.LISTED])
    swapped[TermStat.REST_LOGSUM] = -torch.inf
    swapped[TermStat.MAX], swapped[TermStat.LOGSUM] = stats[TermStat.TEACHER_MAX], stats[TermStat.TEACHER_LOGSUM]
    swapped[TermStat.TEACHER_MAX], swapped[TermStat.TEACHER_LOGSUM] = stats[TermStat.MAX], stats[TermStat.LOGSUM]
    return swapped


def teacher_coefficients(grad: Tensor, stats: Tensor, temperature: Tensor | None, want: int, term: int) -> Tensor:
    """[17 + K, N] -> [10, N], for the gradient with respect to the teacher's scores by the exchanged kernel."""
    coef = torch.zeros(TermCoef.LISTED, stats.shape[1], dtype=stats.dtype, device=stats.device)
    warm = 1.0 if temperature is None else temperature.to(stats.dtype)
    total = grad[TermStat.TEACHER_LOGSUM] / warm
    if want & Want.SCORE_MEAN:
        g = grad[TermStat.SCORE_MEAN] / warm
        coef[TermCoef.ALL_T] = g
        total = total - g * stats[TermStat.SCORE_MEAN]
        g = grad[TermStat.TEACHER_OWN_MEAN]
        coef[TermCoef.ALL_Z] = g / warm
        total = (total + g) - g * (stats[TermStat.TEACHER_OWN_MEAN] / warm)
    if want & Want.TEACHER_MEAN:
        coef[TermCoef.TEACHER] = grad[TermStat.TEACHER_MEAN]
    if want & Want.TERM:
        g = grad[TermStat.TERM] / warm
        coef[TermCoef.TERM] = g
        if term not in RAW:
            total = total - g * stats[TermStat.TEACHER_SLOPE]
    coef[TermCoef.ALL] = total
    return coef
