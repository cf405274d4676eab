"""`row_topk`, `edge_dot` and `edge_sum` in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract import PairClasses
from ..reference import INF, accumulator
from ..registry import kernel
from .scores import BLOCK, blocks, split


@kernel("row_topk", "reference")
@torch.no_grad()
def row_topk(*args: Any) -> tuple[Tensor, Tensor]:
    """(values [M, count], columns [M, count]) of docs/design.md."""
    p, (count, classes) = split(args)
    m, n = p.shape
    values = p.q.new_full((m, count), -INF, dtype=p.statistic_dtype)
    columns = torch.full((m, count), -1, dtype=torch.int64, device=p.device)
    if n == 0 or count == 0:
        return values, columns
    for s in blocks(p):
        member = torch.zeros_like(s.negative)
        if classes & PairClasses.NEGATIVE:
            member = member | s.negative
        if classes & PairClasses.POSITIVE:
            member = member | s.positive
        top, index = torch.where(member, s.z, -INF).sort(dim=1, descending=True, stable=True)
        # A member may be -inf as well: members come before what is none.
        found, order = torch.gather(member, 1, index).sort(dim=1, descending=True, stable=True)
        found, top, index = (x[:, :count] for x in (found, top.gather(1, order), index.gather(1, order)))
        rows, width = slice(s.start, s.stop), top.shape[1]
        values[rows, :width] = torch.where(found, top, -INF)
        columns[rows, :width] = torch.where(found, index, -1)
    return values, columns


# ---------------------------------------------------------------------------------------------- edges


@kernel("edge_dot", "reference")
@torch.no_grad()
def edge_dot(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """<q_r, k_c> of each edge, a block of edges at a time."""
    step = max(1, BLOCK // max(q.shape[1], 1))
    parts = [
        (accumulator(q[rows[e : e + step]]) * accumulator(k[columns[e : e + step]])).sum(1)
        for e in range(0, rows.shape[0], step)
    ]
    return torch.cat(parts) if parts else q.new_zeros(0, dtype=torch.promote_types(q.dtype, torch.float32))


@kernel("edge_sum", "reference")
@torch.no_grad()
def edge_sum(x: Tensor, weight: Tensor, pointer: Tensor, source: Tensor) -> Tensor:
    """sum over e in pointer_i..pointer_{i+1} of weight_e x_(source_e)."""
    m, edges = pointer.shape[0] - 1, source.shape[0]
    out = x.new_zeros((m, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    row = torch.searchsorted(pointer, torch.arange(edges, device=x.device), right=True) - 1
    step = max(1, BLOCK // max(x.shape[1], 1))
    for e in range(0, edges, step):
        part = slice(e, e + step)
        out.index_add_(0, row[part], weight[part, None].to(out.dtype) * accumulator(x[source[part]]))
    return out.to(x.dtype)
