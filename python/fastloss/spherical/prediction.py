"""Scores of a factored weight: W itself, the scores of some classes, and the best classes by blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import BLOCK, Factors


def materialize(factors: Factors) -> Tensor:
    """W = V U + 1 omegaᵀ [D, d] in the dtype of V."""
    weight = torch.empty_like(factors.v)
    for start, rows in factors.blocks():
        weight[start : start + len(rows)] = rows.to(factors.u.dtype) @ factors.u + factors.omega
    return weight


def scores(factors: Factors, x: Tensor, classes: Tensor) -> Tensor:
    """[..., K], float64: of x [..., d] for the classes [..., K] of each row."""
    return (factors.listed(classes) * (x @ factors.u.T)[..., None, :]).sum(-1) + (x @ factors.omega)[..., None]


def topk(factors: Factors, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row of x [m, d] and their classes, best first. Holds about BLOCK scores at a time."""
    with torch.autocast(x.device.type, enabled=False):
        return _topk(factors, x, k)


def _topk(factors: Factors, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    mixed = (x @ factors.u.T).to(factors.v.dtype)
    values = mixed.new_empty(len(x), 0)
    classes = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    step = max(k, BLOCK // max(1, len(x)))
    for start in range(0, factors.num_classes, step):
        block = mixed @ factors.v[start : start + step].T
        found, place = block.topk(min(k, block.shape[1]))
        values, classes = torch.cat((values, found), 1), torch.cat((classes, place + start), 1)
        values, order = values.topk(min(k, values.shape[1]))
        classes = classes.gather(1, order)
    return values + (x @ factors.omega)[:, None], classes
