"""lossless_linear: x Wᵀ + bias for W in P7 (bf16, fp16), which is decoded in registers and never stored.

W is split exactly: where a pair escapes, its codes give zeros, so the dense product leaves it out, and the second kernel adds the
sparse list while it adds up the splits: every sum has one order, whatever the device. Even and odd columns are multiplied
apart: a code gives one of each, and nothing has to be interleaved.

An H200, 4096 x 4096 in bf16: 24 MB, 5.6 us at the speed of memory, where dense weights take 7.8 us. A pair takes four byte
loads and some 24 integer instructions: 9-13 us of issue with 1 or 2 rows, 14-20 us with 64; both launches 14-25 us predicted:
about as fast as cuBLAS. The CUDA kernel reads fragments and has its table in shared memory; this one is what runs without it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device, wide
from .lossless_decode import p7_parts
from .lossless_numbers import (
    BF16,
    BLOCK,
    FP16,
    PAIRS,
    UNIT_PAIRS,
    Plan,
    decoded_pair,
    escapes_of,
    matrix_of,
    place_in_unit,
)

#: Rows of x up to which decoding in registers beats decoding once and a dense product.
MOST_ROWS = 64
#: Programs that fill any GPU. Not a property of the one at hand: sums do not depend on it.
PROGRAMS = 1024
COMBINE_ROWS = 16
ESCAPES = 128


class LinearTile(NamedTuple):
    """Rows and columns of W that a program decodes at once, rows of x (up to 2: no matrix unit), warps."""

    rows: int
    columns: int
    batch: int
    warps: int


def default_tile(batch: int, tiles: bool, number: int) -> LinearTile:
    """A unit of layout `tiles` has 128 columns, and so have its products. Bit planes take registers."""
    if batch <= 2:
        return LinearTile(32, 128, batch, 4) if tiles else LinearTile(16, 256, batch, 4)
    return LinearTile(64, 128, max(16, triton.next_power_of_2(batch)), 4 if number == BF16.value else 8)


@triton.jit
def as_numbers(bits, NUMBER: tl.constexpr, DTYPE: tl.constexpr):
    """Bit patterns (int32) as numbers of DTYPE, which holds them all."""
    if NUMBER == BF16:
        if DTYPE == tl.bfloat16:
            return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)


@triton.jit
def pairs_from(table, codes, bytes0, bits, group, place, keep, numel, NUMBER: tl.constexpr):
    """Both bit patterns of the pairs `place` behind the groups `group` [rows, 1]."""
    codes += group * 56
    if bytes0 is not None:
        bytes0 += group * 64
    local, size = place, place  # what only bit planes need
    if NUMBER == FP16:
        p = group * 64 + place
        block = p // PAIRS
        bits += block * (3 * BLOCK // 8)
        local = (p - block * PAIRS).to(tl.int32)
        size = (tl.minimum(tl.cdiv(wide(numel) - block * BLOCK, 128) * 128, BLOCK) // 8).to(tl.int32)
    return decoded_pair(table, codes, bytes0, None, None, bits, place, local, size, keep, NUMBER)


@triton.jit
def weight_pairs(table, codes, bytes0, bits, row, column, R, K, numel, NUMBER: tl.constexpr, TILES: tl.constexpr,
                 BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """(even, odd): columns column + 2 j and column + 2 j + 1 [BM, BK / 2] of the rows from `row` on, zeros beyond the last."""
    if TILES:  # BK is 128, so all columns are there
        band = wide(tl.minimum(row // 16 + tl.arange(0, BM // 16), R // 16 - 1))
        group = (band * (K // 128) + column // 128) * 16  # of a unit's 16
        place = tl.arange(0, UNIT_PAIRS)[None, :]
        keep = tl.full([BM // 16, UNIT_PAIRS], 1, tl.int1)
        even, odd = pairs_from(table, codes, bytes0, bits, group[:, None], place, keep, numel, NUMBER)
        even, odd = matrix_of(as_numbers(even, NUMBER, DTYPE), BM), matrix_of(as_numbers(odd, NUMBER, DTYPE), BM)
    else:
        first = wide(tl.minimum(row + tl.arange(0, BM), R - 1)) * K + column
        group = first // 128
        pair = tl.arange(0, BK // 2)
        place = ((first - group * 128) // 2).to(tl.int32)[:, None] + pair[None, :]
        keep = (column // 2 + pair < K // 2)[None, :] & (place >= 0)
        even, odd = pairs_from(table, codes, bytes0, bits, group[:, None], place, keep, numel, NUMBER)
        even, odd = as_numbers(even, NUMBER, DTYPE), as_numbers(odd, NUMBER, DTYPE)
    return even, odd


@triton.jit(do_not_specialize=["R", "steps", "numel"])
def lossless_linear_kernel(x, table, codes, bytes0, bits, partial, M, R, K, stride, steps, numel, NUMBER: tl.constexpr,
                           TILES: tl.constexpr, DTYPE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
                           BATCH: tl.constexpr):  # fmt: skip
    """partial [splits, M, R]: program (tile, s) multiplies `steps` blocks of columns of BM rows with all rows of x."""
    row = tl.program_id(0) * BM
    r = row + tl.arange(0, BM)
    out = partial + wide(tl.program_id(1)) * M * R + r
    k = tl.arange(0, BK // 2)
    begin = tl.program_id(1) * steps * BK
    end = tl.minimum(K, begin + steps * BK)
    if BATCH <= 2:
        acc0 = tl.zeros([BM, BK // 2], tl.float32)
        acc1 = acc0
        for column in range(begin, end, BK):
            pair = column // 2 + k
            even, odd = weight_pairs(
                table, codes, bytes0, bits, row, column, R, K, numel, NUMBER, TILES, BM, BK, tl.float32
            )
            keep = pair < K // 2
            at = x + 2 * pair
            acc0 += even * tl.load(at, mask=keep, other=0.0).to(tl.float32)[None, :]
            acc0 += odd * tl.load(at + 1, mask=keep, other=0.0).to(tl.float32)[None, :]
            if BATCH == 2:
                acc1 += even * tl.load(at + stride, mask=keep, other=0.0).to(tl.float32)[None, :]
                acc1 += odd * tl.load(at + stride + 1, mask=keep, other=0.0).to(tl.float32)[None, :]
        tl.store(out, tl.sum(acc0, 1), mask=r < R)
        if BATCH == 2:
            tl.store(out + R, tl.sum(acc1, 1), mask=r < R)
    else:
        m = tl.arange(0, BATCH)
        acc = tl.zeros([BM, BATCH], tl.float32)
        for column in range(begin, end, BK):
            pair = column // 2 + k
            even, odd = weight_pairs(table, codes, bytes0, bits, row, column, R, K, numel, NUMBER, TILES, BM, BK, DTYPE)
            at = x + wide(m)[None, :] * stride + 2 * pair[:, None]
            keep = (pair < K // 2)[:, None] & (m < M)[None, :]
            acc = tl.dot(even, tl.load(at, mask=keep, other=0.0).to(DTYPE), acc, input_precision="ieee")
            acc = tl.dot(odd, tl.load(at + 1, mask=keep, other=0.0).to(DTYPE), acc, input_precision="ieee")
        tl.store(out[:, None] + wide(m)[None, :] * R, acc, mask=(r < R)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M", "R", "splits", "total"])
def combine_kernel(x, partial, bias, offsets, positions, values, y, M, R, K, stride, splits, total, NUMBER: tl.constexpr,
                   TILES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """y [M, R]: a program adds up the splits of ROWS numbers of one row of y, the escapes of their rows of W, and the bias."""
    row = tl.program_id(0) * ROWS
    m = wide(tl.program_id(1))
    here = tl.arange(0, ROWS)
    r = row + here
    keep = r < R
    acc = tl.zeros([ROWS], tl.float32)
    for s in range(0, splits):
        acc += tl.load(partial + (wide(s) * M + m) * R + r, mask=keep, other=0.0)
    if positions is not None:
        first = wide(row) * K  # their numbers follow each other in both layouts
        size = (tl.minimum(R - row, ROWS)) * wide(K)
        for block in range(first // BLOCK, (first + size - 1) // BLOCK + 1):
            at, end = escapes_of(offsets, block, total)
            for i in range(at, end, STEP):
                e = i + tl.arange(0, STEP)
                live = e < end
                pair = tl.load(positions + e, mask=live, other=0).to(tl.int32) & 0xFFFF
                n = wide(block) * BLOCK + 2 * pair - first
                live = live & (pair < PAIRS) & (n >= 0) & (n < size)
                if TILES:
                    unit = n // 2048
                    in_row, in_column = place_in_unit(pair % UNIT_PAIRS)
                    of, column = unit // (K // 128) * 16 + in_row, unit % (K // 128) * 128 + 2 * in_column
                else:
                    of, column = n // K, n % K
                found = tl.zeros([STEP], tl.float32)
                for half in tl.static_range(2):
                    bits = tl.load(values + 2 * e + half, mask=live, other=0).to(tl.int32)
                    factor = tl.load(x + m * stride + column + half, mask=live, other=0.0).to(tl.float32)
                    found += as_numbers(bits, NUMBER, tl.float32) * factor
                hit = live[None, :] & (of[None, :] == here[:, None])
                acc += tl.sum(tl.where(hit, found[None, :], 0.0), 1)
    if bias is not None:
        acc += tl.load(bias + r, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + m * R + r, acc.to(y.dtype.element_ty), mask=keep)


def takes(p: Plan, x: Tensor) -> bool:
    """Whether the fused kernel reads this blob and so many rows: what it does not is decoded and multiplied."""
    return p.codec == 1 and p.number in (BF16.value, FP16.value) and p.columns % 2 == 0 and 0 < x.shape[0] <= MOST_ROWS


def lossless_linear(
    x: Tensor, p: Plan, bias: Tensor | None, *, tile: LinearTile | None = None, splits: int = 0
) -> Tensor:
    """y [M, R] of x [M, K]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    m, (r, k) = x.shape[0], p.plan[4:6]
    tile = tile or default_tile(m, p.tiles, p.number)
    tiles, steps = triton.cdiv(r, tile.rows), triton.cdiv(k, tile.columns)
    each = triton.cdiv(steps, min(splits or max(1, PROGRAMS // tiles), steps))
    splits = triton.cdiv(steps, each)
    partial = torch.empty(splits, m, r, dtype=torch.float32, device=x.device)
    y = torch.empty(m, r, dtype=x.dtype, device=x.device)
    (table, codes, offsets, positions, values, bytes0, _, _, bits), total = p7_parts(p, 0, x.dtype)
    # the interpreter's dot knows no bfloat16
    dtype = tl.float32 if x.device.type == "cpu" else tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    layout = dict(NUMBER=p.number, TILES=p.tiles)
    with on_device(x):
        lossless_linear_kernel[(tiles, splits)](
            x, table, codes, bytes0, bits, partial, m, r, k, x.stride(0), each, p.numel, **layout, DTYPE=dtype, BM=tile.rows,
            BK=tile.columns, BATCH=tile.batch, num_warps=tile.warps, num_stages=2,
        )  # fmt: skip
        combine_kernel[(triton.cdiv(r, COMBINE_ROWS), m)](
            x, partial, bias, offsets, positions, values, y, m, r, k, x.stride(0), splits, total, **layout, ROWS=COMBINE_ROWS,
            STEP=ESCAPES, num_warps=2,
        )  # fmt: skip
    return y
