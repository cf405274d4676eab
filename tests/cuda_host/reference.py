"""The row contract in float64 numpy, from docs/design.md and not from a kernel; each number with the size of its terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ENTROPY, SUM, SUMSQ, TEMPERED, ARGMAX = 1, 2, 4, 8, 16
INF = np.inf


@dataclass
class Row:
    """One row as the kernel sees it, in float64. target None: no target column."""

    logits: Array
    target: int | None
    prob: Array | None
    weight: Array
    temperature: float
    want: int
    scale: float
    softcap: float

    @property
    def z(self) -> Array:
        if self.softcap == 0:
            return self.scale * self.logits
        return self.softcap * np.tanh(self.scale * self.logits / self.softcap)

    @property
    def out_of_range(self) -> bool:
        return self.target is not None and not 0 <= self.target < len(self.logits)

    @property
    def own(self) -> NDArray[np.bool_]:
        """Which column is the target's: none if there is no valid one."""
        return np.arange(len(self.logits)) == (-1 if self.target is None or self.out_of_range else self.target)


def log_sum(x: Array) -> float:
    """log sum e^x with the max taken out; NaN and +inf make NaN."""
    if len(x) == 0 or np.all(x == -INF):
        return -INF
    return float(np.max(x) + np.log(np.sum(np.exp(x - np.max(x)))))


def statistics(row: Row) -> tuple[Array, Array]:
    """The eight statistics, and how large the terms are that each is a sum of."""
    z, rest, own = row.z, row.z[~row.own], row.own
    top = float(np.max(rest)) if len(rest) else -INF
    ref = 0.0 if top == -INF else top
    x = z - ref
    stats, size = np.zeros(8), np.zeros(8)
    stats[0], size[0] = top, abs(top)
    stats[1], size[1] = log_sum(rest - ref), 1 + np.log(len(z) + 1)
    if row.prob is not None:
        q = row.prob * row.weight
        stats[2], size[2] = np.sum(q * x), np.sum(np.abs(q * x))
        stats[7], size[7] = np.sum(q), np.sum(np.abs(q))
    elif row.target is None:
        stats[2] = -INF
    else:
        stats[2] = np.nan if row.out_of_range else z[own][0]
        size[2] = abs(stats[2])
    if row.want & ENTROPY:
        p = np.exp(z - log_sum(z)) if np.any(z > -INF) or np.any(np.isnan(z)) else np.zeros_like(z)
        part = np.where(z == -INF, 0, p * np.where(z == -INF, 0, x))
        stats[3], size[3] = np.sum(part), np.sum(np.abs(part))
    if row.want & SUM:
        stats[4], size[4] = np.sum(row.weight * x), np.sum(np.abs(row.weight * x))
    if row.want & SUMSQ:
        stats[5], size[5] = np.sum(x * x), np.sum(x * x)
    if row.want & TEMPERED:
        stats[6], size[6] = log_sum((rest - ref) / row.temperature), 1 + np.log(len(z) + 1) + abs(1 / row.temperature)
    return stats, size


def chain(row: Row, dz: Array) -> Array:
    """dl from dz."""
    return dz * row.scale * (1 if row.softcap == 0 else 1 - (row.z / row.softcap) ** 2)


def exponentials(row: Row, top: float, logsum: float, temperature: float = 1) -> Array:
    """What is pi_j at temperature 1: 0 on the target, and everywhere if nothing is left."""
    ref = 0.0 if top == -INF else top
    with np.errstate(all="ignore"):
        e = np.exp((row.z - ref) / temperature - logsum)
    return np.where(row.own | (logsum == -INF), 0, e)


def gradient(row: Row, coef: Array, stats: Array, argmax: int) -> tuple[Array, Array]:
    """dl from seven coefficients and the statistics of a forward, and the size of its terms."""
    if row.out_of_range:
        return np.full_like(row.z, np.nan), np.ones_like(row.z)
    own, rest, rest_z, column, linear, rest_t, arg = coef
    x = row.z - (0.0 if stats[0] == -INF else stats[0])
    pi = exponentials(row, stats[0], stats[1])
    terms = [pi * rest, own * (row.own if row.prob is None else row.prob * row.weight)]
    if row.want & ENTROPY:
        terms.append(np.where(pi == 0, 0, pi * rest_z * np.where(pi == 0, 0, x)))
    if row.want & SUM:
        terms.append(column * row.weight)
    if row.want & SUMSQ:
        terms.append(linear * x)
    if row.want & TEMPERED:
        terms.append(rest_t * exponentials(row, stats[0], stats[6], row.temperature))
    if row.want & ARGMAX:
        terms.append(arg * (np.arange(len(x)) == argmax))
    return chain(row, sum(terms)), chain(row, sum(np.abs(t) for t in terms))


