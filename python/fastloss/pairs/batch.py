"""A batch of similarity matrices: small ones together, as dense matrices; others one after another, each streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..contract import PairWant
from .arguments import make_pairing, number, positive_numbers
from .classes import Diagonal, Guide, PairMask, SameId
from .reference import statistics
from .small import MOST_PAIRS
from .statistics import PairStats


def _of_sample(value: Any, b: int) -> Any:
    """What sample b has of an argument; ids [M], masks [M, N] and one number are all samples'."""
    if isinstance(value, Tensor):
        return value[b] if value.numel() > 1 else value
    if isinstance(value, SameId):
        rows, columns = (x if x is None or x.dim() == 1 else x[b] for x in (value.rows, value.columns))
        return SameId(rows, columns)  # type: ignore[arg-type]
    if isinstance(value, PairMask):
        return PairMask(value.mask if value.mask.dim() == 2 else value.mask[b])
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


def _check_batch(samples: int, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        given = value if isinstance(value, (tuple, list)) else (value,)
        for x in given:
            if isinstance(x, Tensor) and x.numel() > 1 and x.shape[0] != samples:
                raise ValueError(f"{name} must be a number or have the {samples} samples in front, got {list(x.shape)}")


def _is_small(q: Tensor, k: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether the samples are so small that calls of kernels cost more than dense matrices of all of them."""
    m, n = q.shape[1], k.shape[1]
    plain = all(
        arguments[name] is None for name in ("column_scale", "row_valid", "column_valid", "window", "guide", "margin")
    )
    scale = arguments["scale"]
    one_scale = not isinstance(scale, Tensor) or scale.numel() == 1
    sets = [arguments["positive"], arguments["excluded"]]
    diagonals = all(s is None or isinstance(s, Diagonal) for s in sets)
    few = m * n <= MOST_PAIRS and q.shape[0] * m * n <= 1 << 24
    return few and plain and one_scale and diagonals and not arguments["hardness"] and registry.forced() is None


def _together(
    q: Tensor, k: Tensor | None, bias: Any, *, scale: Any, positive: Any, excluded: Any, second_scale: float | None,
    mean: bool, columns: bool, normalize: bool, **_: Any,
) -> PairStats:  # fmt: skip
    """The reference of all samples at once."""
    own = k is None
    positive = None if own and positive == Diagonal(0) else positive
    want = (PairWant.COLUMNS if columns else 0) | (PairWant.MEAN if mean else 0)
    want |= PairWant.SECOND if second_scale is not None else 0

    def of_one(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        made = make_pairing(
            q, None if own else k, scale, None, positive, excluded, None, None, None, None, normalize
        )  # fmt: skip
        return statistics(made.pairing, None, None, int(want), second_scale or 1.0)

    positive_numbers("scale", scale)
    rows, column_table = torch.vmap(of_one)(q, q if k is None else k)
    side = PairStats(column_table, bias) if columns else None
    return PairStats(rows, bias, second_scale, mean, side)


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
    _check_batch(q.shape[0], arguments)
    if _is_small(q, q if k is None else k, arguments):
        return _together(q, k, bias, **arguments)
    parts = [
        one(q[b], None if k is None else k[b], **{name: _of_sample(v, b) for name, v in arguments.items()})
        for b in range(q.shape[0])
    ]
    return _stack(parts, bias)
