"""`row_terms` in plain PyTorch: what runs where no kernel does, and what kernels are tested against.

docs/design.md, "The terms contract", says what every number is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .contract import Term, TermCoef, TermStat, Want
from .reference import INF, accumulator, finite, scores
from .registry import kernel

RAW = (Term.LOG_COSH, Term.BCE_LOGITS, Term.BCE)


def _log_sum(shifted: Tensor) -> Tensor:
    """log sum exp over the last dim of values <= 0, -inf allowed; -inf with zero gradient where there is nothing."""
    total = shifted.exp().sum(-1)
    some = total != 0
    return torch.where(some, torch.where(some, total, 1.0).log(), -INF)


def _listed(listed: Tensor | None, n: int, v: int, ignore_index: int, device: torch.device) -> tuple[Tensor, ...]:
    """(ids to index with [N, K], which are columns, which are out of range, rows that are ignored)."""
    if listed is None:
        listed = torch.empty(n, 0, dtype=torch.int64, device=device)
    absent = (listed < 0) | (listed == ignore_index)
    own = ~absent & (listed < v)
    ignored = (listed[:, 0] == ignore_index) if listed.shape[1] else torch.zeros(n, dtype=torch.bool, device=device)
    return torch.where(own, listed, 0), own, ~absent & ~own, ignored


def gauss_probabilities(value: Tensor, columns: int, low: float, width: float, sigma: float) -> tuple[Tensor, Tensor]:
    """(q [N, V], log of its denominator): a Gaussian around each value, cut to bins of one width (HL-Gauss)."""
    edges = low + width * torch.arange(columns + 1, dtype=value.dtype, device=value.device)
    v = value.clamp(low, low + width * columns)[:, None]
    x = (edges - v) / (sigma * math.sqrt(2.0))
    left, right = x[:, :-1], x[:, 1:]
    upper = left > 0  # on the far side of the mean 1 - erf keeps the digits that erf loses
    mass = torch.where(upper, torch.erfc(left) - torch.erfc(right), torch.erfc(-right) - torch.erfc(-left)) / 2
    total = mass.sum(-1, keepdim=True)
    return mass / total, total[:, 0].log()


def log_probabilities(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(max, logsum, log softmax(x / t)) of rows; max is a constant."""
    top = x.detach().amax(-1) if x.shape[-1] else x.new_full(x.shape[:-1], -INF)
    shifted = (x - finite(top)[:, None]) / t[:, None]
    logsum = _log_sum(shifted)
    return top, logsum, shifted - logsum[:, None]