def cross_entropy_gradient(row: Row, epilogue: Array) -> tuple[Array, Array]:
    """dl of b nll + e lse + t lse^2 + s sum c z by the textbook formula, and the size of the margin form's terms."""
    if row.out_of_range:
        return np.full_like(row.z, np.nan), np.ones_like(row.z)
    b, e, t, s = epilogue
    z = row.z
    lse = log_sum(z)
    p = np.exp(z - lse) if lse > -INF else np.full_like(z, np.nan if row.prob is None and row.target is not None else 0)
    mass = 0.0 if row.prob is None else float(np.sum(row.prob * row.weight))
    hard = row.prob is None and row.target is not None
    one = row.own if row.prob is None else row.prob * row.weight
    h = e + 2 * t * lse
    h_size = abs(e) + abs(2 * t * lse)
    if hard:  # p - 1 at the target, without the cancellation
        others = np.exp(log_sum(z[~row.own]) - lse)
        terms = [h * p, b * np.where(row.own, -others, p)]
        size = [h_size * np.where(row.own, 1, p), np.abs(b * np.where(row.own, others, p))]
    else:
        terms = [(b * mass + h) * p, -b * one]
        size = [(np.abs(b) * mass + h_size) * p, np.abs(b * one)]
    if row.want & SUM:
        terms.append(s * row.weight)
        size.append(np.abs(s * row.weight))
    return chain(row, sum(terms)), chain(row, sum(size))


def margin_loss(loss: int, a: float, b: float, d: complex) -> Any:
    """phi(d), the losses of csrc/margin_loss.h by their numbers, d complex."""
    p, nll, miss = 1 / (1 + np.exp(-d)), np.log1p(np.exp(-d)), 1 / (1 + np.exp(d))
    return [
        lambda: nll,
        lambda: np.exp((1 - a) * nll) / (1 - a),
        lambda: -np.exp(-a * nll) / a if p.real > b else 0 * d,
        lambda: miss**a * nll,
        lambda: np.log1p(np.exp(d)),
        lambda: (1 - a) * nll + a * b * miss,
        lambda: (a - p) ** b / b,
        lambda: -((a + p) ** b) / b,
        lambda: b * np.log1p(np.exp(a - d)),
    ][loss]()


def margin_slope(loss: int, a: float, b: float, d: float) -> float:
    """phi'(d) by a step in the imaginary direction, which costs no digits; comp-sum losses go straight on from `b`."""
    if np.isnan(d) or d == INF:
        return float(d) if np.isnan(d) else 0.0
    if loss == 1 and (1 - a) * np.logaddexp(0, -d) > b:
        return float(-np.exp(b) / (1 + np.exp(d)))
    if loss == 9:  # -log(1 - (1 - p)^a): numpy's complex log1p has no small results
        d = max(d, -600)
        log_p, log_miss = -np.logaddexp(0, -d), -np.logaddexp(0, d)
        return float(a * np.exp(log_p + a * log_miss) / np.expm1(a * log_miss))
    return float(np.imag(margin_loss(loss, a, b, complex(np.clip(d, -250, 250), 1e-20))) / 1e-20)


def margin_gradient(row: Row, epilogue: Array, loss: tuple[int, float, float]) -> tuple[Array, Array]:
    """dl of b phi(d) + s sum c z, phi a loss of the margin d, and the size of its terms."""
    if row.out_of_range:
        return np.full_like(row.z, np.nan), np.ones_like(row.z)
    z, rest = row.z, row.z[~row.own]
    top = float(np.max(rest)) if len(rest) else -INF
    logsum = log_sum(rest - (0 if top == -INF else top))
    target = float(z[row.own][0])
    own = epilogue[0] * margin_slope(*loss, np.nan if logsum == target == -INF else target - (log_sum(rest)))
    terms = [own * row.own, np.where(row.own, 0, -own) * exponentials(row, top, logsum)]
    if row.want & SUM:
        terms.append(epilogue[3] * row.weight)
    return chain(row, sum(terms)), chain(row, sum(np.abs(t) for t in terms))
