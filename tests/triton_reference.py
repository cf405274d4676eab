"""The row contract once more, in float64 and plain torch, with gradients by autograd: what the Triton kernels must give.

Written from docs/design.md alone; the package's own reference is not used, so that one mistake cannot pass twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ENTROPY, SUM, SUMSQ, TEMPERED, ARGMAX = 1, 2, 4, 8, 16
INF = torch.inf


class Problem(NamedTuple):
    """The arguments that all row ops share, in their order."""

    target: Tensor | None = None
    prob: Tensor | None = None
    column_weight: Tensor | None = None
    temperature: Tensor | None = None
    ignore_index: int = -100
    want: int = 0
    scale: float = 1.0
    softcap: float = 0.0

    def rows(self, n: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
        """(one-hot of the target, ignored rows, rows with a class that does not exist)."""
        if self.target is None:
            no = torch.zeros(n, dtype=torch.bool)
            return torch.zeros(n, v, dtype=torch.bool), no, no
        ignored = self.target == self.ignore_index
        bad = ~ignored & ((self.target < 0) | (self.target >= v))
        own = (torch.arange(v) == self.target[:, None]) & ~ignored[:, None]
        return own, ignored, bad


class Expected(NamedTuple):
    """Statistics [8, N] in float64, differentiable but for `max`; argmax; and how large the summed terms were."""

    stats: Tensor
    argmax: Tensor
    top: Tensor
    lse: Tensor
    size: Tensor


def scores(logits: Tensor, p: Problem) -> Tensor:
    z = logits * p.scale
    return p.softcap * torch.tanh(z / p.softcap) if p.softcap else z


def expect(logits: Tensor, p: Problem) -> Expected:
    """`logits` are float64."""
    n, v = logits.shape
    own, ignored, bad = p.rows(n, v)
    z = scores(logits, p)
    other = z.masked_fill(own, -INF)
    m = other.detach().amax(1)
    ref = torch.where(m == -INF, 0.0, m)
    d = z - ref[:, None]
    some = (other > -INF).any(1)
    logsum = torch.where(some, _lse(other - ref[:, None], some), -INF)
    weight = torch.ones(v, dtype=torch.float64) if p.column_weight is None else p.column_weight.double()
    mass = torch.zeros(n, dtype=torch.float64)
    if p.prob is not None:
        q = p.prob.double() * weight
        picked, mass = (q * d).sum(1), q.sum(1)
    elif p.target is None:
        picked = torch.full((n,), -INF, dtype=torch.float64)
    else:
        picked = torch.where(bad, torch.nan, torch.where(own, z, 0.0).sum(1))
    zero = torch.zeros(n, dtype=torch.float64)
    mean = total = squares = tempered = zero
    probability = torch.softmax(torch.where((z > -INF).any(1)[:, None], z, 0.0), 1)  # NaN gradient of a row of -inf
    if p.want & ENTROPY:
        finite = torch.where(z == -INF, 0.0, d)
        mean = torch.where(z == -INF, 0.0, probability * finite).sum(1)
    if p.want & SUM:
        total = (weight * d).sum(1)
    if p.want & SUMSQ:
        squares = (d * d).sum(1)
    if p.want & TEMPERED:
        warm = (other - ref[:, None]) / p.temperature.double()[:, None]
        tempered = torch.where(some, _lse(warm, some), -INF)
    stats = torch.stack([m, logsum, picked, mean, total, squares, tempered, mass])
    top, argmax = z.max(1)
    size = (weight * d).abs().sum(1).detach()
    return Expected(
        torch.where(ignored, 0.0, stats), torch.where(ignored, -1, argmax), top, torch.logsumexp(z, 1), size
    )


def _lse(x: Tensor, some: Tensor) -> Tensor:
    """logsumexp whose gradient on a row without any term is 0, not NaN."""
    return torch.logsumexp(torch.where(some[:, None], x, 0.0), 1)


def check_stats(
    stats: Tensor, argmax: Tensor, e: Expected, p: Problem, slack: float = 1.0, logits: float = 0.0
) -> None:
    """Each number to a few roundings of fp32 of the terms it is made of, and of `logits` that were computed themselves."""
    ref = e.stats.detach()
    base = torch.where(ref[0] == -INF, 0.0, ref[0]).abs()
    unit = 2e-6 * slack * torch.ones_like(base)
    span = torch.nan_to_num(e.size, 0.0, 0.0, 0.0)
    allowed = torch.stack(
        [
            unit * base * (1.0 if p.softcap else 0.1),
            unit * (1 + base * (p.scale != 1 or p.softcap != 0)),
            unit * torch.where(torch.tensor(p.prob is None), ref[2].abs().nan_to_num(0, 0, 0) + logits, 1 + span),
            2 * unit * (1 + ref[3].abs()),
            unit * (1 + span),
            2 * unit * (1 + ref[5].nan_to_num(0, 0, 0).abs()),
            unit * (1 + ref[6].abs().nan_to_num(0, 0, 0)) * 4,
            unit * (1 + ref[7].abs()),
        ]
    )
    got = stats.double()
    same = (got == ref) | (got.isnan() & ref.isnan())
    bad = ~(same | ((got - ref).abs() <= allowed))
    if bad.any():
        k, i = (int(t) for t in bad.nonzero()[0])
        raise AssertionError(
            f"stats[{k}, {i}] is {got[k, i]:.9g}, expected {ref[k, i]:.9g}; {int(bad.sum())} numbers are wrong"
        )
    if p.want & ARGMAX:
        assert torch.equal(argmax, e.argmax), f"argmax {argmax.tolist()}, expected {e.argmax.tolist()}"
    else:
        assert argmax.shape == (0,) and argmax.dtype == torch.int64


def combine(e: Expected, p: Problem, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A random loss of the statistics, and the coefficients [7, N] that the contract gives it."""
    n = e.stats.shape[1]
    g = weights.double()
    ref = e.stats[0].detach()
    ref = torch.where(ref == -INF, 0.0, ref)
    some = e.stats[1].detach() > -INF
    has = torch.zeros(n, dtype=torch.bool) if p.target is None else e.stats[2].detach() > -INF
    loss = (g[1] * torch.where(some, e.stats[1], 0.0)).sum()
    coef = torch.zeros(7, n, dtype=torch.float64)
    coef[1] = g[1]
    if p.prob is not None or p.target is not None:
        coef[0] = torch.where(e.stats[2].detach() == -INF, 0.0, g[0])
        loss = loss + (g[0] * torch.where(e.stats[2] > -INF, e.stats[2], 0.0)).sum()
    if p.want & ENTROPY:
        mean, logsum, picked = e.stats[3].detach(), e.stats[1].detach(), e.stats[2].detach()
        margin = torch.where(has, picked - ref - logsum, -INF)
        own, rest = torch.sigmoid(margin), torch.sigmoid(-margin)
        loss = loss + (g[2] * e.stats[3]).sum()
        if p.prob is None:
            coef[0] += g[2] * torch.where(has, own * (1 + picked - ref - mean), 0.0)
        coef[1] += g[2] * rest * (1 - mean)
        coef[2] = g[2] * rest
    if p.want & SUM:
        coef[3] = g[3]
        loss = loss + (g[3] * e.stats[4]).sum()
    if p.want & SUMSQ:
        coef[4] = 2 * g[4] * 0.1
        loss = loss + (g[4] * 0.1 * e.stats[5]).sum()
    if p.want & TEMPERED:
        coef[5] = g[5] / p.temperature.double()
        loss = loss + (g[5] * torch.where(some, e.stats[6], 0.0)).sum()
    if p.want & ARGMAX:
        coef[6] = g[6]
        loss = loss + (g[6] * e.top).sum()
    return loss, coef.float()


