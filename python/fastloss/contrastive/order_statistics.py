"""Order statistics of all similarities of a batch, exact, from passes over blocks of the matrix that is never stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..pairs.pairing import Pairing
from ..pairs.scores import BLOCK, blocks

#: Bins that a pass sorts the remaining candidates into.
_BINS = 4096


def _candidates(p: Pairing, low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(how many negatives of a block are below `low`, those from `low` to `high`)."""
    for s in blocks(p):
        z = s.z[s.negative]
        yield (z < low).sum(), z[(z >= low) & (z <= high)]


def _edges(low: Tensor, high: Tensor) -> Tensor:
    """_BINS - 1 numbers from low to high, both left out."""
    share = torch.arange(1, _BINS, device=low.device, dtype=low.dtype) / _BINS
    return low + (high - low) * share


@torch.no_grad()
def negative_order_statistics(p: Pairing, ranks: list[int], held: int = BLOCK) -> list[Tensor]:
    """For each rank r the z that r negatives of the whole matrix come before when they are sorted, rising.

    Exact: each pass counts the candidates in 4096 bins and keeps one bin, until no more than `held` numbers are left, which
    are sorted. r must be in [0, number of negatives). NaN where a similarity is not finite. Reads sizes from the device.
    """
    ends = [torch.stack(s.z[s.negative].aminmax()) for s in blocks(p) if bool(s.negative.any())]
    if not ends:
        raise ValueError("there is no negative to find an order statistic among")
    lowest, highest = torch.stack(ends)[:, 0].amin(), torch.stack(ends)[:, 1].amax()
    return [_order_statistic(p, rank, lowest, highest, held) for rank in ranks]


def _order_statistic(p: Pairing, rank: int, low: Tensor, high: Tensor, held: int) -> Tensor:
    if not bool(low.isfinite() & high.isfinite()):  # there is no order with NaN, and no bin between infinities
        return low * float("nan")
    while True:
        below, inside = 0, 0
        counts = torch.zeros(_BINS, dtype=torch.int64, device=low.device)
        kept: list[Tensor] = []
        edges = _edges(low, high)
        for fewer, z in _candidates(p, low, high):
            below += int(fewer)
            inside += z.numel()
            counts += torch.bincount(torch.bucketize(z, edges, right=True), minlength=_BINS)
            kept = [*kept, z] if inside <= held else []
        if inside <= held or bool(low == high):
            return torch.cat(kept).sort().values[rank - below] if inside <= held else low
        before = counts.cumsum(0)
        chosen = int(torch.searchsorted(before, rank - below, right=True))
        bounds = torch.cat((low[None], edges, high[None]))
        new_low, new_high = bounds[chosen], bounds[chosen + 1]
        if chosen < _BINS - 1:  # a bin ends before the next one begins
            new_high = torch.nextafter(new_high, low)
        low, high = new_low, new_high
