"""`pair_stats` in plain PyTorch, a block of rows at a time: what runs where no kernel does, and what kernels are tested
against. `statistics`, of the whole matrix, is differentiable, also twice: create_graph and forward-mode AD use it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import NUM_PAIR_COLUMN_STATS, NUM_PAIR_STATS, PairStat, PairWant
from ..reference import INF, finite
from ..registry import kernel
from . import reference_edges, reference_map  # noqa: F401  (they register their kernels)
from .pairing import Pairing
from .scores import Gradients, Scores, blocks, scores, split


class _Terms(NamedTuple):
    negative_z: Tensor  # boosted
    positive_z: Tensor  # less the margin


def _terms(s: Scores, boost: Tensor | None, margin: Tensor | None) -> _Terms:
    rows = slice(s.start, s.stop)
    negative_z = s.z
    if boost is not None:  # the value is boosted, the slope is not
        negative_z = s.z + ((boost[rows, None] - 1) * s.z).detach()
    positive_z = s.z if margin is None else s.z - margin[rows, None].to(s.z.dtype)
    return _Terms(negative_z, positive_z)


def _log_sum(z: Tensor, member: Tensor, dim: int, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(max, log sum of e^(z - max)) over the members; both -inf, with zero gradient, where there is none."""
    inside = torch.where(member, z, -INF)
    if largest is None:
        largest = inside.detach().amax(dim) if z.shape[dim] else z.new_full(inside.sum(dim).shape, -INF)
    total = torch.where(member, (inside - finite(largest).unsqueeze(dim)).exp(), 0.0).sum(dim)
    some = total != 0
    return largest, torch.where(some, torch.where(some, total, 1.0).log(), -INF)


def _side(negative_z: Tensor, positive_z: Tensor, s: Scores, dim: int) -> list[Tensor]:
    """The first seven statistics along `dim`."""
    zero = negative_z.new_zeros(())
    return [
        *_log_sum(negative_z, s.negative, dim),
        *_log_sum(positive_z, s.positive, dim),
        torch.where(s.positive, positive_z, zero).sum(dim),
        s.negative.sum(dim).to(negative_z.dtype),
        s.positive.sum(dim).to(negative_z.dtype),
    ]


def _row_table(s: Scores, t: _Terms, want: int, second: float) -> Tensor:
    side = _side(t.negative_z, t.positive_z, s, 1)
    zero = torch.zeros_like(side[0])
    largest, log_sum = side[0], side[1]
    shifted = torch.where(s.negative, t.negative_z - finite(largest)[:, None], 0.0)
    mean, log_second = zero, zero
    if want & PairWant.MEAN:
        some = log_sum != -INF
        p = torch.where(s.negative, (shifted - torch.where(some, log_sum, 0.0)[:, None]).exp(), 0.0)
        mean = torch.where(p > 0, p * torch.where(p > 0, shifted, 0.0), p * 0).sum(1)
    if want & PairWant.SECOND:
        log_second = _log_sum(second * shifted, s.negative, 1, zero)[1]
    return torch.stack((*side, mean, log_second))


