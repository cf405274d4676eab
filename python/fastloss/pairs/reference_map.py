"""`pair_map` and `pair_histogram` in plain PyTorch, a block of rows at a time; `map_table` and `histogram`, of the whole
matrix, are differentiable, also twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract import NUM_PAIR_MAP_STATS, PairFunction, PairMapStat
from ..registry import kernel
from .pairing import Pairing
from .scores import Gradients, Scores, blocks, scores, split


def _apply(function: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(phi(x), phi'(x))."""
    if function == PairFunction.SOFTPLUS:  # F.softplus is linear beyond its threshold, in float64 too
        return torch.logaddexp(x, torch.zeros_like(x)), torch.sigmoid(x)
    if function == PairFunction.HINGE:
        return x.clamp(min=0), torch.where(x.isnan(), x, (x > 0).to(x.dtype))
    if function == PairFunction.SQUARED_HINGE:
        return x.clamp(min=0).square(), 2 * x.clamp(min=0)
    if function == PairFunction.SIGMOID:
        return torch.sigmoid(x), torch.sigmoid(x) * torch.sigmoid(-x)
    raise ValueError(f"unknown pair function {function}: one of {[f.name for f in PairFunction]}")


def _arguments(s: Scores, neg_threshold: Tensor | None, pos_threshold: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = slice(s.start, s.stop)
    below = s.z if neg_threshold is None else s.z - neg_threshold[rows, None].to(s.z.dtype)
    above = -s.z if pos_threshold is None else pos_threshold[rows, None].to(s.z.dtype) - s.z
    return below, above


def _map_rows(s: Scores, neg_threshold: Tensor | None, pos_threshold: Tensor | None, function: int) -> Tensor:
    below, above = _arguments(s, neg_threshold, pos_threshold)
    out: list[Tensor] = [below.new_zeros(())] * NUM_PAIR_MAP_STATS
    for offset, x, member in ((0, below, s.negative), (1, above, s.positive)):
        value, slope = _apply(function, x)
        for row, number in (
            (PairMapStat.NEG, value),
            (PairMapStat.NEG_SLOPE, slope.detach()),
            (PairMapStat.NEG_ACTIVE, (x >= 0).to(x.dtype)),
            (PairMapStat.NEG_COUNT, torch.ones_like(x)),
        ):
            out[row + offset] = torch.where(member, number, 0.0).sum(1)
    return torch.stack(out)


def map_table(p: Pairing, neg_threshold: Tensor | None, pos_threshold: Tensor | None, function: int) -> Tensor:
    """The table [8, M] from the whole matrix at once, differentiable in its first two rows."""
    return _map_rows(scores(p, 0, p.shape[0]), neg_threshold, pos_threshold, function)


@kernel("pair_map", "reference")
@torch.no_grad()
def pair_map(*args: Any) -> Tensor:
    """The table [8, M] of docs/design.md."""
    p, (neg_threshold, pos_threshold, function) = split(args)
    parts = [_map_rows(s, neg_threshold, pos_threshold, function) for s in blocks(p)]
    return torch.cat(parts, 1) if parts else p.q.new_zeros((NUM_PAIR_MAP_STATS, 0), dtype=p.statistic_dtype)


@kernel("pair_map_backward", "reference")
@torch.no_grad()
def pair_map_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, drow_scale, dcolumn_scale)."""
    p, (neg_threshold, pos_threshold, function, needs) = split(args)
    total = Gradients(p, needs)
    for s in blocks(p):
        below, above = _arguments(s, neg_threshold, pos_threshold)
        g = grad[:, s.start : s.stop, None].to(s.z.dtype)
        negative = g[PairMapStat.NEG] * _apply(function, below)[1]
        positive = -g[PairMapStat.POS] * _apply(function, above)[1]
        total.add(s, torch.where(s.negative, negative, torch.where(s.positive, positive, 0.0)))
    return total.result()


# ---------------------------------------------------------------------------------------------- pair_histogram


def _bins(s: Scores, bins: int, first: float, step: float) -> tuple[Tensor, Tensor]:
    """(lower bin, share of the next) of each pair, the share differentiable where z is inside the range."""
    y = ((s.z - first) / step).clamp(0, bins - 1)
    known = ~y.isnan()
    lower = torch.where(known, y, 0.0).detach().floor().clamp(max=bins - 2).long()
    return lower, y - lower


def _histogram_rows(s: Scores, bins: int, first: float, step: float) -> Tensor:
    lower, upper_share = _bins(s, bins, first, step)
    table = []
    for member in (s.negative, s.positive):
        counted = member & ~upper_share.isnan()
        lower_part = torch.where(counted, 1 - upper_share, 0.0).flatten()  # no boolean index: vmap has none
        upper_part = torch.where(counted, upper_share, 0.0).flatten()
        index = lower.flatten()
        table.append(s.z.new_zeros(bins).index_add(0, index, lower_part).index_add(0, index + 1, upper_part))
    return torch.stack(table)


def histogram(p: Pairing, bins: int, first: float, step: float) -> Tensor:
    """The table [2, bins] from the whole matrix at once, differentiable."""
    return _histogram_rows(scores(p, 0, p.shape[0]), bins, first, step)


def _check_bins(bins: int, step: float) -> None:
    if bins < 2 or not step > 0:
        raise ValueError(f"a histogram has at least 2 bins and a positive step, got bins={bins}, step={step}")


@kernel("pair_histogram", "reference")
@torch.no_grad()
def pair_histogram(*args: Any) -> Tensor:
    """The table [2, bins] of docs/design.md."""
    p, (bins, first, step) = split(args)
    _check_bins(bins, step)
    table = p.q.new_zeros((2, bins), dtype=torch.float64)
    for s in blocks(p):
        table += _histogram_rows(s, bins, first, step)
    return table.to(p.statistic_dtype)


@kernel("pair_histogram_backward", "reference")
@torch.no_grad()
def pair_histogram_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, drow_scale, dcolumn_scale)."""
    p, (bins, first, step, needs) = split(args)
    _check_bins(bins, step)
    slope = (grad.diff(dim=1) / step).to(p.statistic_dtype)
    total = Gradients(p, needs)
    for s in blocks(p):
        y = (s.z - first) / step
        lower, _ = _bins(s, bins, first, step)
        inside = (y >= 0) & (y <= bins - 1)
        dz = torch.where(s.negative, slope[0][lower], torch.where(s.positive, slope[1][lower], 0.0))
        dz = torch.where(inside, dz, torch.where(y.isnan() & (s.negative | s.positive), y, 0.0))
        total.add(s, dz)
    return total.result()
