"""The dense way for matrices so small that a kernel's call costs more than the matrix: the nll in float64, of PyTorch's own
operations. Losses that need nothing else ask `pair_nll` (engine.py) for it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..autograd import can_look, forward_mode_active
from .arguments import Made

#: Pairs, and features, up to which the dense way is faster on a CPU (bench: 128 x 128 x 512 1.4x, 192 x 192 x 128 1.2x).
MOST_PAIRS, MOST_FEATURES = 1 << 15, 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Classes(NamedTuple):
    """Which pairs of a small matrix are positive and excluded; one column for each row is `own`."""

    positive: Tensor
    excluded: Tensor | None
    own: bool  # row i with column i, and nothing excluded
    complete: bool  # each row and each column has a positive


@functools.lru_cache(maxsize=64)
def _classes(m: int, n: int, positive: tuple[int, ...], excluded: tuple[int, ...]) -> _Classes:
    difference = torch.arange(n)[None, :] - torch.arange(m)[:, None]
    out = torch.zeros(m, n, dtype=torch.bool)
    for offset in excluded:
        out = out | (difference == offset)
    found = torch.zeros_like(out)
    for offset in positive:
        found = found | (difference == offset)
    found = found & ~out
    complete = bool(found.any(1).all() and found.any(0).all())
    return _Classes(found, out if excluded else None, m == n and positive == (0,) and not excluded, complete)


class DenseNll:
    """The nll of the rows (dim 1) and of the columns (dim 0) of a small matrix of float64 scores."""

    def __init__(self, made: Made, classes: _Classes) -> None:
        p = made.pairing
        z = (p.row_scale.double()[:, None] * p.q.double()) @ p.k.double().t()
        self.scores = z if p.column_scale is None else z * p.column_scale.double()
        self.classes = classes

    def along(self, dim: int) -> Tensor:
        """lse - pos_lse, float32."""
        z, classes = self.scores, self.classes
        if classes.own:
            return z.log_softmax(dim).diagonal().neg().float()
        if classes.excluded is not None:
            z = z.masked_fill(classes.excluded, float("-inf"))
        positive = z.masked_fill(~classes.positive, float("-inf"))
        return (z.logsumexp(dim) - positive.logsumexp(dim)).float()


def dense_nll(made: Made) -> DenseNll | None:
    """The dense way, where it is faster and has the same meaning; else None."""
    p = made.pairing
    (m, n), d = p.shape, p.q.shape[1]
    if not 0 < m * n <= MOST_PAIRS or d > MOST_FEATURES or p.q.dtype not in _DTYPES:
        return None
    if not can_look(p.q) or forward_mode_active() or registry.forced() is not None:
        return None
    plain = (made.boost, made.margin, p.row_valid, p.column_valid, p.positive_rows, p.excluded_rows, p.low, p.high)
    if p.guide_q is not None or any(x is not None for x in plain):
        return None
    classes = _classes(m, n, p.positive_diagonals, p.excluded_diagonals)
    return DenseNll(made, classes) if classes.complete else None
