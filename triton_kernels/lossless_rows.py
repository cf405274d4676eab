"""lossless_rows: rows of a matrix by index, of which only the groups (P7) or blocks (R8) that they touch are decoded.

P7: a program makes 512 columns of a row and looks through the escapes of their block or two (some hundred entries). 4,096 rows
of 4,096 in bf16 on an H200: 24 MB read and 34 MB written: 25-40 us predicted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device, wide
from .lossless_decode import ESCAPES, p7_parts
from .lossless_numbers import BLOCK, FP16, INTEGERS, P7, PAIRS, RAW, RAW_BYTES, Plan, decoded_pair, escapes_of
from .r8_decode import r8_numbers

CHUNK = 512


@triton.jit
def row_of(index, i, rows):
    """(the i-th row, whether there is one of this number): a row that there is not reads row 0 and becomes NaN."""
    row = wide(tl.load(index + i))
    good = (row >= 0) & (row < rows)
    return tl.where(good, row, 0), good


@triton.jit(do_not_specialize=["numel", "rows", "columns", "total"])
def p7_rows_kernel(table, codes, offsets, positions, values, bytes0, bytes1, bytes2, bits, index, out, numel, rows, columns,
                   total, NUMBER: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    i = wide(tl.program_id(0))
    row, good = row_of(index, i, rows)
    column = tl.program_id(1) * CHUNK
    width = tl.minimum(columns - column, CHUNK)
    c = tl.arange(0, CHUNK)
    keep = c < width
    first = row * columns + column
    group = first // 128
    codes += group * 56
    if bytes0 is not None:
        bytes0 += group * 64
    if bytes1 is not None:
        bytes1 += group * 64
    if bytes2 is not None:
        bytes2 += group * 64
    place = (first - group * 128).to(tl.int32) + c
    local, size = place, place  # what only bit planes need
    if NUMBER == FP16:
        block = (first + c) // BLOCK
        bits += block * (3 * BLOCK // 8)
        local = (first + c - block * BLOCK).to(tl.int32)
        size = (tl.minimum(tl.cdiv(wide(numel) - block * BLOCK, 128) * 128, BLOCK) // 8).to(tl.int32)
    even, odd = decoded_pair(table, codes, bytes0, bytes1, bytes2, bits, place // 2, local // 2, size, keep, NUMBER)
    out += i * columns + column
    value = tl.where(good, tl.where(place % 2 == 0, even, odd), -1)
    tl.store(out + c, value.to(out.dtype.element_ty), mask=keep)
    if positions is not None:
        tl.debug_barrier()  # the other threads' stores come first
        for b in range(first // BLOCK, (first + width - 1) // BLOCK + 1):
            at, end = escapes_of(offsets, b, total)
            end = tl.where(good, end, at)
            for k in range(at, end, STEP):
                e = k + tl.arange(0, STEP)
                live = e < end
                pair = tl.load(positions + e, mask=live, other=0).to(tl.int32) & 0xFFFF
                live = live & (pair < PAIRS)
                for half in tl.static_range(2):
                    to = wide(b) * BLOCK + 2 * pair + half - first
                    inside = live & (to >= 0) & (to < width)
                    tl.store(out + to, tl.load(values + 2 * e + half, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=["rows", "columns"])
def gather_kernel(blocks, slots, index, out, rows, columns, CHUNK: tl.constexpr):
    """Rows from decoded blocks: block b lies at slots[b]."""
    i = wide(tl.program_id(0))
    row, good = row_of(index, i, rows)
    c = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    keep = c < columns
    n = row * columns + c
    slot = wide(tl.load(slots + n // BLOCK, mask=keep, other=0))
    value = tl.load(blocks + slot * BLOCK + n % BLOCK, mask=keep, other=0)
    tl.store(out + i * columns + c, tl.where(good, value.to(tl.int32), -1).to(out.dtype.element_ty), mask=keep)


def touched_blocks(p: Plan, index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(which [slots]: the blocks that rows touch, rising, then -1; slots [blocks]: where each of them stands), without asking the
    device for their number."""
    columns, blocks = p.columns, triton.cdiv(p.numel, BLOCK.value)
    first = torch.where((index >= 0) & (index < rows), index, 0).to(torch.int64) * columns
    spans = (columns - 1) // BLOCK.value + 2  # blocks that a row may touch
    steps = torch.arange(spans, device=index.device)
    numbers = torch.minimum(first[:, None] // BLOCK.value + steps, (first + columns - 1)[:, None] // BLOCK.value)
    touched = torch.zeros(blocks, dtype=torch.int32, device=index.device)
    touched[numbers.reshape(-1)] = 1
    slots = touched.cumsum(0, dtype=torch.int32) - 1
    count = min(blocks, numbers.numel())
    which = torch.full((count + 1,), -1, dtype=torch.int32, device=index.device)
    to = torch.where(touched > 0, slots, count).to(torch.int64)
    which[to] = torch.arange(blocks, dtype=torch.int32, device=index.device)
    return which[:count], slots.clamp(min=0)


def lossless_rows(p: Plan, index: Tensor, dtype: torch.dtype) -> Tensor:
    """[len(index), columns]; a row that there is not is filled with ones, a NaN."""
    rows, columns = p.plan[4], p.columns
    integer = INTEGERS.get(dtype.itemsize, torch.int64)
    out = torch.empty((index.shape[0], columns), dtype=dtype, device=p.blob.device)
    if not out.numel():
        return out
    if p.codec == RAW:
        return raw_rows(p, index, out)
    index, store = index.contiguous(), out.view(integer)
    grid = (index.shape[0], triton.cdiv(columns, CHUNK))
    with on_device(out):
        if p.codec == P7:
            parts, total = p7_parts(p, 0, dtype)
            p7_rows_kernel[grid](
                *parts, index, store, p.numel, rows, columns, total, NUMBER=p.number, CHUNK=CHUNK, STEP=ESCAPES, num_warps=8,
            )  # fmt: skip
            return out
        which, slots = touched_blocks(p, index, rows)
        blocks = torch.empty(which.numel() * BLOCK.value, dtype=integer, device=out.device)
        r8_numbers(p, 0, which.numel(), blocks, 0, blocks.numel(), which)
        gather_kernel[grid](blocks, slots, index, store, rows, columns, CHUNK=CHUNK, num_warps=4)
    return out


def raw_rows(p: Plan, index: Tensor, out: Tensor) -> Tensor:
    """Rows of a matrix that is stored as it is, as bytes: nothing that moves them touches a NaN's payload."""
    raw = p.section(RAW_BYTES)
    rows = p.plan[4]
    if raw is None:  # nothing is stored, so no row exists
        return out.view(torch.uint8).fill_(255).view(out.dtype)
    good = (index >= 0) & (index < rows)
    found = raw.reshape(rows, -1)[torch.where(good, index, 0).to(torch.int64)]
    return torch.where(good[:, None], found, 255).view(out.dtype).reshape(out.shape)
