"""`SphericalStats`: what `SphericalLinear` knows of a row of scores without computing it, under the names of `RowStats`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SphericalStats:
    """Statistics of each row o = W h [num_classes] of scores, float64, differentiable with respect to h.

    With one class listed a row every property has the rows' shape [...]. With K classes listed, `target_logit` and
    `valid` have shape [..., K] and the statistics of the whole row [..., 1], so that a loss written for one class gives
    one value for each listed class. On rows without a listed class that counts every statistic is 0.
    """

    target_logit: Tensor  # [...] or [..., K]: the scores of the listed classes
    sum: Tensor  # [...] or [..., 1]: sum_k o_k
    centred_sumsq: Tensor  # [...] or [..., 1]: sum_k (o_k - mean)^2
    vocab: int
    target: Tensor  # class ids, of target_logit's shape
    ignore_index: int

    soft = False  # the listed classes are ids, never probabilities

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"SphericalLinear does not compute {name!r}: its losses are functions of target_logit, sum, sumsq and variance"
        )

    @property
    def shape(self) -> torch.Size:
        """The shape of a loss of these statistics."""
        return self.target_logit.shape

    @property
    def valid(self) -> Tensor:
        """True where the listed class counts, False where it is ignore_index."""
        return self.target != self.ignore_index

    @property
    def centred_target_logit(self) -> Tensor:
        """The listed class's score less the mean of the row."""
        return torch.where(self.valid, self.target_logit - self.sum / self.vocab, 0.0)

    @property
    def variance(self) -> Tensor:
        """Variance of the scores over all classes."""
        return self.centred_sumsq / self.vocab

    @property
    def sumsq(self) -> Tensor:
        """sum_k o_k^2."""
        return self.centred_sumsq + self.sum**2 / self.vocab
