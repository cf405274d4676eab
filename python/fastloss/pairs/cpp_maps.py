"""`pair_map`, `pair_histogram` and `row_topk` of the `cpp` backend (csrc/cpu files of the same names)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend_cpp
from ..compiled import _C, pointer
from ..contract import NUM_PAIR_MAP_STATS, PairClasses, PairFunction
from ..registry import kernel
from .compiled import CompiledPairing
from .cpp import addresses, empty_gradients, why_not
from .pairing import PAIRING_LENGTH, Pairing

NO_GRADIENTS = (0, 0, 0, 0)


def _why_not_backward(grad: Tensor, *args: Any) -> str | None:
    return why_not(*args)


def _split(args: tuple[Any, ...]) -> tuple[Pairing, CompiledPairing, tuple[Any, ...]]:
    pairing = Pairing(*args[:PAIRING_LENGTH])
    return pairing, CompiledPairing(pairing), args[PAIRING_LENGTH:]


def _upstream(grad: Tensor, *shape: int) -> Tensor:
    if grad.shape != shape:
        raise ValueError(f"grad must have shape {list(shape)}, got {tuple(grad.shape)}")
    return grad.to(torch.float32).contiguous()


def _nothing(gradients: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of no pair."""
    for gradient in gradients:
        gradient.zero_()
    return gradients


# ---------------------------------------------------------------------------------------------- pair_map


def _map_fields(
    pairing: Pairing, p: CompiledPairing, neg_threshold: Tensor | None, pos_threshold: Tensor | None, function: int
) -> dict[str, int]:
    if function not in tuple(PairFunction):
        raise ValueError(f"unknown pair function {function}: one of {[f.name for f in PairFunction]}")
    m = pairing.shape[0]
    for name, values in (("neg_threshold", neg_threshold), ("pos_threshold", pos_threshold)):
        if values is not None and values.shape != (m,):
            raise ValueError(f"{name} must have shape [{m}], got {tuple(values.shape)}")
    return {
        "neg_threshold": p.address(neg_threshold, torch.float32),
        "pos_threshold": p.address(pos_threshold, torch.float32),
        "function": int(function),
    }


@kernel("pair_map", "cpp", why_not)
def pair_map(*args: Any) -> Tensor:
    """The table [8, M] of docs/design.md."""
    pairing, p, (neg_threshold, pos_threshold, function) = _split(args)
    fields = _map_fields(pairing, p, neg_threshold, pos_threshold, function)
    table = torch.empty(NUM_PAIR_MAP_STATS, pairing.shape[0], dtype=torch.float32)
    _C.pair_map_cpu(  # type: ignore[union-attr]
        pairing=p.native, **fields,
        table=pointer(table), grad=0, gradients=NO_GRADIENTS, isa=backend_cpp.ISA,
    )  # fmt: skip
    return table


@kernel("pair_map_backward", "cpp", _why_not_backward)
def pair_map_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, drow_scale, dcolumn_scale)."""
    pairing, p, (neg_threshold, pos_threshold, function, needs) = _split(args)
    fields = _map_fields(pairing, p, neg_threshold, pos_threshold, function)
    grad = _upstream(grad, NUM_PAIR_MAP_STATS, pairing.shape[0])
    made = empty_gradients(pairing, needs)
    if 0 in pairing.shape:
        return _nothing(made)
    _C.pair_map_cpu(  # type: ignore[union-attr]
        pairing=p.native, **fields, table=0,
        grad=pointer(grad), gradients=addresses(made), isa=backend_cpp.ISA,
    )  # fmt: skip
    return made


# ---------------------------------------------------------------------------------------------- pair_histogram


def _check_bins(bins: int, step: float) -> None:
    if bins < 2 or not step > 0:
        raise ValueError(f"a histogram has at least 2 bins and a positive step, got bins={bins}, step={step}")


@kernel("pair_histogram", "cpp", why_not)
def pair_histogram(*args: Any) -> Tensor:
    """The table [2, bins] of docs/design.md."""
    _, p, (bins, first, step) = _split(args)
    _check_bins(bins, step)
    table = torch.empty(2, bins, dtype=torch.float32)
    _C.pair_histogram_cpu(  # type: ignore[union-attr]
        pairing=p.native, bins=bins, first=first, step=step, table=pointer(table), grad=0, gradients=NO_GRADIENTS,
        isa=backend_cpp.ISA,
    )  # fmt: skip
    return table


@kernel("pair_histogram_backward", "cpp", _why_not_backward)
def pair_histogram_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, drow_scale, dcolumn_scale)."""
    pairing, p, (bins, first, step, needs) = _split(args)
    _check_bins(bins, step)
    grad = _upstream(grad, 2, bins)
    made = empty_gradients(pairing, needs)
    if 0 in pairing.shape:
        return _nothing(made)
    _C.pair_histogram_cpu(  # type: ignore[union-attr]
        pairing=p.native, bins=bins, first=first, step=step, table=0, grad=pointer(grad), gradients=addresses(made),
        isa=backend_cpp.ISA,
    )  # fmt: skip
    return made


# ---------------------------------------------------------------------------------------------- row_topk


def _why_not_topk(*args: Any) -> str | None:
    if args[1].shape[0] >= 2**31:
        return f"counts columns with 32 bits, got {args[1].shape[0]}"
    return why_not(*args)


@kernel("row_topk", "cpp", _why_not_topk)
def row_topk(*args: Any) -> tuple[Tensor, Tensor]:
    """(values [M, count], columns [M, count]) of docs/design.md."""
    pairing, p, (count, classes) = _split(args)
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if classes not in (PairClasses.NEGATIVE, PairClasses.POSITIVE, PairClasses.BOTH):
        raise ValueError(f"classes must be 1 (negatives), 2 (positives) or 3 (both), got {classes}")
    values = torch.empty(pairing.shape[0], count, dtype=torch.float32)
    columns = torch.empty(pairing.shape[0], count, dtype=torch.int64)
    _C.row_topk_cpu(  # type: ignore[union-attr]
        pairing=p.native, count=count, classes=int(classes), values=pointer(values), columns=pointer(columns),
        isa=backend_cpp.ISA,
    )  # fmt: skip
    return values, columns
