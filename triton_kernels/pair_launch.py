"""How the pair kernels are launched: a pairing in the form that they read, the tile, and the pairs along its diagonals."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import on_device
from .linear_row_stats import GROUP, Tile, takes_tma
from .pair_tiles import pair_diagonal_kernel

#: What tiles carry in registers: row sums alone; column sums too; further statistics; masks; masks of bits or many; of a guide.
ROWS, BOTH, RICH, MASKED, HEAVY, GUIDED = range(6)
#: GPUs whose blocks may have more than 100 KB of shared memory.
LARGE_SHARED = ((8, 0), (9, 0), (10, 0), (10, 3))


def register_load(general: bool, guided: bool, hard: bool, extras: int, columns: bool) -> int:
    """hard: bits, or lists of the largest; extras: what else a tile looks up for its rows or columns."""
    if guided:
        return GUIDED
    if hard or (general and extras > 1):
        return HEAVY
    if general:
        return MASKED
    return RICH if extras else BOTH if columns else ROWS


def default_tile(item_size: int, load: int, gradient: bool, capability: tuple[int, int], tma: bool) -> Tile:
    """The largest tile that does not spill (tests/test_triton_pair_compile.py holds that)."""
    if item_size == 4:  # no matrix instruction multiplies in fp32
        if load <= RICH:
            return Tile(64, 64 if load == RICH else 128, 32, 8, 2)
        return Tile(64, 32, 32 if load == GUIDED else 16, 8, 2)
    depth = 64 if capability in LARGE_SHARED else 32
    major = capability[0]
    if load >= HEAVY:
        return Tile(64, 64 if major >= 9 else 32, depth, 8, 3)
    if load == ROWS and major == 9 and tma:
        return Tile(128, 256, depth, 8, 3)
    if load <= BOTH and not (gradient and major >= 10):
        return Tile(128, 128, depth, 8, 3)
    return Tile(64, 64 if gradient and major >= 9 and load == MASKED else 128, depth, 8, 3)


def numbers(x: Tensor | None) -> Tensor | None:
    """A number a row or a column, as the kernels read it."""
    return None if x is None else x.float().contiguous()


def _rows(x: Tensor) -> Tensor:
    """Rows with stride 1 inside; a copy only where they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _diagonals(offsets: list[int], m: int, n: int) -> list[int]:
    """Those that hold a pair, each once."""
    return sorted({offset for offset in offsets if -m < offset < n})


def padded(offsets: list[int], length: int) -> list[int]:
    """A list of `length`, for arguments of which only the first ones are read."""
    return (offsets + [0] * length)[:length]


