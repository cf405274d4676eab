"""`RowStats`: the differentiable numbers of each row, and how upstream gradients of them become kernel coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import NUM_COEFS, Coef, Stat, Want
from .reference import INF, finite

if TYPE_CHECKING:
    from .autograd import Options


@dataclass(frozen=True)
class RowStats:
    """Statistics of each row of a score matrix z [N, V], differentiable with respect to what z was made from.

    With a target column y, "rest" is every other column; with target probabilities q, or with no target, it is all columns.
    Each property is a tensor of the rows' shape, float32 (float64 for float64 input). A property that needs a statistic
    which was not asked for raises ValueError naming it. On rows whose target is ignored every statistic is 0 (argmax is -1).
    """

    table: Tensor  # [8, N]
    top: Tensor  # [N] or [0]
    argmax_index: Tensor  # [N] or [0]
    target: Tensor | None
    soft: bool
    vocab: int
    want: Want
    temperature: Tensor | None
    column_weight: Tensor | None
    ignore_index: int
    shape: torch.Size

    def _row(self, stat: Stat) -> Tensor:
        return self.table[stat].reshape(self.shape)

    def _asked(self, want: Want, name: str) -> None:
        if not self.want & want:
            raise ValueError(f"this statistic was not computed: pass {name!r} in `stats`")

    @property
    def valid(self) -> Tensor:
        """True where the row counts, False where its target is ignore_index."""
        if self.target is None:
            return torch.ones(self.shape, dtype=torch.bool, device=self.table.device)
        return (self.target != self.ignore_index).reshape(self.shape)

    def _counted(self, rows: Tensor) -> Tensor:
        """0 on ignored rows, which have no statistics."""
        return rows if self.target is None else torch.where(self.valid, rows, 0.0)

    @property
    def reference_point(self) -> Tensor:
        """max over the rest (0 where there is none), a constant: other statistics are kept relative to it."""
        return finite(self._row(Stat.MAX).detach())

    @property
    def target_logit(self) -> Tensor:
        """z_y; with probabilities sum_j q_j c_j z_j."""
        picked = self._row(Stat.TARGET)
        return picked + self.mass * self.reference_point if self.soft else picked

    @property
    def mass(self) -> Tensor:
        """sum_j q_j c_j with probabilities; 1 with a target column."""
        return self._row(Stat.MASS) if self.soft else torch.ones_like(self._row(Stat.MAX))

    @property
    def rest_lse(self) -> Tensor:
        """LSE over the rest, -inf if there is none."""
        return self.reference_point + self._row(Stat.LOGSUM)

    @property
    def margin(self) -> Tensor:
        """d = z_y - LSE of the other columns; log p_y = -softplus(-d) and log(1 - p_y) = -softplus(d), without cancellation."""
        return self._margin_of_rest()

    def _margin_of_rest(self) -> Tensor:  # a method, since torch.compile knows no super().margin of a property
        if self.soft or self.target is None:
            raise ValueError(
                "margin, logp and log1mp need a target column: class indices, not probabilities or no target"
            )
        picked = self._row(Stat.TARGET)
        margin = (picked - self.reference_point) - self._row(Stat.LOGSUM)
        return torch.where(picked == INF, torch.nan, margin)  # as in torch, where it is inf - inf

    @property
    def logp(self) -> Tensor:
        """log p_y."""
        return self._counted(F.logsigmoid(self.margin))

    @property
    def log1mp(self) -> Tensor:
        """log(1 - p_y)."""
        return self._counted(F.logsigmoid(-self.margin))

    @property
    def _lse_gap(self) -> Tensor:
        """lse - reference_point."""
        logsum = self._row(Stat.LOGSUM)
        if self.soft or self.target is None:
            return logsum
        picked = self._row(Stat.TARGET) - self.reference_point
        empty = logsum == -INF  # the target is the only column; the sum below would be -inf + inf
        some = torch.where(empty, 0.0, logsum)
        return self._counted(torch.where(empty, picked, some - F.logsigmoid(some - picked)))

    @property
    def lse(self) -> Tensor:
        """LSE over all columns."""
        return self.reference_point + self._lse_gap

    @property
    def nll(self) -> Tensor:
        """lse - z_y; with probabilities sum_j q_j c_j (lse - z_j)."""
        if self.soft:
            return self.mass * self._lse_gap - self._row(Stat.TARGET)
        return -self.logp

    @property
    def mean_logit(self) -> Tensor:
        """E_p[z]."""
        self._asked(Want.ENTROPY, "entropy")
        return self.reference_point + self._row(Stat.MEAN)

    @property
    def entropy(self) -> Tensor:
        """H(p) = lse - E_p[z]."""
        self._asked(Want.ENTROPY, "entropy")
        return self._lse_gap - self._row(Stat.MEAN)

    @property
    def sum(self) -> Tensor:
        """sum_j c_j z_j."""
        self._asked(Want.SUM, "sum")
        return self._row(Stat.SUM) + self.reference_point * self._weights

    @property
    def _weights(self) -> Tensor | float:
        return float(self.vocab) if self.column_weight is None else self.column_weight.to(self.table.dtype).sum()

    @property
    def nll_sum(self) -> Tensor:
        """sum_j c_j (lse - z_j): minus the weighted sum of all log-probabilities, without cancellation."""
        self._asked(Want.SUM, "sum")
        return self._lse_gap * self._weights - self._row(Stat.SUM)

    @property
    def sumsq(self) -> Tensor:
        """sum_j z_j^2 (needs "sum" too, unweighted)."""
        self._asked(Want.SUM, "sum")
        self._asked(Want.SUMSQ, "sumsq")
        m = self.reference_point
        return self._row(Stat.SUMSQ) + m * (2 * self._row(Stat.SUM) + m * self.vocab)

    @property
    def variance(self) -> Tensor:
        """Variance of z over the columns, at the accuracy of z - max (needs "sum" too, unweighted)."""
        self._asked(Want.SUM, "sum")
        self._asked(Want.SUMSQ, "sumsq")
        return self._row(Stat.SUMSQ) / self.vocab - (self._row(Stat.SUM) / self.vocab) ** 2

    @property
    def centred_target_logit(self) -> Tensor:
        """z_y - mean of z over the columns, at the accuracy of z - max (needs "sum", unweighted, and a target column)."""
        self._asked(Want.SUM, "sum")
        return (self._row(Stat.TARGET) - self.reference_point) - self._row(Stat.SUM) / self.vocab

    @property
    def tempered_lse(self) -> Tensor:
        """LSE(z / T) over all columns, T the row's temperature."""
        self._asked(Want.TEMPERED, "tempered_lse")
        if self.temperature is None:
            raise ValueError("tempered_lse needs a temperature")
        t = self.temperature.reshape(self.shape)
        rest = self.reference_point / t + self._row(Stat.LOGSUM_T)
        if self.soft or self.target is None:
            return rest
        return self._counted(torch.logaddexp(rest, self._row(Stat.TARGET) / t))

    @property
    def tempered_margin(self) -> Tensor:
        """z_y / T - LSE of the other columns of z / T: the margin at the row's temperature."""
        self._asked(Want.TEMPERED, "tempered_lse")
        if self.soft or self.target is None or self.temperature is None:
            raise ValueError("tempered_margin needs a target column and a temperature")
        gap = self._row(Stat.TARGET) - self.reference_point
        return gap / self.temperature.reshape(self.shape) - self._row(Stat.LOGSUM_T)

    @property
    def max(self) -> Tensor:
        """The largest score; its gradient goes to the column `argmax`."""
        self._asked(Want.ARGMAX, "argmax")
        return self.top.reshape(self.shape)

    @property
    def argmax(self) -> Tensor:
        """int64: the lowest column that holds the largest score; -1 on ignored rows."""
        self._asked(Want.ARGMAX, "argmax")
        return self.argmax_index.reshape(self.shape)

    @property
    def max_logp(self) -> Tensor:
        """log p of the column `argmax`: max - lse, at the accuracy of z - max."""
        return self._counted((self.max - self.reference_point) - self._lse_gap)

    @property
    def tempered_max_logp(self) -> Tensor:
        """max / T - LSE(z / T): log p of the column `argmax` at the row's temperature."""
        self._asked(Want.TEMPERED, "tempered_lse")
        if self.temperature is None:
            raise ValueError("tempered_max_logp needs a temperature")
        t = self.temperature.reshape(self.shape)
        gap = self._row(Stat.LOGSUM_T)
        if not (self.soft or self.target is None):
            gap = torch.logaddexp(gap, (self._row(Stat.TARGET) - self.reference_point) / t)
        return self._counted((self.max - self.reference_point) / t - gap)

    @property
    def rest_log_power_sum(self) -> Tensor:
        """log sum_j pi_j^(1/T) over the rest, pi = e^(z - rest_lse) its own softmax; -inf if there is no rest."""
        self._asked(Want.TEMPERED, "tempered_lse")
        if self.temperature is None:
            raise ValueError("rest_log_power_sum needs a temperature")
        logsum, tempered = self._row(Stat.LOGSUM), self._row(Stat.LOGSUM_T)
        some = logsum != -INF
        log_sum = torch.where(some, tempered, 0.0) - torch.where(some, logsum, 0.0) / self.temperature.reshape(
            self.shape
        )
        return torch.where(some, log_sum, -INF)

    @property
    def accuracy(self) -> Tensor:
        """1.0 where argmax is the target, else 0.0."""
        if self.target is None:
            raise ValueError("accuracy needs class indices as target")
        return self._counted((self.argmax == self.target.reshape(self.shape)).to(self.table.dtype))


