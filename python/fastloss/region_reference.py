"""The region ops in plain PyTorch: what runs where no kernel does, and what kernels are tested against.

The contract is docs/design.md, "The region contract". float64 stays float64, everything else accumulates in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import NUM_REGION_STATS, RegionCoef, RegionStat, RegionWant
from .reference import accumulator
from .registry import kernel

#: sigmoid(-FAR) is 0 in float64 too, and 0 * FAR is not 0 * inf.
FAR = 800.0


def _elements(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(x, t, 1 - t, counts) of each element, 0 where it does not count; counts is None where all do."""
    x = accumulator(logits)
    t = target.to(x.dtype)
    if mask is None:
        return x, t, 1 - t, None
    counts = (mask if mask.shape == x.shape else mask.repeat_interleave(len(x) // len(mask), 0)) != 0
    return torch.where(counts, x, 0.0), torch.where(counts, t, 0.0), torch.where(counts, 1 - t, 0.0), counts


def _probabilities(x: Tensor, want: int, sharpness: float) -> tuple[Tensor, Tensor, Tensor]:
    """(p, 1 - p, dp/dx) of the p that the confusion matrix is made of."""
    p, q, slope = x, 1 - x, torch.ones_like(x)
    if not want & RegionWant.PROBABILITIES:
        p, q = torch.sigmoid(x), torch.sigmoid(-x)
        slope = p * q
    if want & RegionWant.SHARP:
        y = 0.5 * sharpness * (p - q)
        p, q = torch.sigmoid(y), torch.sigmoid(-y)
        slope = sharpness * p * q * slope
    return p, q, slope


def _counted(values: Tensor, counts: Tensor | None) -> Tensor:
    return values if counts is None else torch.where(counts, values, 0.0)


def _product(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, 0 where the weight is 0 and the value infinite."""
    return torch.where(weight == 0, 0.0, weight * value)


def statistics(logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float) -> Tensor:
    """stats [10, R], differentiable with respect to logits."""
    x, positive, negative, counts = _elements(logits, target, mask)
    p, q, _ = _probabilities(x, want, sharpness)
    zero = x.new_zeros(len(x))
    rows = [zero] * NUM_REGION_STATS
    rows[RegionStat.COUNT] = zero + x.shape[1] if counts is None else counts.sum(1).to(x.dtype)
    rows[RegionStat.LABELLED] = positive.sum(1)
    rows[RegionStat.TRUE_POSITIVE] = (p * positive).sum(1)
    rows[RegionStat.FALSE_POSITIVE] = (p * negative).sum(1)
    rows[RegionStat.FALSE_NEGATIVE] = (q * positive).sum(1)
    rows[RegionStat.TRUE_NEGATIVE] = (q * negative).sum(1)
    if want & RegionWant.SQUARES:
        rows[RegionStat.SQUARED_ERROR] = (p * negative - q * positive).square().sum(1)
        rows[RegionStat.LABELLED_SQUARE] = positive.square().sum(1)
    if want & RegionWant.CROSS_ENTROPY:
        terms = _product(positive, F.logsigmoid(x)) + _product(negative, F.logsigmoid(-x))
        rows[RegionStat.CROSS_ENTROPY] = -terms.sum(1)
    if want & RegionWant.ENTROPY:
        near = x.clamp(-FAR, FAR)
        entropy = torch.sigmoid(x) * F.logsigmoid(near) + torch.sigmoid(-x) * F.logsigmoid(-near)
        rows[RegionStat.ENTROPY] = -_counted(entropy, counts).sum(1)
    return torch.stack(rows)


@kernel("region_stats", "reference")
def region_stats(logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float) -> Tensor:
    """stats [10, R]."""
    with torch.no_grad():
        return statistics(logits, target, mask, want, sharpness)


@kernel("region_stats_backward", "reference")
def region_stats_backward(
    coef: Tensor, logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float
) -> Tensor:
    """dlogits [R, P] from five coefficients a region."""
    x, positive, negative, counts = _elements(logits, target, mask)
    p, q, slope = _probabilities(x, want, sharpness)
    c = coef.to(x.dtype)[:, :, None]
    d = c[RegionCoef.POSITIVE] * positive + c[RegionCoef.NEGATIVE] * negative
    if want & RegionWant.SQUARES:
        d = d + c[RegionCoef.SQUARE] * (p * negative - q * positive)
    d = d * slope
    if want & (RegionWant.CROSS_ENTROPY | RegionWant.ENTROPY):
        p, q = torch.sigmoid(x), torch.sigmoid(-x)
    if want & RegionWant.CROSS_ENTROPY:
        d = d + c[RegionCoef.CROSS_ENTROPY] * (p * negative - q * positive)
    if want & RegionWant.ENTROPY:
        d = d - c[RegionCoef.ENTROPY] * x.clamp(-FAR, FAR) * (p * q)
    return _counted(d, counts).to(logits.dtype)
