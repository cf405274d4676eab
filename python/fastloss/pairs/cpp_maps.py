"""`pair_map`, `pair_histogram` and `row_topk` of the `cpp` backend (csrc/cpu files of the same names)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend_cpp
from ..compiled import _C, pointer
from ..contract import NUM_PAIR_MAP_STATS, PairClasses, PairFunction
from ..registry import kernel
from .compiled_pairing import CompiledPairing, why_not_pairing
from .pairing import PAIRING_LENGTH

NO_GRADIENTS = (0, 0, 0, 0)
#: Above it a float32 does not tell one bin from the next.
MOST_BINS = 1 << 24


def _why_not(*args: Any) -> str | None:
    return backend_cpp._missing(args[0]) or why_not_pairing(*args)


def _why_not_backward(grad: Tensor, *args: Any) -> str | None:
    return _why_not(*args)


def _split(args: tuple[Any, ...]) -> tuple[CompiledPairing, tuple[Any, ...]]:
    return CompiledPairing(*args[:PAIRING_LENGTH]), args[PAIRING_LENGTH:]


def _upstream(grad: Tensor, *shape: int) -> Tensor:
    if grad.shape != shape:
        raise ValueError(f"grad must have shape {list(shape)}, got {tuple(grad.shape)}")
    return grad.to(torch.float32).contiguous()


# ---------------------------------------------------------------------------------------------- pair_map


def _map_fields(
    p: CompiledPairing, neg_threshold: Tensor | None, pos_threshold: Tensor | None, function: int
) -> tuple[Tensor | None, Tensor | None]:
    if function not in tuple(PairFunction):
        raise ValueError(f"unknown pair function {function}: one of {[f.name for f in PairFunction]}")
    return p.numbers("neg_threshold", neg_threshold), p.numbers("pos_threshold", pos_threshold)


@kernel("pair_map", "cpp", _why_not)
def pair_map(*args: Any) -> Tensor:
    """The table [8, M] of docs/design.md."""
    p, (neg_threshold, pos_threshold, function) = _split(args)
    low, high = _map_fields(p, neg_threshold, pos_threshold, function)
    table = torch.empty(NUM_PAIR_MAP_STATS, p.pairing.shape[0], dtype=torch.float32)
    _C.pair_map_cpu(  # type: ignore[union-attr]
        p.fields, neg_threshold=pointer(low), pos_threshold=pointer(high), function=int(function),
        table=pointer(table), grad=0, gradients=NO_GRADIENTS, isa=backend_cpp.ISA,
    )  # fmt: skip
    return table


@kernel("pair_map_backward", "cpp", _why_not_backward)
def pair_map_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, drow_scale, dcolumn_scale)."""
    p, (neg_threshold, pos_threshold, function, needs) = _split(args)
    low, high = _map_fields(p, neg_threshold, pos_threshold, function)
    grad = _upstream(grad, NUM_PAIR_MAP_STATS, p.pairing.shape[0])
    made, addresses = p.gradients(needs)
    _C.pair_map_cpu(  # type: ignore[union-attr]
        p.fields, neg_threshold=pointer(low), pos_threshold=pointer(high), function=int(function), table=0,
        grad=pointer(grad), gradients=addresses, isa=backend_cpp.ISA,
    )  # fmt: skip
    return made


# ---------------------------------------------------------------------------------------------- pair_histogram


def _check_bins(bins: int, step: float) -> None:
    if bins < 2 or not step > 0:
        raise ValueError(f"a histogram has at least 2 bins and a positive step, got bins={bins}, step={step}")
    if bins > MOST_BINS:
        raise ValueError(f"a histogram has at most {MOST_BINS} bins, got {bins}")


@kernel("pair_histogram", "cpp", _why_not)
def pair_histogram(*args: Any) -> Tensor:
    """The table [2, bins] of docs/design.md."""
    p, (bins, first, step) = _split(args)
    _check_bins(bins, step)
    table = torch.empty(2, bins, dtype=torch.float32)
    _C.pair_histogram_cpu(  # type: ignore[union-attr]
        p.fields, bins=bins, first=first, step=step, table=pointer(table), grad=0, gradients=NO_GRADIENTS,
        isa=backend_cpp.ISA,
    )  # fmt: skip
    return table


@kernel("pair_histogram_backward", "cpp", _why_not_backward)
def pair_histogram_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, drow_scale, dcolumn_scale)."""
    p, (bins, first, step, needs) = _split(args)
    _check_bins(bins, step)
    grad = _upstream(grad, 2, bins)
    made, addresses = p.gradients(needs)
    _C.pair_histogram_cpu(  # type: ignore[union-attr]
        p.fields, bins=bins, first=first, step=step, table=0, grad=pointer(grad), gradients=addresses,
        isa=backend_cpp.ISA,
    )  # fmt: skip
    return made


# ---------------------------------------------------------------------------------------------- row_topk


@kernel("row_topk", "cpp", _why_not)
def row_topk(*args: Any) -> tuple[Tensor, Tensor]:
    """(values [M, count], columns [M, count]) of docs/design.md."""
    p, (count, classes) = _split(args)
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if classes not in (PairClasses.NEGATIVE, PairClasses.POSITIVE, PairClasses.BOTH):
        raise ValueError(f"classes must be 1 (negatives), 2 (positives) or 3 (both), got {classes}")
    values = torch.empty(p.pairing.shape[0], count, dtype=torch.float32)
    columns = torch.empty(p.pairing.shape[0], count, dtype=torch.int64)
    _C.row_topk_cpu(  # type: ignore[union-attr]
        p.fields, count=count, classes=int(classes), values=pointer(values), columns=pointer(columns),
        isa=backend_cpp.ISA,
    )  # fmt: skip
    return values, columns