class Launch:
    """A pairing, contiguous where kernels want it, and what all its launches have in common."""

    def __init__(
        self, pairing: tuple[Any, ...], tile: Tile | None, tma: bool | None, extras: int = 0, margin: Tensor | None = None,
        columns: bool = False, gradient: bool = False, ranked: bool = False, positives: bool = False,
    ) -> None:  # fmt: skip
        """extras: further numbers of the op a row, besides the margin; columns: sums of columns are wanted; ranked, positives:
        tiles make the masks of negatives, and of positives, even where the pairing alone does not ask for them."""
        (q, k, row_scale, column_scale, row_valid, column_valid, positive_rows, positive_columns, positive_diagonals,
         excluded_rows, excluded_columns, excluded_diagonals, low, high, guide_q, guide_k, guide_limit) = pairing  # fmt: skip
        self.q, self.k = _rows(q), _rows(k)
        (self.m, self.d), self.n = q.shape, k.shape[0]
        self.row_scale, self.column_scale = numbers(row_scale), numbers(column_scale)
        self.row_valid, self.column_valid, self.excluded_rows, self.excluded_columns, lists_rows, lists_columns = (
            None if t is None else t.contiguous()
            for t in (row_valid, column_valid, excluded_rows, excluded_columns, positive_rows, positive_columns)
        )
        self.positive_diagonals = _diagonals(positive_diagonals, self.m, self.n)
        self.excluded_diagonals = _diagonals(excluded_diagonals, self.m, self.n)
        guided = guide_q is not None
        guide_q, guide_k = (None if t is None else _rows(t) for t in (guide_q, guide_k))
        self.in_tile = positives or lists_rows is not None  # positives beyond diagonals
        self.removed = sorted({*self.positive_diagonals, *self.excluded_diagonals})
        self.diagonals_apart = bool(self.positive_diagonals) and not self.in_tile
        self.general = (
            ranked or self.in_tile or excluded_rows is not None or low is not None or high is not None or guided
        )
        self.processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
        self.tma = takes_tma(self.q, self.k, capability) if tma is None else tma
        bits = (lists_rows is not None and lists_columns is None) or (
            excluded_rows is not None and excluded_columns is None
        )
        if self.general:
            looked_up = (
                margin,
                column_scale,
                row_valid if column_valid is None else column_valid,
                excluded_rows,
                low,
                high,
            )
            extras += sum(x is not None for x in looked_up)
        load = register_load(self.general, guided, bits or ranked, extras, columns)
        item_size = max(q.element_size(), guide_q.element_size() if guide_q is not None else 0)
        self.tile = tile or default_tile(item_size, load, gradient, capability, self.tma)
        self.classes = (self.row_scale, self.column_scale, self.row_valid, self.column_valid, lists_rows, lists_columns,
                        self.excluded_rows, self.excluded_columns, numbers(low), numbers(high), guide_q, guide_k,
                        numbers(guide_limit))  # fmt: skip
        self.sizes = (self.m, self.n, self.d, 0 if guide_q is None else guide_q.shape[1])
        self.strides = (
            *(t.stride(0) for t in (self.q, self.k)),
            *(0 if t is None else t.stride(0) for t in (guide_q, guide_k)),
        )
        self.offsets = (*padded(self.positive_diagonals, 2), *padded(self.excluded_diagonals, 2))
        guide_is_fp32 = guide_q is not None and guide_q.dtype == torch.float32
        self.options = dict(
            GENERAL=self.general, POSITIVE=self.in_tile, PD=len(self.positive_diagonals), ED=len(self.excluded_diagonals),
            BM=self.tile.rows, BN=self.tile.columns, BK=self.tile.depth, GROUP=GROUP, EVEN_D=self.d % self.tile.depth == 0,
            TMA=self.tma, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            GUIDE_PRECISION="ieee" if guide_is_fp32 else "tf32", UPCAST=not q.is_cuda,
            num_warps=self.tile.warps, num_stages=self.tile.stages,
        )  # fmt: skip

    def operands(self) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
        """q and k, or descriptors of them for the copy engine."""
        if not self.tma:
            return self.q, self.k
        q, k = (
            TensorDescriptor.from_tensor(t, [rows, self.tile.depth])
            for t, rows in ((self.q, self.tile.rows), (self.k, self.tile.columns))
        )
        return q, k

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised fp32 on the operands' device."""
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def count_of(self, valid: Tensor | None, size: int) -> Tensor:
        """How many rows (or columns) of `size` are valid, on the device."""
        if valid is None:
            return torch.full((1,), float(size), dtype=torch.float32, device=self.q.device)
        return (valid != 0).sum(dtype=torch.float32).view(1)

    def diagonal_scores(self, margin: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """z less the margin, and 1 (or 0: no such pair), of the positives on each diagonal, [diagonals, M]."""
        if not self.diagonals_apart:
            return None, None
        scores, there = (self.empty(len(self.positive_diagonals), self.m) for _ in range(2))
        with on_device(self.q):
            pair_diagonal_kernel[(triton.cdiv(self.m, 64), len(scores))](
                self.q, self.k, self.row_scale, self.column_scale, self.row_valid, self.column_valid, self.excluded_rows,
                self.excluded_columns, margin, scores, there, *self.sizes[:3], *self.strides[:2], *self.offsets,
                ED=len(self.excluded_diagonals), BM=64, BK=64,
            )  # fmt: skip
        return scores, there
