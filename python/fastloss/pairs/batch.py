"""A batch of similarity matrices: small ones together, as dense matrices; large ones one after another, each streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import number
from .classes import Guide, PairMask, SameId
from .statistics import PairStats


def _of_sample(value: Any, b: int) -> Any:
    """What sample b has of an argument."""
    if isinstance(value, Tensor):
        return value[b] if value.dim() else value
    if isinstance(value, SameId):
        return SameId(value.rows[b], None if value.columns is None else value.columns[b])
    if isinstance(value, PairMask):
        return PairMask(value.mask[b])
    if isinstance(value, Guide):
        return Guide(value.q[b], value.k[b], _of_sample(value.limit, b))
    if isinstance(value, (tuple, list)):
        return tuple(_of_sample(v, b) for v in value)
    return value


def _stack(parts: list[PairStats], batch_bias: Any) -> PairStats:
    first = parts[0]
    side = None
    if first.column_stats is not None:
        side = _stack([p.columns for p in parts], batch_bias)
    return PairStats(torch.stack([p.table for p in parts]), batch_bias, first.second_scale, first.mean, side)


def batched_pair_stats(one: Callable[..., PairStats], q: Tensor, k: Tensor | None, **arguments: Any) -> PairStats:
    """`one(q, k, ...)` of each sample of q [B, M, D], k [B, N, D]; every other tensor has B in front, or no dimension."""
    if k is not None and (k.dim() != 3 or k.shape[0] != q.shape[0]):
        raise ValueError(f"a batch is q [B, M, D] and k [B, N, D], got {list(q.shape)} and {list(k.shape)}")
    bias = arguments.pop("bias")
    if isinstance(bias, Tensor) and bias.dim():
        raise ValueError(f"bias must be a number for a batch, got {list(bias.shape)}")
    if q.shape[0] == 0:
        raise ValueError(f"a batch has at least one sample, got {list(q.shape)}")
    if bias is not None:
        bias = number(bias, torch.promote_types(q.dtype, torch.float32), q.device)
    parts = [
        one(q[b], None if k is None else k[b], **{name: _of_sample(v, b) for name, v in arguments.items()})
        for b in range(q.shape[0])
    ]
    return _stack(parts, bias)
