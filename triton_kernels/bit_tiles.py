"""What the one-bit and low-bit kernels share: rounding, bits of a tile, parameters of rows and channels, walks over a matrix.

docs/design.md, "The bit contract", says what every number is. Kernels are launched without fused multiply-adds: each step is
rounded to fp32, as the contract has it, and codes are equal on every backend.

A matrix [rows, columns] is walked in tiles, along its rows or down its columns, by `across x splits` programs. A sum is kept in
registers on the way, written once for each program, and added up in a second stage: the order is fixed, there are no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import wide

#: How the parameter of an element is found: by its row, by its column, by both.
OF_ROWS, OF_COLUMNS, OF_EACH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WARPS = 4
#: Numbers of a tile: 16 a thread.
ELEMENTS = 2048
#: Programs that fill any GPU. Not a property of the one at hand: sums do not depend on it.
PROGRAMS = 2048
#: Column indices are 32 bits.
LARGEST = 1 << 30
LAUNCH = dict(num_warps=WARPS, enable_fp_fusion=False)


@triton.jit
def round_half_even(x):
    """rne(x): beyond 2^23 a float has no fraction, and adding 2^23 rounds. The interpreter has no libdevice, and the
    machine's own instruction runs at an eighth of the rate of an addition."""
    a = tl.abs(x)
    r = (a + 8388608.0) - 8388608.0
    return tl.where(a < 8388608.0, tl.where(x < 0, -r, r), x)


@triton.jit
def packed_bytes(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(bytes [ROWS, COLUMNS / 8], lowest bit first; the ones of each row): both from one sum of eight numbers."""
    place = tl.arange(0, COLUMNS) % 8
    word = tl.where(bits, (65536 + (1 << place))[None, :], 0)
    word = tl.sum(tl.reshape(word, [ROWS, COLUMNS // 8, 8]), 2)
    return (word & 255).to(tl.uint8), tl.sum(word >> 16, 1)


@triton.jit
def unpacked_bits(plane, r, keep, column, row_bytes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 0 and 1 [ROWS, COLUMNS] of the rows r of a plane, from `column` (a multiple of 8) on; 0 outside."""
    byte = column // 8 + tl.arange(0, COLUMNS // 8)
    inside = keep[:, None] & (byte < row_bytes)[None, :]
    word = tl.load(plane + r[:, None] * row_bytes + byte[None, :], mask=inside, other=0).to(tl.int32)
    return tl.reshape(word[:, :, None] >> tl.arange(0, 8)[None, None, :] & 1, [ROWS, COLUMNS])


@triton.jit
def store_bytes(plane, found, r, keep, column, row_bytes, COLUMNS: tl.constexpr):
    """The bytes of a tile that begins at `column`."""
    byte = column // 8 + tl.arange(0, COLUMNS // 8)
    tl.store(plane + r[:, None] * row_bytes + byte[None, :], found, mask=keep[:, None] & (byte < row_bytes)[None, :])


@triton.jit
def parameter(p, r, c, keep_r, keep_c, groups, inner, columns, stride, FORM: tl.constexpr):
    """The number of (i div inner) mod groups for elements i = r columns + c; stride 0: one number for all."""
    if FORM == OF_ROWS:  # inner is a multiple of the columns
        index = r // (inner // columns) % groups
        return tl.load(p + index * stride, mask=keep_r, other=1.0)[:, None]
    elif FORM == OF_COLUMNS:  # the columns are a multiple of groups * inner
        index = c // inner % groups
        return tl.load(p + index * stride, mask=keep_c, other=1.0)[None, :]
    else:
        begin = r * columns
        index = (begin // inner % groups)[:, None] + ((begin % inner)[:, None] + c[None, :]) // inner
        return tl.load(p + index % groups * stride, mask=keep_r[:, None] & keep_c[None, :], other=1.0)


@triton.jit
def tile_start(step, steps, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOWN: tl.constexpr):
    """(first row, first column) of a step of this program's walk."""
    along = tl.program_id(1) * steps + step
    across = tl.program_id(0)
    if DOWN:
        return wide(along) * ROWS, across * COLUMNS
    else:
        return wide(across) * ROWS, along * COLUMNS


@triton.jit
def store_sum(sums, total, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOWN: tl.constexpr):
    """sums [splits, columns] of a walk down, [splits, rows] of one along rows."""
    if DOWN:
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(sums + wide(tl.program_id(1)) * columns + c, tl.sum(total, 0), mask=c < columns)
    else:
        r = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        tl.store(sums + wide(tl.program_id(1)) * rows + r, tl.sum(total, 1), mask=r < rows)


class Walk(NamedTuple):
    """Tiles of a matrix, and the programs that walk over them."""

    rows: int  # of a tile
    columns: int
    across: int  # programs side by side
    splits: int  # programs one behind the other
    steps: int  # tiles of each

    @property
    def grid(self) -> tuple[int, int]:
        return self.across, self.splits


def walk(rows: int, columns: int, down: bool = False, elements: int = ELEMENTS) -> Walk:
    """A walk over [rows, columns]; bits of a tile are whole bytes."""
    wide_columns, tall = max(8, triton.next_power_of_2(columns)), triton.next_power_of_2(max(rows, 1))
    tile_columns = min(512, wide_columns)
    tile_rows = min(tall, elements // tile_columns)
    if not down:  # few rows: longer tiles
        tile_columns = min(wide_columns, elements // tile_rows)
    along, across = triton.cdiv(columns, tile_columns), triton.cdiv(rows, tile_rows)
    if down:
        along, across = across, along
    splits = max(1, min(along, triton.cdiv(PROGRAMS, max(across, 1))))
    steps = triton.cdiv(along, splits)
    return Walk(tile_rows, tile_columns, across, max(1, triton.cdiv(along, max(steps, 1))), steps)


def form(columns: int, groups: int, inner: int) -> int:
    """How parameters lie over a matrix of so many columns."""
    if groups == 1 or inner % max(columns, 1) == 0:
        return OF_ROWS.value
    return OF_COLUMNS.value if columns % (groups * inner) == 0 else OF_EACH.value


def period(columns: int, groups: int, inner: int) -> int:
    """`inner` as the kernels divide by it: a parameter of all elements has no period of its own."""
    return max(columns if groups == 1 else inner, 1)


def stride(parameter: Tensor | None) -> int:
    """0 for a parameter of one number."""
    return 0 if parameter is None or parameter.numel() == 1 else 1


def add_up(partial: Tensor, groups: int, inner: int, found: int, columns: int) -> Tensor:
    """float32 [groups] from the sums of rows or of columns [splits, n], or from single terms [rows, columns]."""
    if groups == 1:
        inner = 1
    elif found == OF_ROWS.value:
        inner //= max(columns, 1)
    splits = 1 if found == OF_EACH.value else partial.shape[0]
    return partial.reshape(splits, -1, groups, inner).sum((0, 1, 3), dtype=torch.float64).float()


def matrix(x: Tensor) -> Tensor:
    """x with columns that lie side by side: kernels take a stride for rows only."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