def _merge(part: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(max, log sum) of a union."""
    largest = torch.maximum(part[0], more[0])
    ref = finite(largest)

    def shifted(x: tuple[Tensor, Tensor]) -> Tensor:
        return torch.where(x[0] == -INF, -INF, x[1] + (x[0] - ref))

    return largest, torch.logaddexp(shifted(part), shifted(more))


def _merge_columns(table: Tensor | None, more: list[Tensor]) -> Tensor:
    if table is None:
        return torch.stack(more)
    negative = _merge((table[0], table[1]), (more[0], more[1]))
    positive = _merge((table[2], table[3]), (more[2], more[3]))
    return torch.stack((*negative, *positive, table[4] + more[4], table[5] + more[5], table[6] + more[6]))


def statistics(
    p: Pairing, boost: Tensor | None, margin: Tensor | None, want: int, second: float
) -> tuple[Tensor, Tensor]:
    """(rows, columns) from the whole matrix at once, differentiable."""
    s = scores(p, 0, p.shape[0])
    t = _terms(s, boost, margin)
    columns = s.z.new_zeros((NUM_PAIR_COLUMN_STATS, 0))
    if want & PairWant.COLUMNS:
        columns = torch.stack(_side(t.negative_z, t.positive_z, s, 0))
    return _row_table(s, t, want, second), columns


@kernel("pair_stats", "reference")
@torch.no_grad()
def pair_stats(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, kept) of docs/design.md; `kept` is not used."""
    p, (boost, margin, want, second, keep) = split(args)
    row_tables, columns = [], None
    for s in blocks(p):
        t = _terms(s, boost, margin)
        row_tables.append(_row_table(s, t, want, second))
        if want & PairWant.COLUMNS:
            columns = _merge_columns(columns, _side(t.negative_z, t.positive_z, s, 0))
    like = p.q.new_zeros((), dtype=p.statistic_dtype)
    rows = torch.cat(row_tables, 1) if row_tables else like.new_zeros((NUM_PAIR_STATS, 0))
    if columns is None:
        columns = like.new_zeros((NUM_PAIR_COLUMN_STATS, p.shape[1] if want & PairWant.COLUMNS else 0))
        columns[: PairStat.POS_SUM] = -INF
    return rows, columns, p.q.new_empty((keep,), dtype=torch.float32)


def _share(z: Tensor, largest: Tensor, log_sum: Tensor) -> Tensor:
    """e^(z - max - log sum), 0 for empty sets."""
    some = log_sum != -INF
    return torch.where(some, (z - finite(largest) - torch.where(some, log_sum, 0.0)).exp(), 0.0)


@kernel("pair_stats_backward", "reference")
@torch.no_grad()
def pair_stats_backward(
    row_grad: Tensor, column_grad: Tensor, rows: Tensor, columns: Tensor, kept: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, drow_scale, dcolumn_scale)."""
    p, (boost, margin, want, second, _keep, needs) = split(args)
    total = Gradients(p, needs)
    for s in blocks(p):
        t = _terms(s, boost, margin)
        r = rows[:, s.start : s.stop, None].to(s.z.dtype)
        g = row_grad[:, s.start : s.stop, None].to(s.z.dtype)
        share = _share(t.negative_z, r[PairStat.NEG_MAX], r[PairStat.NEG_LOGSUM])
        negative = g[PairStat.NEG_LOGSUM] * share
        positive = g[PairStat.POS_LOGSUM] * _share(t.positive_z, r[PairStat.POS_MAX], r[PairStat.POS_LOGSUM])
        positive = positive + g[PairStat.POS_SUM]
        shifted = t.negative_z - finite(r[PairStat.NEG_MAX])
        if want & PairWant.MEAN:
            slope = share * (1 + torch.where(share > 0, shifted, 0.0) - r[PairStat.NEG_MEAN])
            negative = negative + g[PairStat.NEG_MEAN] * slope
        if want & PairWant.SECOND:
            second_share = _share(second * shifted, torch.zeros_like(r[0]), r[PairStat.NEG_SECOND])
            negative = negative + g[PairStat.NEG_SECOND] * second * second_share
        if want & PairWant.COLUMNS:
            c, h = columns[:, None, :].to(s.z.dtype), column_grad[:, None, :].to(s.z.dtype)
            share = _share(t.negative_z, c[PairStat.NEG_MAX], c[PairStat.NEG_LOGSUM])
            negative = negative + h[PairStat.NEG_LOGSUM] * share
            share = _share(t.positive_z, c[PairStat.POS_MAX], c[PairStat.POS_LOGSUM])
            positive = positive + h[PairStat.POS_LOGSUM] * share + h[PairStat.POS_SUM]
        total.add(s, torch.where(s.negative, negative, torch.where(s.positive, positive, 0.0)))
    return total.result()
