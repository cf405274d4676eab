"""The terms contract once more, in float64 and plain torch, with gradients by autograd: what the Triton kernels must give.

Written from docs/design.md with the textbook's formula of each term; the package's reference is not used. Only the step from
upstream gradients to coefficients is the package's own: autograd here does not know it, so its mistakes would show too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.term_statistics import term_coefficients

ENTROPY, SUM, SUMSQ, ARGMAX, TEACHER, TEACHER_MEAN, SCORE_MEAN, TERM, SUBSET = 1, 2, 4, 16, 32, 64, 128, 256, 512
KL, MIXTURE, TOTAL_VARIATION, LOG_COSH, BCE_LOGITS, BCE = range(1, 7)
INF = math.inf


class Terms(NamedTuple):
    """The arguments of `row_terms` after the logits, in their order."""

    listed: Tensor | None = None
    teacher: Tensor | None = None
    value: Tensor | None = None
    subset: Tensor | None = None
    temperature: Tensor | None = None
    ignore_index: int = -100
    want: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    term: int = 0
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0

    def ids(self, n: int) -> Tensor:
        """[N, K] with -1 for what is absent."""
        ids = torch.empty(n, 0, dtype=torch.int64) if self.listed is None else self.listed
        return torch.where(ids == self.ignore_index, -1, ids.clamp(min=-1))

    def ignored(self, n: int) -> Tensor:
        given = self.listed is not None and self.listed.shape[1] > 0
        return self.listed[:, 0] == self.ignore_index if given else torch.zeros(n, dtype=torch.bool)


class Expected(NamedTuple):
    """Statistics [17 + K, N] in float64, differentiable but for the maxima; the largest score and its column; sizes of sums."""

    stats: Tensor
    argmax: Tensor
    top: Tensor
    size: Tensor


def _lse(x: Tensor) -> Tensor:
    """logsumexp of rows, -inf without a gradient where there is nothing."""
    some = (x > -INF).any(1)
    return torch.where(some, torch.logsumexp(torch.where(some[:, None], x, 0.0), 1), -INF)


def _max(x: Tensor) -> Tensor:
    return x.detach().amax(1)


def _ref(m: Tensor) -> Tensor:
    return torch.where(m == -INF, 0.0, m)


def _mean(weight: Tensor, x: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * torch.where(weight == 0, 0.0, x)).sum(1)


def gauss(p: Terms, v: int) -> tuple[Tensor, Tensor]:
    """(q, log of the denominator) by the normal distribution function, on the side of its smaller tail."""
    edges = p.a + p.b * torch.arange(v + 1, dtype=torch.float64)
    x = (edges - p.value.double().clamp(p.a, p.a + p.b * v)[:, None]) / p.c
    left, right = x[:, :-1], x[:, 1:]

    def cdf(x: Tensor) -> Tensor:
        return torch.erfc(-x / math.sqrt(2)) / 2

    mass = torch.where(left > 0, cdf(-left) - cdf(-right), cdf(right) - cdf(left))
    total = cdf(x[:, -1]) - cdf(x[:, 0])
    return mass / total[:, None], total.log()


def divergence(log_x: Tensor, log_y: Tensor) -> Tensor:
    """KL(x, y) of rows, 0 log 0 = 0."""
    return _mean(log_x.exp(), torch.where(log_x == -INF, 0.0, log_x) - log_y)


def mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log m. Where both are -inf autograd would make a NaN of it; e^-10000 is 0 too."""
    return torch.logaddexp(log_q.clamp(min=-1e4) + math.log(beta), log_p.clamp(min=-1e4) + math.log1p(-beta))


def term_sum(p: Terms, z: Tensor, t: Tensor, log_p: Tensor, log_q: Tensor, warm: Tensor) -> Tensor:
    if p.term in (KL, MIXTURE):
        first, second = log_p, log_q
        if p.term == MIXTURE:
            first = second = mixture(log_p, log_q, p.c)
        total = torch.zeros_like(log_p[:, 0])
        if p.a:
            total = total + p.a * divergence(log_q, first)
        return total + p.b * divergence(log_p, second) if p.b else total
    if p.term == TOTAL_VARIATION:
        return (log_p.exp() - log_q.exp()).abs().sum(1) / 2
    a, b = z / warm, t / warm
    if p.term == LOG_COSH:
        return torch.cosh((a - b) / 2).log().sum(1)
    y = torch.sigmoid(b) if p.term == BCE_LOGITS else t
    return F.binary_cross_entropy_with_logits(a, y.detach(), reduction="none").sum(1)


