"""How the compiled edge kernels are called, whatever the backend: csrc/pair_stats.h's EdgeDot and EdgeSum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compiled import _C, DTYPES, pointer


def why_not_edges(x: Tensor, *_: Any) -> str | None:
    """Why a compiled edge kernel cannot take these operands, or None."""
    if x.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16, got {x.dtype}"
    return None


def _ids(name: str, ids: Tensor) -> Tensor:
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 with one dimension, got {ids.dtype} {tuple(ids.shape)}")
    return ids.contiguous()


def _operand(name: str, x: Tensor) -> Tensor:
    if x.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got {tuple(x.shape)}")
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


class EdgeDotCall:
    """One call of `edge_dot`: `args` for the kernel, `dots` its result. It keeps alive what `args` points to."""

    def __init__(self, q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> None:
        q, k, rows, columns = _operand("q", q), _operand("k", k), _ids("rows", rows), _ids("columns", columns)
        if q.shape[1] != k.shape[1] or q.dtype != k.dtype:
            given = f"{q.dtype} {tuple(q.shape)} and {k.dtype} {tuple(k.shape)}"
            raise ValueError(f"q and k must be [M, D] and [N, D] of one dtype, got {given}")
        if rows.shape != columns.shape:
            raise ValueError(f"rows and columns must be [E] both, got {tuple(rows.shape)} and {tuple(columns.shape)}")
        self.dots = torch.empty(len(rows), dtype=torch.float32, device=q.device)
        self.kept = (q, k, rows, columns)
        self.args = _C.EdgeDot(  # type: ignore[union-attr]
            q=pointer(q), k=pointer(k), m=q.shape[0], n=k.shape[0], d=q.shape[1], ldq=q.stride(0), ldk=k.stride(0),
            edges=len(rows), rows=pointer(rows), columns=pointer(columns), dots=pointer(self.dots),
            dtype=DTYPES[q.dtype],
        )  # fmt: skip


class EdgeSumCall:
    """One call of `edge_sum`: `args` for the kernel, `sums` its result. It keeps alive what `args` points to."""

    def __init__(self, x: Tensor, weight: Tensor, row_pointer: Tensor, source: Tensor) -> None:
        x, row_pointer, source = _operand("x", x), _ids("pointer", row_pointer), _ids("source", source)
        weight = weight.to(torch.float32).contiguous()
        if weight.shape != source.shape:
            raise ValueError(f"weight and source must be [E] both, got {tuple(weight.shape)} and {tuple(source.shape)}")
        if not len(row_pointer):
            raise ValueError("pointer must be [M + 1], got [0]")
        m, d = len(row_pointer) - 1, x.shape[1]
        self.sums = torch.empty(m, d, dtype=x.dtype, device=x.device)
        self.kept = (x, weight, row_pointer, source)
        self.args = _C.EdgeSum(  # type: ignore[union-attr]
            x=pointer(x), weight=pointer(weight), pointer=pointer(row_pointer), source=pointer(source),
            sums=pointer(self.sums), m=m, n=x.shape[0], d=d, ldx=x.stride(0), edges=len(source), dtype=DTYPES[x.dtype],
        )  # fmt: skip
