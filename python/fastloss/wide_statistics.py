"""`WideRowStats`: the statistics of `row_terms`, with the names of `RowStats` and more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import Stat, TermStat, Want
from .reference import INF, finite
from .statistics import RowStats

_SAME = {Stat.MAX: TermStat.REST_MAX, Stat.LOGSUM: TermStat.REST_LOGSUM}
_CENTRED = {Stat.MEAN: TermStat.MEAN, Stat.SUM: TermStat.SUM, Stat.SUMSQ: TermStat.SUMSQ}


@dataclass(frozen=True)
class WideRowStats(RowStats):
    """`RowStats` of rows with a teacher, listed columns or a subset of the columns; "rest" is every column not listed.

    p = softmax(z / T) is the student, q = softmax(t / T) the teacher. `entropy` is that of p at T, too.
    """

    listed: Tensor  # [N, K], the target first where there is one

    @property
    def valid(self) -> Tensor:
        """True where the row counts, False where its first id is ignore_index."""
        if not self.listed.shape[1]:
            return torch.ones(self.shape, dtype=torch.bool, device=self.table.device)
        return (self.listed[:, 0] != self.ignore_index).reshape(self.shape)

    def _counted(self, rows: Tensor) -> Tensor:
        return torch.where(self.valid, rows, 0.0) if self.listed.shape[1] else rows

    def _row(self, stat: Stat | TermStat) -> Tensor:
        if isinstance(stat, TermStat):
            return self.table[stat].reshape(self.shape)
        if stat == Stat.TARGET:
            if self.target is None:
                return torch.full_like(self._row(TermStat.MAX), -INF)
            return self._row_at(TermStat.LISTED)
        return self._row_at({**_SAME, **_CENTRED}[stat])

    def _row_at(self, index: int) -> Tensor:
        return self.table[index].reshape(self.shape)

    @property
    def _centre(self) -> Tensor:
        return finite(self._row(TermStat.MAX).detach())

    @property
    def _log_total(self) -> Tensor:
        """lse - _centre at temperature 1."""
        return self._counted(self._log_sum_of_listed(0))

    def _log_sum_of_listed(self, begin: int) -> Tensor:
        """LSE of the rest and of the distinct columns of the list from `begin` on, relative to _centre."""
        rest = self._row(TermStat.REST_LOGSUM) + (self.reference_point - self._centre)
        gaps = self.table[TermStat.LISTED + begin :].reshape(-1, *self.shape) - self._centre
        gaps = torch.where(self._first_mentions()[begin:], gaps, -INF)
        return _log_sum(torch.cat((rest[None], gaps)))

    def _first_mentions(self) -> Tensor:
        """[K, rows]: not the same column as an earlier one of the list."""
        ids, order = self.listed.sort(stable=True)
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return torch.zeros_like(new).scatter(1, order, new).T.reshape(ids.shape[1], *self.shape)

    @property
    def _lse_gap(self) -> Tensor:
        return self._log_total + (self._centre - self.reference_point)

    @property
    def margin(self) -> Tensor:
        """d = z_y - LSE of all other columns, those that are listed included."""
        if self.listed.shape[1] == 1:
            return self._margin_of_rest()
        if self.target is None:
            raise ValueError("margin, logp and log1mp need a target column")
        return (self._row_at(TermStat.LISTED) - self._centre) - self._log_sum_of_listed(1)

    @property
    def centred_target_logit(self) -> Tensor:
        """z_y - mean of z over the columns (needs "sum" and a target column)."""
        self._asked(Want.SUM, "sum")
        return self._counted((self._row(Stat.TARGET) - self._centre) - self._row(Stat.SUM) / self.vocab)

    @property
    def lse(self) -> Tensor:
        """LSE over all columns, at temperature 1."""
        return self._centre + self._log_total

    @property
    def rest_logp(self) -> Tensor:
        """log of the probability of all columns that are not listed, at temperature 1."""
        return self._row(TermStat.REST_LOGSUM) + (self.reference_point - self._centre) - self._log_total

    @property
    def listed_logits(self) -> Tensor:
        """z of the listed columns [..., K], the target's first where there is a target; -inf where an id is absent."""
        return self.table[TermStat.LISTED :].T.reshape(*self.shape, -1)

    @property
    def listed_logp(self) -> Tensor:
        """log p of the listed columns [..., K], at temperature 1."""
        return (self.listed_logits - self._centre[..., None]) - self._log_total[..., None]

    @property
    def tempered_lse(self) -> Tensor:
        """LSE(z / T) over all columns."""
        return self._counted(self._centre / self._warm + self._row(TermStat.LOGSUM))

    @property
    def tempered_margin(self) -> Tensor:
        """Not a statistic of rows with a teacher or listed columns."""
        raise ValueError(
            "tempered_margin is computed for rows with a target alone: no teacher, listed columns or subset"
        )

    @property
    def _warm(self) -> Tensor | float:
        return 1.0 if self.temperature is None else self.temperature.reshape(self.shape)

    @property
    def entropy(self) -> Tensor:
        """H(p) at temperature T."""
        self._asked(Want.ENTROPY, "entropy")
        return self._row(TermStat.LOGSUM) - self._row(TermStat.MEAN) / self._warm

    @property
    def mean_logit(self) -> Tensor:
        """E_p[z], p at temperature T."""
        self._asked(Want.ENTROPY, "entropy")
        return self._counted(self._centre + self._row(TermStat.MEAN))

    @property
    def sum(self) -> Tensor:
        """sum_j z_j."""
        self._asked(Want.SUM, "sum")
        return self._row(TermStat.SUM) + self._centre * self.vocab

    @property
    def nll_sum(self) -> Tensor:
        """sum_j (lse - z_j)."""
        self._asked(Want.SUM, "sum")
        return self._log_total * self.vocab - self._row(TermStat.SUM)

    @property
    def sumsq(self) -> Tensor:
        """sum_j z_j^2 (needs "sum" too)."""
        self._asked(Want.SUM, "sum")
        self._asked(Want.SUMSQ, "sumsq")
        m = self._centre
        return self._row(TermStat.SUMSQ) + m * (2 * self._row(TermStat.SUM) + m * self.vocab)

    @property
    def _teacher_centre(self) -> Tensor:
        return finite(self._row(TermStat.TEACHER_MAX).detach())

    @property
    def teacher_lse(self) -> Tensor:
        """LSE(t / T) over all columns."""
        self._asked(Want.TEACHER, "teacher_lse")
        return self._teacher_centre / self._warm + self._row(TermStat.TEACHER_LOGSUM)

    @property
    def teacher_mean(self) -> Tensor:
        """E_p[t]."""
        self._asked(Want.TEACHER_MEAN, "teacher_mean")
        return self._teacher_centre + self._row(TermStat.TEACHER_MEAN)

    @property
    def score_mean(self) -> Tensor:
        """E_q[z]."""
        self._asked(Want.SCORE_MEAN, "score_mean")
        return self._counted(self._centre + self._row(TermStat.SCORE_MEAN))

    @property
    def teacher_nll(self) -> Tensor:
        """-E_q[log p] at T, without the offset of the logits: cross entropy with the teacher's probabilities."""
        self._asked(Want.SCORE_MEAN, "score_mean")
        return self._row(TermStat.LOGSUM) - self._row(TermStat.SCORE_MEAN) / self._warm

    @property
    def reverse_nll(self) -> Tensor:
        """-E_p[log q] at T."""
        self._asked(Want.TEACHER_MEAN, "teacher_mean")
        self._asked(Want.TEACHER | Want.SCORE_MEAN, "teacher_lse")
        return self._row(TermStat.TEACHER_LOGSUM) - self._row(TermStat.TEACHER_MEAN) / self._warm

    @property
    def teacher_entropy(self) -> Tensor:
        """H(q) at T."""
        self._asked(Want.SCORE_MEAN, "score_mean")
        return self._row(TermStat.TEACHER_LOGSUM) - self._row(TermStat.TEACHER_OWN_MEAN) / self._warm

    @property
    def term(self) -> Tensor:
        """sum_j f(a_j, b_j) of the `RowTerm` that was asked for."""
        self._asked(Want.TERM, "term")
        return self._row(TermStat.TERM)

    @property
    def subset_lse(self) -> Tensor:
        """LSE over the columns of the subset."""
        self._asked(Want.SUBSET, "subset_lse")
        return finite(self._row(TermStat.SUBSET_MAX).detach()) + self._row(TermStat.SUBSET_LOGSUM)

    @property
    def subset_logp(self) -> Tensor:
        """log of the probability of the subset, at temperature 1."""
        self._asked(Want.SUBSET, "subset_lse")
        offset = finite(self._row(TermStat.SUBSET_MAX).detach()) - self._centre
        return self._row(TermStat.SUBSET_LOGSUM) + offset - self._log_total


def _log_sum(gaps: Tensor) -> Tensor:
    """LSE over dim 0; -inf with zero gradient where there is nothing."""
    nothing = (gaps == -INF).all(0)
    return torch.where(nothing, -INF, torch.where(nothing, 0.0, gaps).logsumexp(0))
