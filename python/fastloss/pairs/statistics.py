"""`PairStats`: what `pair_stats` returns, in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import PairStat
from .nll import nll

INF = float("inf")


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), with zero gradients, the second ones too, for what is -inf (torch's are NaN there)."""
    no_a, no_b = a == -INF, b == -INF
    one = no_a | no_b
    both = torch.logaddexp(torch.where(one, 0.0, a), torch.where(one, 0.0, b))
    return torch.where(no_a, b, torch.where(no_b, a, both))


@dataclass(frozen=True)
class PairStats:
    """Statistics of each row of z_ij = scale <q_i, k_j> + bias over its negatives and its positives, differentiable.

    Each property has shape [M] ([B, M] of a batch), float32 (float64 for float64 embeddings). `columns` holds the same
    of each column over the rows, [N]. An empty set has lse -inf, sum 0, mean 0, and gives no gradient.
    """

    table: Tensor  # [..., 9 or 7, M]
    bias: Tensor | None = None
    second_scale: float | None = None
    mean: bool = False
    column_stats: PairStats | None = None

    def _row(self, stat: PairStat) -> Tensor:
        return self.table[..., stat, :]

    def _largest(self, stat: PairStat) -> Tensor:
        """A maximum, which moves with the bias alone: what an lse is relative to."""
        z = self._row(stat).detach()
        return z if self.bias is None else z + self.bias

    @property
    def columns(self) -> PairStats:
        """The statistics of the columns; ValueError if they were not asked for."""
        if self.column_stats is None:
            raise ValueError("the statistics of the columns were not computed: pass columns=True")
        return self.column_stats

    @property
    def neg_max(self) -> Tensor:
        """max over the negatives, -inf where there is none. No gradient: `row_topk` says where it is."""
        return self._largest(PairStat.NEG_MAX).detach()

    @property
    def pos_max(self) -> Tensor:
        """max over the positives, -inf where there is none. No gradient."""
        return self._largest(PairStat.POS_MAX).detach()

    @property
    def neg_lse(self) -> Tensor:
        """log sum over the negatives of e^z."""
        return self._largest(PairStat.NEG_MAX) + self._row(PairStat.NEG_LOGSUM)

    @property
    def pos_lse(self) -> Tensor:
        """log sum over the positives of e^z: z itself where there is one."""
        return self._largest(PairStat.POS_MAX) + self._row(PairStat.POS_LOGSUM)

    @property
    def pos_sum(self) -> Tensor:
        """sum of z over the positives."""
        total = self._row(PairStat.POS_SUM)
        return total if self.bias is None else total + self.bias * self.pos_count

    @property
    def neg_count(self) -> Tensor:
        """How many negatives there are. No gradient."""
        return self._row(PairStat.NEG_COUNT).detach()

    @property
    def pos_count(self) -> Tensor:
        """How many positives there are. No gradient."""
        return self._row(PairStat.POS_COUNT).detach()

    @property
    def neg_mean(self) -> Tensor:
        """E[z] under the softmax of the negatives, 0 where there is none."""
        if not self.mean:
            raise ValueError("neg_mean was not computed: pass mean=True")
        some = self.neg_count > 0
        largest = torch.where(some, self._largest(PairStat.NEG_MAX), 0.0)
        return torch.where(some, largest + self._row(PairStat.NEG_MEAN), 0.0)

    @property
    def second_neg_lse(self) -> Tensor:
        """log sum over the negatives of e^(second_scale z)."""
        if self.second_scale is None:
            raise ValueError("second_neg_lse was not computed: pass second_scale")
        return self.second_scale * self._largest(PairStat.NEG_MAX) + self._row(PairStat.NEG_SECOND)

    @property
    def lse(self) -> Tensor:
        """log sum of e^z over negatives and positives."""
        return logaddexp(self.neg_lse, self.pos_lse)

    @property
    def pos_mean(self) -> Tensor:
        """mean of z over the positives, 0 where there is none."""
        return self.pos_sum / self.pos_count.clamp(min=1)

    @property
    def has_positive(self) -> Tensor:
        """bool: rows with a positive."""
        return self.pos_count > 0

    @property
    def margin(self) -> Tensor:
        """pos_lse - neg_lse: +inf without negatives, -inf without positives, 0 without both."""
        empty = (self.neg_count == 0) & (self.pos_count == 0)
        negative, positive = (torch.where(empty, 0.0, x) for x in (self.neg_lse, self.pos_lse))
        return positive - negative

    @property
    def nll(self) -> Tensor:
        """-log of the share of the positives, lse - pos_lse = softplus(-margin), in which nothing cancels; 0 in rows without
        positives."""
        return nll(self.table, _nll)


def _nll(table: Tensor) -> Tensor:
    """`PairStats.nll` of PyTorch's operations; a bias cancels."""
    stats = PairStats(table)
    some = stats.has_positive
    return torch.where(some, softplus(-torch.where(some, stats.margin, 0.0)), 0.0)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), at all x (F.softplus is linear beyond 20), with the slope 1 / 2 at 0."""
    return -F.logsigmoid(-x)
