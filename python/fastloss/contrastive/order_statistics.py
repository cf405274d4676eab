"""Order statistics of all similarities of a batch, exact, from passes over blocks of the matrix that is never stored."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..pairs.scores import BLOCK, product

#: Similarities of a pass that exist at a time.
_PASS = 1 << 20

#: Random pairs that say about where an order statistic lies, and by how many of their standard deviations it may be elsewhere.
_SAMPLE, _DEVIATIONS = 1 << 15, 5.0

#: Bins that a pass sorts the remaining candidates into.
_BINS = 4096


def _blocks(x: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """<x_i, x_j> of all i < j in blocks; NaN, which no comparison is true of, where the labels are equal or i >= j."""
    step = max(1, _PASS // max(len(x), 1))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        z = product(x[rows], x[start:].t())
        z.masked_fill_(labels[rows, None] == labels[None, start:], float("nan"))
        size = z.shape[0]
        z[:, :size].masked_fill_(torch.ones(size, size, dtype=torch.bool, device=z.device).tril_(), float("nan"))
        yield z


def _bracket(found: Tensor, share: float) -> tuple[float, float]:
    """Between what the `share`-quantile of all pairs is likely to be, from a sorted sample of them."""
    count = len(found)
    near = _DEVIATIONS * (1 + math.sqrt(count * share * (1 - share)))
    first, last = math.floor(count * share - near), math.ceil(count * share + near)
    low = float(found[first]) if first >= 0 else -float("inf")
    return low, float(found[last]) if last < count else float("inf")


def _sample(x: Tensor, labels: Tensor) -> Tensor:
    """Sorted similarities of random pairs with different labels."""
    generator = torch.Generator().manual_seed(0)  # any pairs do: the global generator is left as it is
    rows, columns = torch.randint(len(x), (2, _SAMPLE), generator=generator).to(x.device)
    different = labels[rows] != labels[columns]
    return (x[rows[different]] * x[columns[different]]).sum(1).sort().values


@torch.no_grad()
def negative_order_statistics(x: Tensor, labels: Tensor, ranks: list[int], held: int = BLOCK) -> list[Tensor]:
    """For each rank r the <x_i, x_j> that r of those of all pairs i < j with different labels come before when they are
    sorted, rising.

    Exact: a sample says between which two numbers each lies, one pass counts what is below and keeps what is between, which
    is sorted. Where that is more than `held` numbers, further passes count them in 4096 bins and keep one bin. r must be in
    [0, number of such pairs). NaN where x is not finite. Reads sizes from the device.
    """
    counts = torch.unique(labels, return_counts=True)[1]
    total = (len(labels) ** 2 - int((counts * counts).sum())) // 2
    if total == 0:
        raise ValueError("there is no negative to find an order statistic among")
    if not bool(x.isfinite().all()):  # there is no order with NaN, and no bin between infinities
        return [x.new_full((), float("nan")) for _ in ranks]
    if total <= min(_SAMPLE, held):
        brackets = [(-float("inf"), float("inf"))] * len(ranks)
    else:
        found = _sample(x, labels)
        brackets = [_bracket(found, rank / total) for rank in ranks]
    below, inside = [0] * len(ranks), [0] * len(ranks)
    kept: list[list[Tensor]] = [[] for _ in ranks]
    for z in _blocks(x, labels):
        for i, (low, high) in enumerate(brackets):
            below[i] += int((z < low).sum())
            more = z[(z >= low) & (z <= high)]
            inside[i] += more.numel()
            kept[i] = [*kept[i], more] if inside[i] <= held else []
    results = []
    for i, rank in enumerate(ranks):
        if not below[i] <= rank < below[i] + inside[i]:
            results.append(_by_bins(x, labels, rank, -float("inf"), float("inf"), held))
        elif inside[i] > held:
            results.append(_by_bins(x, labels, rank, *brackets[i], held))
        else:
            results.append(torch.cat(kept[i]).sort().values[rank - below[i]])
    return results


def _ends(x: Tensor, labels: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The smallest and the largest similarity in [low, high]."""
    inside = [z[(z >= low) & (z <= high)] for z in _blocks(x, labels)]
    ends = torch.stack([torch.stack(z.aminmax()) for z in inside if z.numel()])
    return ends[:, 0].amin(), ends[:, 1].amax()


def _edges(low: Tensor, high: Tensor) -> Tensor:
    """_BINS - 1 numbers from low to high, both left out."""
    share = torch.arange(1, _BINS, device=low.device, dtype=low.dtype) / _BINS
    return low + (high - low) * share


def _by_bins(x: Tensor, labels: Tensor, rank: int, least: float, most: float, held: int) -> Tensor:
    low, high = _ends(x, labels, least, most)
    while True:
        below, inside = 0, 0
        counts = torch.zeros(_BINS, dtype=torch.int64, device=low.device)
        kept: list[Tensor] = []
        edges = _edges(low, high)
        for block in _blocks(x, labels):
            z = block[(block >= low) & (block <= high)]
            below += int((block < low).sum())
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
