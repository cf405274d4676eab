"""The pair kernels of the `cpp` backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend_cpp, kept_memory
from ..compiled import _C, pointer
from ..contract import NUM_PAIR_COLUMN_STATS, NUM_PAIR_STATS, PairNeeds, PairWant
from ..registry import kernel
from .compiled import CompiledPairing, why_not_pairing
from .pairing import PAIRING_LENGTH, Pairing

#: Beyond, a power of a second scale leaves float32 where the first does not.
MOST_SECOND = 100.0


def why_not(*args: Any) -> str | None:
    """Why no kernel can take a pair op with these arguments, or None."""
    p = Pairing(*args[:PAIRING_LENGTH])
    return backend_cpp._missing(p.q) or why_not_pairing(p)


def kept_floats(m: int, n: int) -> int:
    """The `keep` of pair_stats with which a backward finds every <q, k> of an m x n matrix; less keeps a part."""
    return _C.pair_kept_floats(m, n)  # type: ignore[union-attr]


def _launch(p: CompiledPairing, boost: Tensor | None, margin: Tensor | None, **fields: Any) -> None:
    _C.pair_stats_cpu(  # type: ignore[union-attr]
        pairing=p.native, boost=p.address(boost, torch.float32), margin=p.address(margin, torch.float32),
        isa=backend_cpp.ISA, **fields,
    )  # fmt: skip


def why_not_stats(*args: Any) -> str | None:
    """Why the kernel cannot take pair_stats with these arguments, or None."""
    second = args[PAIRING_LENGTH + 3] if len(args) > PAIRING_LENGTH + 3 else 1.0
    if second > MOST_SECOND:  # its powers are relative to a whole exponent, half of one away from the maximum
        return f"takes a second scale up to {MOST_SECOND}, got {second}"
    return why_not(*args)


def _check_rows(m: int, n: int, **given: Tensor | None) -> None:
    """The kernel reads vectors and tables by the shape of the pairing: shorter ones would be read out of bounds."""
    shapes: dict[str, tuple[int, ...]] = {"rows": (NUM_PAIR_STATS, m), "row_grad": (NUM_PAIR_STATS, m)}
    for name, x in given.items():
        wide = (NUM_PAIR_COLUMN_STATS, n) if name in ("columns", "column_grad") else None
        shape = wide or shapes.get(name, (m,))
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")


@kernel("pair_stats", "cpp", why_not_stats)
def pair_stats(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, kept) of docs/design.md."""
    pairing, (boost, margin, want, second, keep) = Pairing(*args[:PAIRING_LENGTH]), args[PAIRING_LENGTH:]
    p, (m, n) = CompiledPairing(pairing), pairing.shape
    _check_rows(m, n, boost=boost, margin=margin)
    rows = torch.empty(NUM_PAIR_STATS, m, dtype=torch.float32, device="cpu")
    columns = torch.empty(NUM_PAIR_COLUMN_STATS, n if want & PairWant.COLUMNS else 0, dtype=torch.float32, device="cpu")
    kept = kept_memory.empty((keep,), torch.float32)
    _launch(
        p, boost, margin, want=int(want), second=second, rows=pointer(rows), columns=pointer(columns),
        kept=pointer(kept), keep=keep,
    )  # fmt: skip
    return rows, columns, kept


def empty_gradients(p: Pairing, needs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, drow_scale, dcolumn_scale), each empty where `needs` has not its flag."""
    m, n = p.shape
    scales = (m if needs & PairNeeds.ROW_SCALE else 0, n if needs & PairNeeds.COLUMN_SCALE else 0)
    return (
        kept_memory.empty(tuple(p.q.shape) if needs & PairNeeds.Q else (0,), p.q.dtype),
        kept_memory.empty(tuple(p.k.shape) if needs & PairNeeds.K else (0,), p.k.dtype),
        torch.empty(scales[0], dtype=torch.float32, device="cpu"),
        torch.empty(scales[1] if p.column_scale is not None else 0, dtype=torch.float32, device="cpu"),
    )


def addresses(gradients: tuple[Tensor, ...]) -> tuple[int, ...]:
    """0 for those that are not needed."""
    return tuple(pointer(g) if g.numel() else 0 for g in gradients)


@kernel("pair_stats_backward", "cpp", lambda row_grad, column_grad, rows, columns, kept, *args: why_not_stats(*args))
def pair_stats_backward(
    row_grad: Tensor, column_grad: Tensor, rows: Tensor, columns: Tensor, kept: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, drow_scale, dcolumn_scale)."""
    pairing, (boost, margin, want, second, _keep, needs) = Pairing(*args[:PAIRING_LENGTH]), args[PAIRING_LENGTH:]
    p, (m, n) = CompiledPairing(pairing), pairing.shape
    n = n if want & PairWant.COLUMNS else 0
    _check_rows(
        m, n, boost=boost, margin=margin, rows=rows, row_grad=row_grad, columns=columns, column_grad=column_grad
    )
    gradients = empty_gradients(pairing, needs)
    if 0 in pairing.shape:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    f32 = torch.float32
    _launch(
        p, boost, margin, want=int(want), second=second, rows=p.address(rows, f32), columns=p.address(columns, f32),
        row_grad=p.address(row_grad, f32), column_grad=p.address(column_grad, f32), gradients=addresses(gradients),
        kept=pointer(kept), keep=kept.numel(),
    )  # fmt: skip
    return gradients


from . import cpp_edges, cpp_maps  # noqa: E402,F401  (they register their kernels)
