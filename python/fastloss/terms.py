"""What `row_stats` can take besides a target: a teacher, a function of student and teacher, generated targets."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .contract import Term


class RowTerm(NamedTuple):
    """A separable function f(a_j, b_j) of student and teacher whose sum over the columns is a statistic.

    a = log softmax(z / T), b = log softmax(t / T); for `log_cosh` and `binary_cross_entropy` a = z / T, b = t / T.
    """

    kind: Term
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0


def kl(forward: float = 1.0, reverse: float = 0.0) -> RowTerm:
    """forward * KL(q, p) + reverse * KL(p, q); p the student, q the teacher."""
    return RowTerm(Term.KL, float(forward), float(reverse))


def mixture(forward: float, reverse: float, beta: float) -> RowTerm:
    """forward * KL(q, m) + reverse * KL(p, m), m = beta q + (1 - beta) p; beta 0 or 1 gives the KL that is left."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    if beta == 0:  # m = p: only KL(q, p) is left
        return kl(forward, 0.0)
    if beta == 1:
        return kl(0.0, reverse)
    return RowTerm(Term.MIXTURE, float(forward), float(reverse), float(beta))


def jensen_shannon(beta: float = 0.5) -> RowTerm:
    """beta KL(q, m) + (1 - beta) KL(p, m), m = beta q + (1 - beta) p."""
    if not 0 < beta < 1:
        raise ValueError(f"beta must be in (0, 1), got {beta}; the limits are kl(forward) and kl(reverse)")
    return mixture(beta, 1 - beta, beta)


def total_variation() -> RowTerm:
    """sum_j |p_j - q_j| / 2."""
    return RowTerm(Term.TOTAL_VARIATION)


def log_cosh() -> RowTerm:
    """sum_j log cosh((z_j - t_j) / (2 T))."""
    return RowTerm(Term.LOG_COSH)


def binary_cross_entropy(*, logits: bool = True) -> RowTerm:
    """sum_j softplus(z_j / T) - u_j z_j / T, with u_j = sigmoid(t_j / T), or t_j itself where logits=False."""
    return RowTerm(Term.BCE_LOGITS if logits else Term.BCE)


class TeacherHead(NamedTuple):
    """A teacher given as its own linear head, whose logits are never stored: softcap(logit_scale (input weightᵀ + bias))."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


class HLGauss(NamedTuple):
    """Targets of a classification of scalars, generated in the kernel: a Gaussian around each value, cut to V equal bins.

    values: one number a row. The bins cover [low, high]; values outside are clamped. sigma in the units of the values.
    """

    values: Tensor
    low: float
    high: float
    sigma: float

    def numbers(self, columns: int) -> tuple[float, float, float]:
        """(low, width of a bin, sigma)."""
        if not self.high > self.low or not self.sigma > 0:
            raise ValueError(f"needs low < high and sigma > 0, got {self.low}, {self.high}, {self.sigma}")
        return float(self.low), (self.high - self.low) / max(1, columns), float(self.sigma)
