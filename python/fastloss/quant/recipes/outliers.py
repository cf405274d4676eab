"""Outliers found in two steps, and cut off before a weight is quantised (CBQ)."""

from __future__ import annotations

import torch
from torch import Tensor


def outlier_threshold(x: Tensor, whisker: float = 1.5, balance: float = 1.0) -> Tensor:
    """The largest magnitude that is no outlier: a tensor [], +inf where nothing is one.

    Coarse: candidates are the magnitudes above T = Q3 + whisker (Q3 - Q1), quartiles of |x|. Fine: of the splits of the
    sorted candidates c_0 <= .. <= c_(n-1) into what is kept, c_0 .. c_(i-1), and outliers, c_i .. c_(n-1), that with the
    largest

        (c_i - c_(i-1))^2 - balance Var(c_0 .. c_(i-1)),   the first among equals

    where c_(-1) is the largest magnitude up to T, and the variance of nothing is 0.

    The paper's criterion is a distance between the two sets less a multiple of the variance within the kept one; the text
    at hand does not say which distance (here: the gap, squared) nor the multiple (here: `balance`).
    Its scaling of activation channels by what is found was not found and is left out.

    Args:
        x: any shape, floating, finite. whisker, balance: >= 0.

    Raises ValueError. Source: "CBQ: Cross-Block Quantization for Large Language Models".
    """
    if not x.is_floating_point() or not x.numel() or not bool(x.isfinite().all()):
        raise ValueError(f"x must be floating and finite and hold a number, got {x.dtype} {list(x.shape)}")
    if not whisker >= 0 or not balance >= 0:
        raise ValueError(f"whisker and balance must be >= 0, got {whisker} and {balance}")
    size = x.detach().abs().reshape(-1).double().sort().values
    first, third = (_quantile(size, share) for share in (0.25, 0.75))
    kept = int(torch.searchsorted(size, third + whisker * (third - first), right=True))
    if kept == size.numel():
        return torch.full_like(x.detach().reshape(-1)[0], torch.inf)
    found = size[kept:]
    gap = size[kept:] - size[kept - 1 : -1]
    before = torch.arange(found.numel(), device=x.device)
    # moments about the first candidate, so that equal candidates have a variance of 0
    near = found - found[0]
    total, squares = (torch.cat((near.new_zeros(1), t.cumsum(0)[:-1])) for t in (near, near.square()))
    share = before.clamp(min=1)
    variance = (squares / share - (total / share).square()).clamp(min=0)
    at = int((gap.square() - balance * variance).argmax())
    return size[kept - 1 + at].to(x.dtype)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """As torch.quantile, of any number of elements."""
    place = share * (ordered.numel() - 1)
    low = int(place)
    high = min(low + 1, ordered.numel() - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def truncate_outliers(x: Tensor, whisker: float = 1.5, balance: float = 1.0) -> Tensor:
    """x clamped to +-`outlier_threshold`, which takes the same arguments and raises the same."""
    limit = outlier_threshold(x, whisker, balance)
    return x.clamp(-limit, limit)
