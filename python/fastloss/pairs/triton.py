"""The pair kernels of the `triton` backend. triton is imported when a launch is due, not with fastloss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend_triton import _missing
from ..compiled import DTYPES
from ..contract import PairFunction
from ..registry import kernel
from .pairing import PAIRING_LENGTH, Pairing, check_pairing

#: Counts are float32, which holds each up to here; offsets inside a tile of the scratch are 32 bits.
LARGEST = 1 << 24
#: row_topk keeps each list in registers.
LONGEST_LIST = 64


def _why_not(*args: Any) -> str | None:
    p = Pairing(*args[:PAIRING_LENGTH])
    missing = _missing(p.q)
    if missing is not None:
        return missing
    for name, x in (("q and k", p.q), ("guides", p.guide_q)):
        if x is not None and x.dtype not in DTYPES:
            return f"takes {name} in float32, float16 or bfloat16, got {x.dtype}"
        if x is not None and x.shape[-1] == 0:
            return f"takes {name} of at least one feature"
    if not all(0 < size <= LARGEST for size in p.shape):
        return f"takes 1 to {LARGEST} rows and columns, got {p.shape}"
    return None


def _split(args: tuple[Any, ...]) -> tuple[Pairing, tuple[Any, ...]]:
    p = Pairing(*args[:PAIRING_LENGTH])
    check_pairing(p)
    return p, args[PAIRING_LENGTH:]


@kernel("pair_stats", "triton", _why_not)
def pair_stats(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..triton_kernels import pair_stats as kernels

    p, (boost, margin, want, second, keep) = _split(args)
    rows, columns = kernels.pair_stats(p, boost, margin, want, second)
    return rows, columns, p.q.new_empty((keep,), dtype=torch.float32)


@kernel("pair_stats_backward", "triton", lambda row_grad, column_grad, rows, columns, kept, *args: _why_not(*args))
def pair_stats_backward(
    row_grad: Tensor, column_grad: Tensor, rows: Tensor, columns: Tensor, kept: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..triton_kernels import pair_stats as kernels

    p, (boost, margin, want, second, _keep, needs) = _split(args)
    return kernels.pair_stats_backward(row_grad, column_grad, rows, columns, p, boost, margin, want, second, needs)


@kernel("pair_map", "triton", _why_not)
def pair_map(*args: Any) -> Tensor:
    from ..triton_kernels import pair_map as kernels

    p, (neg_threshold, pos_threshold, function) = _split(args)
    return kernels.pair_map(p, neg_threshold, pos_threshold, PairFunction(function))


@kernel("pair_map_backward", "triton", lambda grad, *args: _why_not(*args))
def pair_map_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..triton_kernels import pair_map as kernels

    p, (neg_threshold, pos_threshold, function, needs) = _split(args)
    return kernels.pair_map_backward(grad, p, neg_threshold, pos_threshold, PairFunction(function), needs)


def _why_not_topk(*args: Any) -> str | None:
    count = args[PAIRING_LENGTH]
    if not 0 < count <= LONGEST_LIST:
        return f"keeps lists of 1 to {LONGEST_LIST} columns a row, got count={count}"
    return _why_not(*args)


@kernel("row_topk", "triton", _why_not_topk)
def row_topk(*args: Any) -> tuple[Tensor, Tensor]:
    from ..triton_kernels import row_topk as kernels

    p, (count, classes) = _split(args)
    return kernels.row_topk(p, count, classes)


def _why_not_edges(x: Tensor, *args: Any) -> str | None:
    if x.dtype not in DTYPES:
        return f"takes float32, float16 or bfloat16, got {x.dtype}"
    if x.shape[1] == 0 or x.shape[0] == 0:
        return f"takes at least one row and one feature, got {tuple(x.shape)}"
    return _missing(x)


@kernel("edge_dot", "triton", lambda q, k, *ids: _why_not_edges(q) or _why_not_edges(k))
def edge_dot(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    from ..triton_kernels import edge_dot as kernels

    return kernels.edge_dot(q, k, rows, columns)


@kernel("edge_sum", "triton", _why_not_edges)
def edge_sum(x: Tensor, weight: Tensor, pointer: Tensor, source: Tensor) -> Tensor:
    from ..triton_kernels import edge_dot as kernels

    return kernels.edge_sum(x, weight, pointer, source)