def slopes(p: Terms, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """sum f_a, sum f_b by autograd of the forms that the contract names, in independent a and b."""
    a, b = log_p.detach().requires_grad_(), log_q.detach().requires_grad_()
    first, second = a, b
    if p.term == MIXTURE:
        first = second = mixture(a, b, p.c)
    total = (a.exp() - b.exp()).abs().sum() / 2
    if p.term != TOTAL_VARIATION:
        total = p.a * divergence(b, first).sum() + p.b * divergence(a, second).sum()
    return tuple(g.sum(1) for g in torch.autograd.grad(total, (a, b)))


def expect(logits: Tensor, p: Terms) -> Expected:
    """`logits` are float64."""
    n, v = logits.shape
    z = logits * p.scale
    z = p.softcap * torch.tanh(z / p.softcap) if p.softcap else z
    ids = p.ids(n)
    inside = (ids >= 0) & (ids < v)
    warm = (torch.ones(n) if p.temperature is None else p.temperature).double()[:, None]
    t = (torch.zeros(1, v) if p.teacher is None else p.teacher).double().expand(n, v)
    zero = torch.zeros(n, dtype=torch.float64)
    rest = z.masked_fill((torch.arange(v) == ids[:, :, None]).any(1), -INF)
    top = _max(z)
    d = z - _ref(top)[:, None]
    rows = [zero] * 17
    rows[0], rows[1] = _max(rest), _lse(rest) - _ref(_max(rest))
    rows[2], rows[3] = top, _lse(z / warm) - _ref(top) / warm[:, 0]
    log_p = z / warm - _lse(z / warm)[:, None]
    share = log_p.exp()
    if p.want & ENTROPY:
        rows[4] = _mean(share, d)
    if p.want & SUM:
        rows[5] = d.sum(1)
    if p.want & SUMSQ:
        rows[6] = d.square().sum(1)
    log_q = t / warm - _lse(t / warm)[:, None]
    q = log_q.exp()
    d_t = t - _max(t)[:, None]
    if p.value is not None:
        q, rows[8] = gauss(p, v)
    elif p.want & (TEACHER | SCORE_MEAN) or (p.want & TERM and p.term < LOG_COSH):
        rows[7], rows[8] = _max(t), _lse(t / warm) - _max(t) / warm[:, 0]
    if p.want & TEACHER_MEAN:
        rows[7], rows[9] = _max(t), _mean(share, d_t)
    if p.want & SCORE_MEAN:
        rows[10] = _mean(q, d)
        rows[11] = zero if p.value is not None else _mean(q, d_t)
    if p.want & TERM:
        rows[12] = term_sum(p, z, t, log_p, log_q, warm)
        if p.term < LOG_COSH:
            rows[13], rows[14] = slopes(p, log_p, log_q)
    if p.want & SUBSET:
        chosen = z.masked_fill(~p.subset, -INF)
        rows[15], rows[16] = _max(chosen), _lse(chosen) - _ref(_max(chosen))
    picked = torch.where(inside, z.gather(1, torch.where(inside, ids, 0)), -INF)
    picked = torch.where(ids >= v, math.nan, picked)
    stats = torch.cat([torch.stack(rows), picked.T])
    ignored = p.ignored(n)
    largest, argmax = z.max(1)
    size = torch.where(d == -INF, 0.0, d.detach()).abs().sum(1)
    return Expected(torch.where(ignored, 0.0, stats), torch.where(ignored, -1, argmax), largest, size)


def check_stats(stats: Tensor, argmax: Tensor, e: Expected, p: Terms) -> None:
    """Each number to a few roundings of fp32, of the scores themselves, and of what it sums."""
    ref = e.stats.detach()
    assert stats.shape == ref.shape and stats.dtype == torch.float32
    height = torch.where(ref[2].abs() == INF, 0.0, ref[2].abs()) * (p.scale != 1 or p.softcap != 0)
    colder = 1.0 if p.temperature is None else (1 / p.temperature.double()).clamp(min=1.0)
    allowed = 4e-6 * (1 + ref.nan_to_num(0, 0, 0).abs() + height * colder)
    allowed[5:7] += 4e-6 * e.size
    got = stats.double()
    bad = ~((got == ref) | (got.isnan() & ref.isnan()) | ((got - ref).abs() <= allowed))
    if bad.any():
        k, i = (int(t) for t in bad.nonzero()[0])
        raise AssertionError(
            f"stats[{k}, {i}] is {got[k, i]:.9g}, expected {ref[k, i]:.9g}; {int(bad.sum())} are wrong"
        )
    if p.want & ARGMAX:
        assert torch.equal(argmax, e.argmax), f"argmax {argmax.tolist()}, expected {e.argmax.tolist()}"
    else:
        assert argmax.shape == (0,) and argmax.dtype == torch.int64


def random_loss(e: Expected, p: Terms) -> tuple[Tensor, Tensor]:
    """A random loss of the statistics that are there, and the coefficients [10 + K, N] that it has."""
    stats = e.stats.detach()
    weight = torch.randn(stats.shape, dtype=torch.float64) * stats.isfinite()
    weight[[0, 2, 7, 8, 11, 13, 14, 15]] = 0  # constants of the logits
    weight[6] *= 0.1
    top = torch.randn(stats.shape[1], dtype=torch.float64) * ((p.want & ARGMAX) != 0) * e.top.detach().isfinite()
    kept = torch.where(stats.isfinite(), e.stats, 0.0)
    loss = (weight * kept).sum() + (top * torch.where(e.top.isfinite(), e.top, 0.0)).sum()
    return loss, term_coefficients(weight, top, stats, p.temperature, p.want, p.term).float()


def expected_gradient(e: Expected, p: Terms, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """(coefficients, gradient of the logits) of a random loss."""
    n, v = leaf.shape
    loss, coef = random_loss(e, p)
    loss.backward()
    coef[:, p.ignored(n)] = torch.randn(coef.shape[0], 1)  # must not matter
    gradient = leaf.grad.masked_fill(p.ignored(n)[:, None], 0.0)
    return coef, gradient.masked_fill(((p.ids(n) >= v).any(1) & ~p.ignored(n))[:, None], torch.nan)
