"""`RegionStats`: the soft confusion matrix of each region, and how upstream gradients become kernel coefficients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import RegionStat, RegionWant


@dataclass(frozen=True)
class RegionStats:
    """Sums over each region, differentiable with respect to the logits it was made from.

    x is a logit, t in [0, 1] its label, p = sigmoid(x), q = 1 - p. Every sum is over the pixels that count, of terms that
    are never negative, so that a difference of the classical sums (I = sum p t, S = sum p, Y = sum t) need not be taken:
    S - I is `false_positive`. Each property has the regions' shape, float32 (float64 for float64 logits). A property
    that needs a statistic which was not asked for raises ValueError naming it.
    """

    table: Tensor  # [10, *shape]
    want: RegionWant

    def _asked(self, want: RegionWant, name: str) -> None:
        if not self.want & want:
            raise ValueError(f"this statistic was not computed: pass {name!r} in `stats`")

    @property
    def shape(self) -> torch.Size:
        """Of the regions."""
        return self.table.shape[1:]

    @property
    def count(self) -> Tensor:
        """N, the pixels that count."""
        return self.table[RegionStat.COUNT]

    @property
    def labelled(self) -> Tensor:
        """Y = sum t."""
        return self.table[RegionStat.LABELLED]

    @property
    def unlabelled(self) -> Tensor:
        """N - Y."""
        return self.count - self.labelled

    @property
    def predicted(self) -> Tensor:
        """S = sum p."""
        return self.true_positive + self.false_positive

    @property
    def true_positive(self) -> Tensor:
        """I = sum p t."""
        return self.table[RegionStat.TRUE_POSITIVE]

    @property
    def false_positive(self) -> Tensor:
        """S - I = sum p (1 - t)."""
        return self.table[RegionStat.FALSE_POSITIVE]

    @property
    def false_negative(self) -> Tensor:
        """Y - I = sum q t."""
        return self.table[RegionStat.FALSE_NEGATIVE]

    @property
    def true_negative(self) -> Tensor:
        """N - Y - S + I = sum q (1 - t)."""
        return self.table[RegionStat.TRUE_NEGATIVE]

    @property
    def precision(self) -> Tensor:
        """I / S, 0 where nothing was predicted."""
        return ratio(self.true_positive, self.predicted)

    @property
    def recall(self) -> Tensor:
        """I / Y, 0 where nothing is labelled."""
        return ratio(self.true_positive, self.labelled)

    @property
    def specificity(self) -> Tensor:
        """True negatives over N - Y, 0 where everything is labelled."""
        return ratio(self.true_negative, self.unlabelled)

    @property
    def squared_error(self) -> Tensor:
        """sum (p - t)^2."""
        self._asked(RegionWant.SQUARES, "squared")
        return self.table[RegionStat.SQUARED_ERROR]

    @property
    def labelled_squared(self) -> Tensor:
        """sum t^2, which is Y where labels are 0 or 1."""
        self._asked(RegionWant.SQUARES, "squared")
        return self.table[RegionStat.LABELLED_SQUARE]

    @property
    def squared(self) -> Tensor:
        """Q = sum p^2."""
        return self.squared_error + 2 * self.true_positive - self.labelled_squared

    @property
    def bce(self) -> Tensor:
        """B = sum of t softplus(-x) + (1 - t) softplus(x), the binary cross entropy. x is not sharpened."""
        self._asked(RegionWant.CROSS_ENTROPY, "bce")
        return self.table[RegionStat.CROSS_ENTROPY]

    @property
    def entropy(self) -> Tensor:
        """H = sum of p softplus(-x) + q softplus(x), the binary entropy. x is not sharpened."""
        self._asked(RegionWant.ENTROPY, "entropy")
        return self.table[RegionStat.ENTROPY]


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 with gradient 0 where the denominator is 0."""
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


def region_coefficients(grad: Tensor) -> Tensor:
    """Upstream gradients [10, R] of the statistics -> the coefficients [5, R] of the gradient's terms."""
    return torch.stack(
        (
            grad[RegionStat.TRUE_POSITIVE] - grad[RegionStat.FALSE_NEGATIVE],
            grad[RegionStat.FALSE_POSITIVE] - grad[RegionStat.TRUE_NEGATIVE],
            2 * grad[RegionStat.SQUARED_ERROR],
            grad[RegionStat.CROSS_ENTROPY],
            grad[RegionStat.ENTROPY],
        )
    )