def _product(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, 0 where weight is 0."""
    none = weight == 0
    return torch.where(none, 0.0, weight * torch.where(none, 0.0, x))


def _weighted(first: float, x: Tensor, second: float, y: Tensor) -> Tensor:
    """first x + second y; what has the factor 0 does not count, though it be infinite."""
    return (first * x if first else torch.zeros_like(x)) + (second * y if second else torch.zeros_like(y))


def _log_mixture(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """log(beta e^b + (1 - beta) e^a); -inf with zero gradient where both are, for which logaddexp's is NaN."""
    nothing = (a == -INF) & (b == -INF)
    a, b = (torch.where(nothing, 0.0, x) for x in (a, b))
    return torch.where(nothing, -INF, torch.logaddexp(b + math.log(beta), a + math.log1p(-beta)))


def term_function(term: int, a: Tensor, b: Tensor, t: Tensor, numbers: tuple[float, ...]) -> Tensor:
    """f(a_j, b_j) of every column, differentiable in a and b, in the form whose derivatives the contract names."""
    first, second, beta = numbers
    if term == Term.KL:
        return _weighted(first, _product(b.exp(), b - a), second, _product(a.exp(), a - b))
    if term == Term.MIXTURE:
        m = _log_mixture(a, b, beta)
        return _weighted(first, _product(b.exp(), b - m), second, _product(a.exp(), a - m))
    if term == Term.TOTAL_VARIATION:
        return (a.exp() - b.exp()).abs() / 2
    if term == Term.LOG_COSH:
        x = ((a - b) / 2).abs()
        return x + softplus(-2 * x) - math.log(2.0)
    if term == Term.BCE_LOGITS:
        return softplus(a) - _product(torch.sigmoid(b), a)
    if term == Term.BCE:
        return softplus(a) - _product(t, a)
    raise ValueError(f"unknown term {term}: one of {', '.join(f'{x.value} {x.name}' for x in Term)}")


def _slopes(term: int, a: Tensor, b: Tensor, t: Tensor, numbers: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(f_a, f_b) of every column."""
    first, second, beta = numbers
    p, q = a.exp(), b.exp()
    if term == Term.KL:
        u = a - b
        return _weighted(second, _product(p, u + 1), -first, q), _weighted(first, _product(q, 1 - u), -second, p)
    if term == Term.MIXTURE:
        m = _log_mixture(a, b, beta)
        share = first * q + second * p
        own, other = (a + math.log1p(-beta) - m).exp(), (b + math.log(beta) - m).exp()
        return (
            _weighted(second, _product(p, a - m + 1), -1.0, _product(share, own)),
            _weighted(first, _product(q, b - m + 1), -1.0, _product(share, other)),
        )
    if term == Term.TOTAL_VARIATION:
        sign = torch.sign(p - q) / 2
        return sign * p, -sign * q
    if term == Term.LOG_COSH:
        slope = torch.tanh((a - b) / 2) / 2
        return slope, -slope
    target = torch.sigmoid(b) if term == Term.BCE_LOGITS else t
    return torch.sigmoid(a) - target, torch.zeros_like(a)


def _inputs(
    logits: Tensor, listed: Tensor | None, teacher: Tensor | None, subset: Tensor | None, temperature: Tensor | None,
    ignore_index: int, scale: float, softcap: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    n, v = logits.shape
    column, own, bad, ignored = _listed(listed, n, v, ignore_index, logits.device)
    z = torch.where(ignored[:, None], 0.0, scores(logits, scale, softcap))
    warm = torch.ones_like(z[:, 0]) if temperature is None else temperature.to(z.dtype)
    is_listed = torch.zeros_like(z, dtype=torch.int64).scatter_add_(1, column, own.long()) > 0
    t = torch.zeros_like(z) if teacher is None else accumulator(teacher).to(z.dtype).expand(n, v)
    chosen = torch.zeros(v, dtype=torch.bool, device=z.device) if subset is None else subset.to(torch.bool)
    return column, own, bad, ignored, z, warm, is_listed, t, chosen


def terms(
    logits: Tensor, listed: Tensor | None, teacher: Tensor | None, value: Tensor | None, subset: Tensor | None,
    temperature: Tensor | None, ignore_index: int, want: int, scale: float, softcap: float, term: int, a: float,
    b: float, c: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(stats [17 + K, N], top, argmax), differentiable in logits and teacher; maxima are constants."""
    v = logits.shape[1]
    column, own, bad, ignored, z, warm, is_listed, t, chosen = _inputs(
        logits, listed, teacher, subset, temperature, ignore_index, scale, softcap
    )
    table: dict[int, Tensor] = {}
    rest = z.masked_fill(is_listed, -INF)
    one = torch.ones_like(warm)
    table[TermStat.REST_MAX], table[TermStat.REST_LOGSUM], _ = log_probabilities(rest, one)
    table[TermStat.MAX], table[TermStat.LOGSUM], log_p = log_probabilities(z, warm)
    p, gap = log_p.exp(), z - finite(table[TermStat.MAX])[:, None]
    if want & Want.ENTROPY:
        table[TermStat.MEAN] = _product(p, gap).sum(-1)
    if want & Want.SUM:
        table[TermStat.SUM] = gap.sum(-1)
    if want & Want.SUMSQ:
        table[TermStat.SUMSQ] = (gap * gap).sum(-1)
    teacher_gap = t - finite(t.detach().amax(-1) if v else one)[:, None]
    if want & Want.TEACHER_MEAN:
        table[TermStat.TEACHER_MAX] = t.detach().amax(-1)
        table[TermStat.TEACHER_MEAN] = _product(p, teacher_gap).sum(-1)
    if value is not None:
        q, table[TermStat.TEACHER_LOGSUM] = gauss_probabilities(value.to(z.dtype), v, a, b, c)
        log_q = q.log()
        table[TermStat.TEACHER_MAX] = torch.zeros_like(one)
    elif want & (Want.TEACHER | Want.SCORE_MEAN) or (want & Want.TERM and term not in RAW):
        table[TermStat.TEACHER_MAX], table[TermStat.TEACHER_LOGSUM], log_q = log_probabilities(t, warm)
        q = log_q.exp()
    if want & Want.SCORE_MEAN:
        table[TermStat.SCORE_MEAN] = _product(q, gap).sum(-1)
        if value is None:
            table[TermStat.TEACHER_OWN_MEAN] = _product(q, teacher_gap).sum(-1)
    if want & Want.TERM:
        raw = term in RAW
        left, right = (z / warm[:, None], t / warm[:, None]) if raw else (log_p, log_q)
        table[TermStat.TERM] = term_function(term, left, right, t, (a, b, c)).sum(-1)
        if not raw:
            f_a, f_b = _slopes(term, log_p.detach(), log_q.detach(), t, (a, b, c))
            table[TermStat.SLOPE], table[TermStat.TEACHER_SLOPE] = f_a.sum(-1), f_b.sum(-1)
    if want & Want.SUBSET:
        inside = z.masked_fill(~chosen, -INF)
        table[TermStat.SUBSET_MAX], table[TermStat.SUBSET_LOGSUM], _ = log_probabilities(inside, one)
    zero = torch.zeros_like(one)
    stats = torch.stack([table.get(i, zero) for i in range(TermStat.LISTED)])
    picked = torch.where(own, z.gather(1, column) if v else column.to(z.dtype), -INF)
    picked = torch.where(bad, math.nan, picked)
    stats = torch.where(ignored, 0.0, torch.cat([stats, picked.T]))
    top, argmax = z.new_empty(0), torch.empty(0, dtype=torch.int64, device=z.device)
    if want & Want.ARGMAX:
        top, argmax = z.max(-1)
        argmax = torch.where(ignored, -1, argmax)
    return stats, top, argmax


@kernel("row_terms", "reference")
def row_terms(
    logits: Tensor, listed: Tensor | None, teacher: Tensor | None, value: Tensor | None, subset: Tensor | None,
    temperature: Tensor | None, ignore_index: int, want: int, scale: float, softcap: float, term: int, a: float,
    b: float, c: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """stats [17 + K, N] and argmax [N] (empty unless wanted)."""
    with torch.no_grad():
        stats, _, argmax = terms(
            logits, listed, teacher, value, subset, temperature, ignore_index, want, scale, softcap, term, a, b, c
        )
    return stats, argmax


def _times(coefficient: Tensor, x: Tensor) -> Tensor:
    """coefficient * x, 0 where the coefficient is 0."""
    return _product(coefficient.expand_as(x), x)


@kernel("row_terms_backward", "reference")
def row_terms_backward(
    coef: Tensor, stats: Tensor, argmax: Tensor, logits: Tensor, listed: Tensor | None, teacher: Tensor | None,
    value: Tensor | None, subset: Tensor | None, temperature: Tensor | None, ignore_index: int, want: int,
    scale: float, softcap: float, term: int, a: float, b: float, c: float,
) -> Tensor:  # fmt: skip
    """dlogits [N, V] from ten coefficients a row and one for each listed column."""
    column, own, bad, ignored, z, warm, is_listed, t, chosen = _inputs(
        logits, listed, teacher, subset, temperature, ignore_index, scale, softcap
    )
    k, s = coef.to(z.dtype)[:, :, None], stats.to(z.dtype)[:, :, None]

    def shares(x: Tensor, top: Tensor, logsum: Tensor) -> Tensor:
        return torch.where(logsum == -INF, 0.0, (x - finite(top) - logsum).exp())

    w = warm[:, None]
    gap, log_p = z - finite(s[TermStat.MAX]), (z - finite(s[TermStat.MAX])) / w - s[TermStat.LOGSUM]
    teacher_gap = t - finite(s[TermStat.TEACHER_MAX])
    p = torch.where(s[TermStat.LOGSUM] == -INF, 0.0, log_p.exp())
    pi = shares(z, s[TermStat.REST_MAX], s[TermStat.REST_LOGSUM]).masked_fill(is_listed, 0.0)
    dz = _times(k[TermCoef.REST], pi) + _times(k[TermCoef.ALL], p)
    if want & Want.ENTROPY:
        dz = dz + _times(k[TermCoef.ALL_Z], _product(p, gap))
    if want & Want.TEACHER_MEAN:
        dz = dz + _times(k[TermCoef.ALL_T], _product(p, teacher_gap))
    if value is None:
        log_q = teacher_gap / w - s[TermStat.TEACHER_LOGSUM]
        q = log_q.exp()
    else:
        q, _ = gauss_probabilities(value.to(z.dtype), z.shape[1], a, b, c)
        log_q = q.log()
    if want & Want.SCORE_MEAN:
        dz = dz + _times(k[TermCoef.TEACHER], q)
    if want & Want.TERM:
        left, right = (z / w, t / w) if term in RAW else (log_p, log_q)
        dz = dz + _times(k[TermCoef.TERM], _slopes(term, left, right, t, (a, b, c))[0])
    if want & Want.SUBSET:
        inside = shares(z, s[TermStat.SUBSET_MAX], s[TermStat.SUBSET_LOGSUM])
        dz = dz + _times(k[TermCoef.SUBSET], torch.where(chosen, inside, 0.0))
    if want & Want.SUM:
        dz = dz + k[TermCoef.COLUMN]
    if want & Want.SUMSQ:
        dz = dz + _times(k[TermCoef.LINEAR], gap)
    if want & Want.ARGMAX:
        dz = dz.scatter_add(1, argmax.clamp(min=0)[:, None], k[TermCoef.ARG])
    if column.shape[1]:
        dz = dz.scatter_add(1, column, torch.where(own, k[TermCoef.LISTED :, :, 0].T, 0.0))
    if softcap:
        dz = dz * (1 - (z / softcap) ** 2)
    dz = torch.where(bad.any(1)[:, None], math.nan, dz)
    return (torch.where(ignored[:, None], 0.0, dz) * scale).to(logits.dtype)
