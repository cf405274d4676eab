"""The pair kernels of the `triton` backend. triton is imported when a launch is due, not with fastloss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend_triton import _missing
from ..compiled import DTYPES
from ..registry import kernel
from .pairing import PAIRING_LENGTH, Pairing, check_pairing

#: Rows and columns are counted in 32 bits.
LARGEST = (1 << 31) - (1 << 16)


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
    if not all(0 < size < LARGEST for size in p.shape):
        return f"takes 1 to {LARGEST - 1} rows and columns, got {p.shape}"
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