def largest(stats: Tensor, want: int, soft: bool) -> Tensor:
    """The largest score of each row: of the rest, or of the target column. Empty unless wanted."""
    if not want & Want.ARGMAX:
        return stats.new_empty(0)
    return stats[Stat.MAX].clone() if soft else torch.maximum(stats[Stat.MAX], stats[Stat.TARGET])


def coefficients(
    grad: Tensor,
    grad_top: Tensor | None,
    stats: Tensor,
    has_target: bool,
    soft: bool,
    temperature: Tensor | None,
    want: int,
) -> Tensor:
    """Upstream gradients [8, N] of the statistics -> the coefficients [7, N] of the gradient's terms.

    With E = E_p[z] - ref and p_j = (1 - p_y) pi_j off the target: dE/dz_j = p_j (1 + (z_j - ref) - E).
    """
    coef = torch.zeros(NUM_COEFS, stats.shape[1], dtype=stats.dtype, device=stats.device)
    own, rest = grad[Stat.TARGET], grad[Stat.LOGSUM]
    if want & Want.ENTROPY:
        g, mean = grad[Stat.MEAN], stats[Stat.MEAN]
        p_rest = torch.ones_like(g)
        if has_target and not soft:
            gap = stats[Stat.TARGET] - finite(stats[Stat.MAX])
            margin = gap - stats[Stat.LOGSUM]
            p_rest = torch.sigmoid(-margin)
            p_target = torch.sigmoid(margin)
            own = own + g * torch.where(p_target == 0, 0.0, p_target * (1 + gap - mean))
        coef[Coef.REST_Z] = g * p_rest
        rest = rest + g * p_rest * (1 - mean)
    coef[Coef.OWN], coef[Coef.REST] = own, rest
    if want & Want.SUM:
        coef[Coef.COLUMN] = grad[Stat.SUM]
    if want & Want.SUMSQ:
        coef[Coef.LINEAR] = 2 * grad[Stat.SUMSQ]
    if want & Want.TEMPERED and temperature is not None:
        coef[Coef.REST_T] = grad[Stat.LOGSUM_T] / temperature.to(stats.dtype)
    if want & Want.ARGMAX and grad_top is not None:
        coef[Coef.ARG] = grad_top
    return coef


def pack(
    stats: Tensor, top: Tensor, argmax: Tensor, target: Tensor | None, soft: bool, vocab: int, o: Options,
    column_weight: Tensor | None, temperature: Tensor | None = None, shape: torch.Size | None = None,
) -> RowStats:  # fmt: skip
    """RowStats over what the ops return."""
    return RowStats(
        stats, top, argmax, target, soft, vocab, Want(o.want), temperature, column_weight, o.ignore_index,
        torch.Size((stats.shape[1],)) if shape is None else shape,
    )  # fmt: skip
