"""Positives given as a list of edges (row, column): as the bits of a mask, sampled, counted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import can_look
from ..pairs import PairMask

_SIGN_BIT = torch.iinfo(torch.int32).min


def check_edges(rows: Tensor, columns: Tensor, weight: Tensor | None = None) -> None:
    """Raise for edges that are not two lists of integers of one length (`edge_dot` looks at their range)."""
    for name, ids in (("rows", rows), ("columns", columns)):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if rows.dim() != 1 or rows.shape != columns.shape:
        raise ValueError(f"rows and columns must be [E] both, got {list(rows.shape)} and {list(columns.shape)}")
    if weight is not None and weight.shape != rows.shape:
        raise ValueError(f"weight must be [{rows.shape[0]}], got {list(weight.shape)}")
    if weight is not None and can_look(weight) and weight.numel() and not bool((weight >= 0).all()):
        raise ValueError(f"weight must be >= 0, got {float(weight.detach().min())}")


def rows_of(pointer: Tensor, edges: int) -> Tensor:
    """The row of each edge of a CSR list with the given pointer [M + 1]."""
    return torch.repeat_interleave(
        torch.arange(pointer.shape[0] - 1, device=pointer.device), pointer.diff(), output_size=edges
    )


def edge_mask(rows: Tensor, columns: Tensor, m: int, n: int) -> PairMask:
    """The pairs that the edges name, packed 32 to an int32 [m, ceil(n / 32)]; an edge given twice counts once."""
    words = -(-n // 32)
    rows, columns = rows.long(), columns.long()
    order = torch.argsort(rows * n + columns)
    rows, columns = rows[order], columns[order]
    again = torch.zeros_like(rows, dtype=torch.bool)
    again[1:] = (rows[1:] == rows[:-1]) & (columns[1:] == columns[:-1])
    bit = torch.bitwise_left_shift(torch.ones_like(columns), columns % 32)
    bit = torch.where(bit == -_SIGN_BIT, _SIGN_BIT, bit).masked_fill(again, 0).to(torch.int32)
    bits = torch.zeros(m * words, dtype=torch.int32, device=rows.device)
    return PairMask(bits.index_add_(0, rows * words + columns // 32, bit).view(m, words))


def sample_edges(rows: Tensor, m: int, weight: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """bool [E]: one edge of each row, drawn in proportion to the weights (alike without), by the largest Gumbel key."""
    uniform = torch.rand(rows.shape[0], dtype=torch.float64, device=rows.device, generator=generator)
    key = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    if weight is not None:
        key = key + weight.double().log()
    best = key.new_full((m,), -torch.inf).scatter_reduce(0, rows, key, "amax")
    drawn = (key == best[rows]) & (key > -torch.inf)
    place = torch.arange(rows.shape[0], device=rows.device)
    last = place.new_full((m,), -1).scatter_reduce(0, rows, place.masked_fill(~drawn, -1), "amax")
    return drawn & (place == last[rows])  # one even if two keys are equal


def row_counts(rows: Tensor, chosen: Tensor | None, m: int, dtype: torch.dtype) -> Tensor:
    """How many (chosen) edges each row has, [m]."""
    one = torch.ones(rows.shape[0], dtype=dtype, device=rows.device)
    return torch.zeros(m, dtype=dtype, device=rows.device).index_add_(
        0, rows, one if chosen is None else chosen.to(dtype)
    )
