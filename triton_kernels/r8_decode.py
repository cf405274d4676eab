"""R8: blocks of 32 interleaved rANS lanes to bytes, merged with the other planes as they come (docs/design.md).

A warp decodes a block: 512 steps, each a look-up of 4 bytes, a multiply-add, a scan over the lanes that tells each where its
next byte lies, and a store of 32 numbers. The chain of a step is some 250 cycles, so a block takes 75-100 us, and as many blocks
run side by side as the GPU holds warps (8,448 on an H200). 4096 x 4096 in bf16 (1,024 blocks): 80-110 us predicted; 100 M numbers
and more are bound by the 90-120 instructions a step, 250-330 G numbers a second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import wide
from .lossless_numbers import BIT_PLANES, BLOCK, BYTE_PLANES, FREQUENCIES0, PLANE, Plan, merged

LANES = tl.constexpr(32)
ESCAPE = tl.constexpr(256)  # the symbol
FAR = tl.constexpr(1 << 30)  # longer than any payload
BLOCKS = 4  # a program, a warp each
EACH = 64  # entries a program


@triton.jit
def r8_table_kernel(frequencies, entries, EACH: tl.constexpr):
    """entries [256], of each slot: symbol | the symbol's slots << 9 | its place among them << 18, whatever the frequencies
    sum to. A program makes EACH of them."""
    end = tl.cumsum(tl.load(frequencies + tl.arange(0, 256)).to(tl.int32), 0)
    slot = tl.program_id(0) * EACH + tl.arange(0, EACH)
    before = end[None, :] <= slot[:, None]
    symbol = tl.sum(before.to(tl.int32), 1)
    start = tl.max(tl.where(before, end[None, :], 0), 1)
    width = tl.load(frequencies + symbol, mask=symbol < ESCAPE, other=0).to(tl.int32)
    width = tl.where(symbol < ESCAPE, width, tl.maximum(256 - tl.max(end, 0), 0))
    tl.store(entries + slot, symbol | width << 9 | (slot - start) << 18)


@triton.jit
def plane_byte(plane, place, keep):
    """A byte of a plane; 0 where there is none."""
    if plane is None:
        return tl.zeros(place.shape, tl.int32)
    else:
        return tl.load(plane + place, mask=keep, other=0).to(tl.int32)


@triton.jit
def number_of(symbol, bytes0, bytes1, bytes2, bits, raw, coded, local, count, keep, NUMBER: tl.constexpr,
              PLANES: tl.constexpr, BITS: tl.constexpr, CODED: tl.constexpr):  # fmt: skip
    """The bit patterns of fields and the other planes: bit p of CODED says that byte plane p was decoded and lies at `coded`."""
    b0, b1, b2 = symbol, symbol, symbol
    if PLANES > 0:
        b0 = plane_byte(bytes0, coded if CODED & 1 else raw, keep)
    if PLANES > 1:
        b1 = plane_byte(bytes1, coded if CODED & 2 else raw, keep)
        b2 = plane_byte(bytes2, coded if CODED & 4 else raw, keep)
    e0, e1, e2, e3 = symbol, symbol, symbol, symbol
    if BITS > 0:
        # of whole blocks before this one BITS * 2048 bytes, of this one BITS planes of count / 8
        at = bits + (raw - local) // 8 * BITS + local // 8
        size = count // 8
        shift = local % 8
        e0 = tl.load(at, mask=keep, other=0).to(tl.int32) >> shift & 1
        e1 = tl.load(at + size, mask=keep, other=0).to(tl.int32) >> shift & 1
        e2 = tl.load(at + 2 * size, mask=keep, other=0).to(tl.int32) >> shift & 1
        if BITS > 3:
            e3 = tl.load(at + 3 * size, mask=keep, other=0).to(tl.int32) >> shift & 1
    return merged(symbol, b0, b1, b2, e0, e1, e2, e3, NUMBER)


@triton.jit(do_not_specialize=["size", "numel", "low", "high", "blocks"])
def r8_decode_kernel(entries, offsets, data, which, bytes0, bytes1, bytes2, bits, out, size, numel, low, high, blocks,
                     NUMBER: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr, CODED: tl.constexpr,
                     BLOCKS: tl.constexpr):  # fmt: skip
    """Slot s decodes block which[s] (s where there is no list, nothing where it is -1) to numbers s BLOCK.. of out, of which
    those in low..high are kept. Cursors count from the payload's begin and never leave it; no byte beyond DATA is read."""
    s = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    block = s
    if which is not None:
        block = tl.load(which + s, mask=s < blocks, other=-1)
    there = (s < blocks) & (block >= 0)
    block = wide(tl.where(there, block, 0))
    begin = tl.minimum(tl.maximum(tl.load(offsets + block), 0), size)
    length = tl.minimum(tl.maximum(tl.load(offsets + block + 1), 0), size) - begin
    length = tl.minimum(tl.maximum(length, 0), FAR).to(tl.int32)
    room = tl.minimum(size - begin, FAR).to(tl.int32)[:, None]  # bytes that may be read
    count = tl.minimum(tl.maximum(numel - block * BLOCK, 0), BLOCK).to(tl.int32)
    steps = tl.where(there, (count + LANES - 1) // LANES, 0)
    lane = tl.arange(0, LANES)[None, :]
    stream = data + begin[:, None]
    state = tl.load(stream + 2 * lane, mask=2 * lane < room, other=0).to(tl.int32)
    state |= tl.load(stream + 2 * lane + 1, mask=2 * lane + 1 < room, other=0).to(tl.int32) << 8
    cursor = tl.minimum(length, 2 * LANES)
    literal = length
    whole = ((count + 127) // 128 * 128)[:, None]
    for i in range(0, tl.max(steps, 0)):
        live = (i < steps)[:, None] & (lane >= 0)
        entry = tl.load(entries + (state & 255))
        symbol = entry & 511
        after = (entry >> 9 & 511) * (state >> 8) + (entry >> 18)
        need = (after < 256) & live
        escaped = (symbol == ESCAPE) & live
        marks = need.to(tl.int32) + (escaped.to(tl.int32) << 16)
        upto = tl.cumsum(marks, 1)  # both counts in one scan
        total = tl.sum(marks, 1)
        place = tl.minimum(cursor[:, None] + (upto & 0xFFFF) - 1, length[:, None])
        more = tl.load(stream + place, mask=need & (place < room), other=0).to(tl.int32)
        state = tl.where(need, after << 8 | more, after) & 0xFFFF
        back = tl.maximum(literal[:, None] - (upto >> 16), 0)
        found = tl.load(stream + back, mask=escaped & (back < room), other=0).to(tl.int32)
        symbol = tl.where(escaped, found, symbol)
        cursor = tl.minimum(cursor + (total & 0xFFFF), length)
        literal = tl.maximum(literal - (total >> 16), 0)
        local = i * LANES + lane
        raw = block[:, None] * BLOCK + local
        coded = wide(s)[:, None] * BLOCK + local
        keep = live & (coded >= low) & (coded < high) & (local < whole)
        value = number_of(symbol, bytes0, bytes1, bytes2, bits, raw, coded, local, whole, keep, NUMBER, PLANES, BITS,
                          CODED)  # fmt: skip
        tl.store(out + coded - low, value.to(out.dtype.element_ty), mask=keep)


def _stream(
    p: Plan, plane: int, first_block: int, which: Tensor | None, planes: list[Tensor | None], bits: Tensor | None, out: Tensor,
    low: int, high: int, blocks: int, number: int, coded: int = 0,
) -> None:  # fmt: skip
    """Decode one coded plane (0: the field) and merge it with the others to numbers of kind `number`."""
    kind = FREQUENCIES0 + 3 * plane
    frequencies, data = p.section(kind), p.section(kind + 2)
    assert data is not None  # check_plan
    entries = torch.empty(256, dtype=torch.int32, device=out.device)
    r8_table_kernel[(256 // EACH,)](frequencies, entries, EACH=EACH, num_warps=8)
    r8_decode_kernel[(triton.cdiv(blocks, BLOCKS),)](
        entries, p.section(kind + 1, torch.int64, 8 * first_block), data, which, *planes, bits, out, data.numel(),
        p.numel - first_block * BLOCK.value, low, high, blocks, NUMBER=number, PLANES=BYTE_PLANES.get(number, 0),
        BITS=BIT_PLANES.get(number, 0), CODED=coded, BLOCKS=BLOCKS, num_warps=BLOCKS,
    )  # fmt: skip


def r8_numbers(
    p: Plan, first_block: int, blocks: int, out: Tensor, low: int, high: int, which: Tensor | None = None
) -> None:
    """Write numbers low..high, counted from first_block on, to `out`; or, of the blocks that `which` lists (int32, -1: none), all
    of them, one block behind the other. Coded byte planes are decoded to scratch first."""
    skip = first_block * BLOCK.value
    planes = p.byte_planes(skip)
    coded = 0
    for plane in range(BYTE_PLANES[p.number]):
        if p.section(FREQUENCIES0 + 3 * (plane + 1)) is None:
            continue
        found = torch.empty(blocks * BLOCK.value, dtype=torch.uint8, device=out.device)
        _stream(p, plane + 1, first_block, which, [None] * 3, None, found, 0, found.numel(), blocks, PLANE.value)
        planes[plane] = found
        coded |= 1 << plane
    _stream(p, 0, first_block, which, planes, p.bits(skip), out, low, high, blocks, p.number, coded)