# bfloat16: a whole unit, because Triton's interpreter truncates where the GPU rounds.
ROUNDING = {torch.float32: 4e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}


def check_gradient(ours: Tensor, ref: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Each element to the rounding of its dtype and of its row; NaN where the reference has NaN; whole rows to relative L2."""
    a, r = ours.double(), ref.double()
    assert a.shape == r.shape, f"shape {tuple(a.shape)}, expected {tuple(r.shape)}"
    assert torch.equal(a.isnan(), r.isnan()), "NaN at the wrong places"
    a, r = a.nan_to_num(0.0), r.nan_to_num(0.0)
    largest = r.abs().amax(-1, keepdim=True) if r.numel() else r
    tolerance = ROUNDING[dtype] * slack
    bad = (a - r).abs() > tolerance * r.abs() + 4e-6 * slack * largest + 6e-8 * (dtype == torch.float16)
    assert not bad.any(), f"{int(bad.sum())} of {bad.numel()} wrong, first at {bad.nonzero()[0].tolist()}"
    assert (a - r).norm() <= tolerance * r.norm() + 1e-12, f"relative L2 {(a - r).norm() / r.norm():.3g}"
    assert (a.abs().amax(-1) > 0)[largest[..., 0] > 1e-3 * r.abs().max()].all(), "a row that should move is zero"
