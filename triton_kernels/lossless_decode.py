"""lossless_decode: a range of a blob's numbers (docs/design.md, "The lossless contract"); R8's streams are in r8_decode.py.

P7 in bf16, 4096 x 4096 on an H200: 24 MB read, 34 MB written, 58 MB: 14 us at the speed of memory. A pair costs two byte loads of
codes and two of a table that lies in two lines of L1, some 2 loads and 12 integer instructions a number: 8-12 us of issue,
which hide behind the memory; 16-24 us are predicted. fp16 loads three bits a number besides: 20-32 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device, wide
from .lossless_numbers import (
    BLOCK,
    CODES,
    ESCAPE_OFFSETS,
    ESCAPE_POSITIONS,
    ESCAPE_VALUES,
    FP16,
    INTEGERS,
    P7,
    PAIRS,
    RAW,
    RAW_BYTES,
    TABLE,
    UNIT_PAIRS,
    Plan,
    decoded_pair,
    escapes_of,
    matrix_of,
    place_in_unit,
)
from .r8_decode import r8_numbers

CHUNK = 1024  # pairs; a unit of the `tiles` layout
ESCAPES = 128
WARPS = 4


@triton.jit
def unit_place(unit, columns):
    """Where the first number of a unit of 16 x 128 stands in the row-major matrix."""
    across = columns // 128
    return unit // across * (16 * wide(columns)) + unit % across * 128


@triton.jit
def decode_chunk(table, codes, bytes0, bytes1, bytes2, bits, out, chunk, base, count, low, high, before, columns,
                 NUMBER: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """CHUNK pairs of a block from pair `chunk` on; the first has number `base`. WHOLE: all of them are wanted."""
    p = chunk + tl.arange(0, CHUNK)
    if WHOLE:
        keep = tl.full([CHUNK], 1, tl.int1)
    else:
        keep = p < count // 2
    first, second = decoded_pair(table, codes, bytes0, bytes1, bytes2, bits, p, p, count // 8, keep, NUMBER)
    kind = out.dtype.element_ty
    first, second = first.to(kind), second.to(kind)
    if TILES:  # a unit, and ranges hold whole ones
        r, c = tl.arange(0, 16), tl.arange(0, 128)
        out += unit_place(before + base // 2048, columns) - wide(before) * 2048 - low
        tl.store(out + r[:, None] * columns + c[None, :], tl.interleave(matrix_of(first, 16), matrix_of(second, 16)))
    else:
        j = base + tl.arange(0, 2 * CHUNK)
        if WHOLE:
            tl.store(out + (j - low), tl.interleave(first, second))
        else:
            tl.store(out + (j - low), tl.interleave(first, second), mask=(j >= low) & (j < high))


@triton.jit
def write_escapes(offsets, positions, values, out, block, total, low, high, before, columns, TILES: tl.constexpr,
                  STEP: tl.constexpr):  # fmt: skip
    """Write a block's escapes over what its codes gave; what lies outside the block or the range is left out."""
    at, end = escapes_of(offsets, block, total)
    for i in range(at, end, STEP):
        e = i + tl.arange(0, STEP)
        live = e < end
        place = tl.load(positions + e, mask=live, other=0).to(tl.int32) & 0xFFFF
        live = live & (place < PAIRS)
        for half in tl.static_range(2):
            n = wide(block) * BLOCK + 2 * place + half
            if TILES:
                row, pair = place_in_unit(place % UNIT_PAIRS)
                to = unit_place(before + n // 2048, columns) - wide(before) * 2048 - low
                to += row * columns + 2 * pair + half
            else:
                to = n - low
            inside = live & (n >= low) & (n < high)
            tl.store(out + to, tl.load(values + 2 * e + half, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=["numel", "high", "total", "before"])
def p7_decode_kernel(table, codes, offsets, positions, values, bytes0, bytes1, bytes2, bits, out, numel, low, high, total,
                     before, columns, NUMBER: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr,
                     STEP: tl.constexpr):  # fmt: skip
    """A program decodes one block. Numbers are counted from the first block on; `before` units of tiles lie before it."""
    block = tl.program_id(0)
    start = wide(block) * BLOCK
    count = tl.minimum(tl.cdiv(wide(numel) - start, 128) * 128, BLOCK).to(tl.int32)
    codes += wide(block) * 7168
    if bytes0 is not None:
        bytes0 += wide(block) * PAIRS
    if bytes1 is not None:
        bytes1 += wide(block) * PAIRS
    if bytes2 is not None:
        bytes2 += wide(block) * PAIRS
    if NUMBER == FP16:
        bits += wide(block) * (3 * BLOCK // 8)
    for chunk in range(0, count // 2, CHUNK):
        base = start + 2 * chunk
        if (base >= low) & (base + 2 * CHUNK <= high):
            decode_chunk(table, codes, bytes0, bytes1, bytes2, bits, out, chunk, base, count, low, high, before, columns,
                         NUMBER, TILES, True, CHUNK)  # fmt: skip
        elif (base + 2 * CHUNK > low) & (base < high):
            decode_chunk(table, codes, bytes0, bytes1, bytes2, bits, out, chunk, base, count, low, high, before, columns,
                         NUMBER, TILES, False, CHUNK)  # fmt: skip
    if positions is not None:
        tl.debug_barrier()  # the other threads' stores come first
        write_escapes(offsets, positions, values, out, block, total, low, high, before, columns, TILES, STEP)


def p7_parts(p: Plan, first_block: int, dtype: torch.dtype) -> tuple[list[Tensor | None], int]:
    """What the kernels of P7 read of the blocks from first_block on, and the number of escapes in all."""
    skip = first_block * BLOCK.value
    positions = p.section(ESCAPE_POSITIONS, torch.int16)
    parts = [
        p.section(TABLE), p.section(CODES, skip=skip // 128 * 56), p.section(ESCAPE_OFFSETS, torch.int64, 8 * first_block),
        positions, p.section(ESCAPE_VALUES, INTEGERS[dtype.itemsize]), *p.byte_planes(skip, torch.int16), p.bits(skip),
    ]  # fmt: skip
    return parts, 0 if positions is None else positions.numel()


def lossless_decode(p: Plan, first: int, count: int, dtype: torch.dtype, sequence: bool = False) -> Tensor:
    """Numbers first..first+count in row-major order, or in the blob's own."""
    if p.codec == RAW:
        raw = p.section(RAW_BYTES)
        assert raw is not None or not count  # check_plan
        return p.blob.new_empty(0, dtype=dtype) if raw is None else raw.view(dtype)[first : first + count].clone()
    out = torch.empty(count, dtype=dtype, device=p.blob.device)
    if not count:
        return out
    start = first // BLOCK.value
    blocks = triton.cdiv(first + count, BLOCK.value) - start
    low = first - start * BLOCK.value
    store = out.view(INTEGERS[dtype.itemsize])
    with on_device(out):
        if p.codec != P7:
            r8_numbers(p, start, blocks, store, low, low + count)
            return out
        parts, total = p7_parts(p, start, dtype)
        p7_decode_kernel[(blocks,)](
            *parts, store, p.numel - start * BLOCK.value, low, low + count, total, 8 * start, p.columns,
            NUMBER=p.number, TILES=p.tiles and not sequence, CHUNK=CHUNK, STEP=ESCAPES, num_warps=WARPS,
        )  # fmt: skip
    return out
