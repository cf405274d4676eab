"""pack_bits: rows of numbers to planes of bits and their popcounts; docs/design.md, "The bit contract".

Bytes moved: 2 or 4 an element read, P / 8 written. 8192 x 8192 in bf16, one plane, on an H200: 143 MB, 0.03-0.045 ms;
codes of four planes 168 MB, 0.05-0.08 ms (a true division and a rounding an element). A tile is read once for all planes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bit_tiles import LAUNCH, matrix, packed_bytes, round_half_even, store_bytes, tile_start, walk
from .common import on_device, wide

SIGN, TERNARY = tl.constexpr(0), tl.constexpr(1)  # of fastloss.quant.contract.Pack


@triton.jit
def of_columns(table, r, c, keep, stride, columns, GROUP: tl.constexpr):
    """A number of a table [R or 1, G] for each element; stride 0 for one row."""
    if GROUP == 0:
        return tl.load(table + r * stride, mask=keep, other=1.0)[:, None]
    else:
        at = r[:, None] * stride + (c // GROUP)[None, :]
        return tl.load(table + at, mask=keep[:, None] & (c < columns)[None, :], other=1.0)


@triton.jit(do_not_specialize=["R", "steps", "low"])
def pack_bits_kernel(
    x, center, scale, planes, popcounts, R, K, row_bytes, steps, stride_x, stride_center, stride_scale, low,
    KIND: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """popcounts [splits, P, R]: the ones of the columns that a program saw."""
    r = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    keep = r < R
    size = wide(R) * row_bytes
    ones = tl.zeros([ROWS], tl.int32)
    ones1, ones2, ones3 = ones, ones, ones
    for step in range(0, steps):
        _, column = tile_start(step, steps, ROWS, COLUMNS, False)
        c = column + tl.arange(0, COLUMNS)
        inside = keep[:, None] & (c < K)[None, :]
        d = tl.load(x + r[:, None] * stride_x + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if KIND == SIGN:
            middle = 0.0
            if center is not None:
                middle = of_columns(center, r, c, keep, stride_center, K, GROUP)
            found, more = packed_bytes(inside & (d >= middle), ROWS, COLUMNS)
            store_bytes(planes, found, r, keep, column, row_bytes, COLUMNS)
            ones += more
        else:
            if center is not None:
                d -= of_columns(center, r, c, keep, stride_center, K, GROUP)
            size_of = 1.0
            if scale is not None:
                size_of = of_columns(scale, r, c, keep, stride_scale, K, GROUP)
            if KIND == TERNARY:
                found, more = packed_bytes(inside & (tl.abs(d) > size_of), ROWS, COLUMNS)
                store_bytes(planes, found, r, keep, column, row_bytes, COLUMNS)
                ones += more
                found, more = packed_bytes(inside & (d > size_of), ROWS, COLUMNS)
                store_bytes(planes + size, found, r, keep, column, row_bytes, COLUMNS)
                ones1 += more
            else:
                if scale is not None:
                    d = tl.div_rn(d, tl.broadcast_to(size_of, d.shape))
                least = low * 1.0
                d = tl.where(d == d, round_half_even(d), least)
                code = (tl.minimum(tl.maximum(d, least), least + ((1 << PLANES) - 1.0)) - least).to(tl.int32)
                for p in tl.static_range(PLANES):
                    found, more = packed_bytes(inside & ((code >> p & 1) != 0), ROWS, COLUMNS)
                    store_bytes(planes + p * size, found, r, keep, column, row_bytes, COLUMNS)
                    if p == 0:
                        ones += more
                    elif p == 1:
                        ones1 += more
                    elif p == 2:
                        ones2 += more
                    else:
                        ones3 += more
    out = popcounts + wide(tl.program_id(1)) * PLANES * R + r
    tl.store(out, ones, mask=keep)
    if PLANES > 1:
        tl.store(out + R, ones1, mask=keep)
    if PLANES > 2:
        tl.store(out + wide(R) * 2, ones2, mask=keep)
    if PLANES > 3:
        tl.store(out + wide(R) * 3, ones3, mask=keep)


def row_stride(table: Tensor | None) -> int:
    """0 where one row of a table serves all rows."""
    return 0 if table is None or table.shape[0] == 1 else table.shape[1]


def pack_bits(
    x: Tensor, kind: int, center: Tensor | None, scale: Tensor | None, group: int, low: int, planes: int, row_bytes: int
) -> tuple[Tensor, Tensor]:
    """planes uint8 [P, R, B] and popcounts int32 [P, R]."""
    x = matrix(x)
    rows, columns = x.shape
    center, scale = (None if t is None else t.float().contiguous() for t in (center, scale))
    tiles = walk(rows, 8 * row_bytes)
    bits = torch.empty(planes, rows, row_bytes, dtype=torch.uint8, device=x.device)
    ones = torch.empty(tiles.splits, planes, rows, dtype=torch.int32, device=x.device)
    if rows:
        with on_device(x):
            pack_bits_kernel[tiles.grid](
                x, center, scale, bits, ones, rows, columns, row_bytes, tiles.steps, x.stride(0), row_stride(center),
                row_stride(scale), low, KIND=kind, GROUP=group, PLANES=planes, ROWS=tiles.rows, COLUMNS=tiles.columns, **LAUNCH,
            )  # fmt: skip
    return bits, ones[0] if tiles.splits == 1 else ones.sum(0, dtype=torch.int32)
