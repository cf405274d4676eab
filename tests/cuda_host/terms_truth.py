"""The terms contract in float64 numpy, from docs/design.md and not from a kernel; each number with the size of its terms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reference import ARGMAX, ENTROPY, INF, SUM, SUMSQ, Array, log_sum

TEACHER, TEACHER_MEAN, SCORE_MEAN, TERM, SUBSET = 32, 64, 128, 256, 512
KL, MIXTURE, TOTAL_VARIATION, LOG_COSH, BCE_LOGITS, BCE = range(1, 7)
RAW = (LOG_COSH, BCE_LOGITS, BCE)
STAT_NAMES = (
    "rest_max rest_logsum max logsum mean sum sumsq teacher_max teacher_logsum teacher_mean score_mean own_mean term "
    "slope teacher_slope subset_max subset_logsum"
).split()
erf, erfc = np.vectorize(math.erf, otypes=[float]), np.vectorize(math.erfc, otypes=[float])


@dataclass
class Row:
    """One row as the kernel sees it, in float64. value or teacher may be None."""

    logits: Array
    listed: NDArray[np.int64]  # k ids
    teacher: Array | None
    value: float | None
    subset: NDArray[np.bool_] | None
    temperature: float
    ignore_index: int
    want: int
    scale: float
    softcap: float
    term: int
    a: float
    b: float
    c: float

    @property
    def z(self) -> Array:
        if self.softcap == 0:
            return self.scale * self.logits
        return self.softcap * np.tanh(self.scale * self.logits / self.softcap)

    @property
    def t(self) -> Array:
        return np.zeros_like(self.logits) if self.teacher is None else self.teacher

    @property
    def is_listed(self) -> NDArray[np.bool_]:
        return np.isin(np.arange(len(self.logits)), [i for i in self.listed if i != self.ignore_index])

    @property
    def bad(self) -> bool:
        return any(i >= len(self.logits) and i != self.ignore_index for i in self.listed)

    @property
    def ignored(self) -> bool:
        return len(self.listed) > 0 and int(self.listed[0]) == self.ignore_index

    @property
    def needs_q(self) -> bool:
        return bool(self.want & (TEACHER | SCORE_MEAN)) or (bool(self.want & TERM) and self.term not in RAW)

    def generated(self) -> tuple[Array, float]:
        """HL-Gauss: (q, the mass of the Gaussian inside)."""
        edges = self.a + self.b * np.arange(len(self.logits) + 1)
        x = (edges - min(max(float(self.value or 0), edges[0]), edges[-1])) / (self.c * math.sqrt(2))
        far = x[:-1] > 0
        mass = np.where(far, erfc(x[:-1]) - erfc(x[1:]), erfc(-x[1:]) - erfc(-x[:-1])) / 2
        whole = float(erf(x[-1:])[0] - erf(x[:1])[0]) / 2
        return mass / whole, whole

    @property
    def undefined(self) -> bool:
        """The term is a function of log-probabilities, and there are none: all scores are -inf."""
        if not self.want & TERM or self.term in RAW or self.ignored:
            return False
        return bool(np.all(self.z == -INF)) or (self.value is None and bool(np.all(self.t == -INF)))

    def log_q(self) -> Array:
        if self.value is not None:
            return np.log(self.generated()[0])
        return log_softmax(self.t / self.temperature)

    def q(self) -> Array:
        """0 everywhere where there is nothing, as p."""
        none = self.value is None and np.all(self.t == -INF)
        return np.zeros_like(self.t) if none else np.exp(self.log_q())


def log_softmax(x: Array) -> Array:
    return x - log_sum(x)


def finite(x: float) -> float:
    return 0.0 if x == -INF else x


def times(weight: Any, x: Any) -> Any:
    """weight x, 0 where weight is 0."""
    return np.where(weight == 0, 0, weight * np.where(weight == 0, 0, x))


def term_of(row: Row, what: str) -> tuple[Array, Array]:
    """(f, f_a or f_b of every column, the size of what cancels in it)."""
    T, p, q = row.temperature, np.exp(log_softmax(row.z / row.temperature)), np.zeros_like(row.z)
    if row.term in RAW:
        a, b = row.z / T, row.t / T
    else:
        a, b = log_softmax(row.z / T), row.log_q()
        q = np.exp(b)
    A, B, beta = row.a, row.b, row.c
    if row.term == KL:
        u = a - b
        into, out = times(q, -u), times(p, u)  # q log(q/p), p log(p/q)
        value = {
            "f": times(A, p - q + into) + times(B, q - p + out),
            "f_a": times(B, out + p) - A * q,
            "f_b": times(A, into + q) - B * p,
        }
        size = times(abs(A), p + q + np.abs(into)) + times(abs(B), p + q + np.abs(out))
    elif row.term == MIXTURE:
        m = beta * q + (1 - beta) * p
        some = np.where(m == 0, 1, m)
        into, out = times(q, b - np.log(some)), times(p, a - np.log(some))
        pull = np.where(m == 0, 0, (A * q + B * p) / some)
        value = {
            "f": A * (m - q + into) + B * (m - p + out),
            "f_a": B * (out + p) - pull * (1 - beta) * p,
            "f_b": A * (into + q) - pull * beta * q,
        }
        size = abs(A) * (m + q + np.abs(into)) + abs(B) * (m + p + np.abs(out)) + np.abs(pull) * m
    elif row.term == TOTAL_VARIATION:
        value = {"f": np.abs(p - q) / 2, "f_a": np.sign(p - q) * p / 2, "f_b": np.sign(q - p) * q / 2}
        size = p + q
    elif row.term == LOG_COSH:
        x = np.abs(a - b) / 2
        slope = np.tanh((a - b) / 2) / 2
        value = {"f": x + np.log1p(np.exp(-2 * x)) - math.log(2), "f_a": slope, "f_b": -slope}
        size = np.abs(a) + np.abs(b)
    else:
        target = 1 / (1 + np.exp(-b)) if row.term == BCE_LOGITS else row.t
        value = {"f": np.logaddexp(0, a) - times(target, a), "f_a": 1 / (1 + np.exp(-a)) - target, "f_b": 0 * a}
        size = np.logaddexp(0, a) + np.abs(times(target, a)) + 1 + np.abs(target)
    return value[what], size


def maximum(x: Array) -> float:
    return float(np.max(x)) if len(x) else -INF


def statistics(row: Row) -> tuple[Array, Array]:
    """The statistics [17 + K], and how large the terms are that each is a sum of."""
    z, t, T, want = row.z, row.t, row.temperature, row.want
    stats, size = np.zeros(17 + len(row.listed)), np.zeros(17 + len(row.listed))
    if row.ignored:
        return stats, size
    rest = z[~row.is_listed]
    one = 1 + math.log(len(z) + 1)
    top = maximum(z)
    gap, t_gap = z - finite(top), t - finite(maximum(t))
    p = np.zeros_like(z) if np.all(z == -INF) else np.exp(log_softmax(z / T))

    def put(at: int, value: Any, scale: Any) -> None:
        stats[at], size[at] = value, scale

    def put_sum(at: int, terms: Array) -> None:
        put(at, np.sum(terms), np.sum(np.abs(terms)))

    put(0, maximum(rest), 0)
    put(1, log_sum(rest - finite(maximum(rest))), one)
    put(2, top, 0)
    put(3, log_sum(gap / T), one / min(1, T))
    if want & ENTROPY:
        put_sum(4, times(p, gap))
    if want & SUM:
        put_sum(5, gap)
    if want & SUMSQ:
        put_sum(6, gap * gap)
    if want & TEACHER_MEAN:
        put(7, maximum(t), 0)
        put_sum(9, times(p, t_gap))
    if row.needs_q:
        if row.value is not None:
            put(7, 0, 0)
            put(8, math.log(row.generated()[1]), 1)
        else:
            put(7, maximum(t), 0)
            put(8, log_sum(t_gap / T), one / min(1, T))
    if want & SCORE_MEAN:
        q = row.q()
        put_sum(10, times(q, gap))
        put_sum(11, times(q, t_gap))
    if want & TERM:
        for at, what in enumerate(("f", "f_a", "f_b")[: 1 if row.term in RAW else 3]):
            terms, scale = term_of(row, what)
            put(12 + at, np.sum(terms), np.sum(scale))
        if row.undefined:
            stats[12] = np.nan
    if row.subset is not None and want & SUBSET:
        inside = z[row.subset]
        put(15, maximum(inside), 0)
        put(16, log_sum(inside - finite(maximum(inside))), one)
    for k, i in enumerate(row.listed):
        absent = i < 0 or i == row.ignore_index
        stats[17 + k] = -INF if absent else np.nan if i >= len(z) else z[i]
    return stats, size


def gradient(row: Row, coef: Array, stats: Array, argmax: int) -> tuple[Array, Array]:
    """dl from coefficients [10 + K], and the size of its terms."""
    z, t, T, want = row.z, row.t, row.temperature, row.want
    if row.ignored:
        return np.zeros_like(z), np.zeros_like(z)
    if row.bad:
        return np.full_like(z, np.nan), np.zeros_like(z)
    rest, every, all_z, all_t, teacher, term, subset, column, linear, arg = coef[:10]

    def softmax(x: Array, inside: NDArray[np.bool_]) -> Array:
        kept = np.where(inside, x, -INF)
        return np.zeros_like(x) if np.all(kept == -INF) else np.exp(log_softmax(kept))

    everything = np.ones(len(z), bool)
    p, gap, t_gap = softmax(z / T, everything), z - finite(maximum(z)), t - finite(maximum(t))
    terms = [rest * softmax(z, ~row.is_listed), every * p]
    if want & ENTROPY:
        terms.append(all_z * times(p, gap))
    if want & TEACHER_MEAN:
        terms.append(all_t * times(p, t_gap))
    if want & SCORE_MEAN:
        terms.append(teacher * row.q())
    if want & SUBSET and row.subset is not None:
        terms.append(subset * softmax(z, row.subset))
    if want & SUM:
        terms.append(column + 0 * p)
    if want & SUMSQ:
        terms.append(linear * gap)
    if want & ARGMAX:
        terms.append(arg * (np.arange(len(z)) == argmax))
    for k, i in enumerate(row.listed):
        if i >= 0 and i != row.ignore_index:
            terms.append(coef[10 + k] * (np.arange(len(z)) == i))
    dz, size = sum(terms), sum(np.abs(x) for x in terms)
    if want & TERM:
        slope, scale = term_of(row, "f_a")
        dz, size = dz + term * slope + (np.nan if row.undefined else 0), size + np.abs(term) * scale
    chain = row.scale * (1 if row.softcap == 0 else 1 - (z / row.softcap) ** 2)
    return dz * chain, size * np.abs(chain)
