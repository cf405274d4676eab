"""quantize_groups and dequantize_groups, the codec of saved activations; docs/design.md, "Groups of saved activations".

A group that fits a tile is read once: range and codes from the same registers. A longer one is read twice (its range first).
16384 x 8192 in bf16 on an H200: 8 bits 403 MB, 0.09-0.13 ms to codes and 0.09-0.11 ms back; 4 bits 336 MB, 0.08-0.12 and
0.07-0.09 ms; stochastic rounding adds a quarter of a Philox block (25 instructions) an element: 0.15-0.25 ms; groups of more
than a tile 0.2 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bit_tiles import ELEMENTS, LAUNCH, round_half_even, tile_start, walk
from .common import INF, NAN, on_device, wide

#: The longest group whose numbers stay in registers.
WHOLE = 4096


@triton.jit
def column_limits(r, N, group):
    """How many elements the groups r have: all but the last are full."""
    return tl.minimum(N - r * group, group)


@triton.jit(do_not_specialize=["count", "steps"])
def group_range_kernel(x, lows, highs, N, count, group, steps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """lows and highs [splits, count]: the minimum and maximum of the elements a program saw, NaN if one is NaN."""
    r = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    length = tl.where(r < count, column_limits(r, N, group), 0)
    least = tl.full([ROWS, COLUMNS], INF, tl.float32)
    most = tl.full([ROWS, COLUMNS], -INF, tl.float32)
    absent = tl.zeros([ROWS, COLUMNS], tl.int32)
    for step in range(0, steps):
        _, column = tile_start(step, steps, ROWS, COLUMNS, False)
        c = column + tl.arange(0, COLUMNS)
        inside = c[None, :] < length[:, None]
        v = tl.load(x + r[:, None] * group + c[None, :], mask=inside, other=0.0).to(tl.float32)
        absent |= (inside & (v != v)).to(tl.int32)
        least = tl.where(inside & (v < least), v, least)
        most = tl.where(inside & (v > most), v, most)
    nothing = tl.max(absent, 1) != 0
    out = wide(tl.program_id(1)) * count + r
    tl.store(lows + out, tl.where(nothing, NAN, tl.min(least, 1)), mask=r < count)
    tl.store(highs + out, tl.where(nothing, NAN, tl.max(most, 1)), mask=r < count)


@triton.jit
def uniforms(key, r, column, group, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """U_i in [0, 1) of elements i = r group + c. ALIGNED: groups begin at a counter's first word, so a counter serves four."""
    if ALIGNED:
        block = (r * (group // 4))[:, None] + (column // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    else:
        i = (r * group)[:, None] + (column + tl.arange(0, COLUMNS))[None, :]
        block = i // 4
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, low, high, low * 0, low * 0)
    if ALIGNED:
        word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        word = tl.where(i % 4 == 0, a, tl.where(i % 4 == 1, b, tl.where(i % 4 == 2, c, d)))
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit(do_not_specialize=["count", "channels", "steps"])
def quantize_groups_kernel(
    x, low, high, seed, codes, lows, sizes, N, count, group, channels, steps, BITS: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """low and high [channels], or None: a tile then holds whole groups. lows and sizes [count] are written."""
    r = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    keep = r < count
    length = tl.where(keep, column_limits(r, N, group), 0)
    if low is not None:
        least = tl.load(low + r % channels, mask=keep, other=0.0)
        most = tl.load(high + r % channels, mask=keep, other=0.0)
    top: tl.constexpr = 2.0**BITS - 1.0
    for step in range(0, steps):
        _, column = tile_start(step, steps, ROWS, COLUMNS, False)
        c = column + tl.arange(0, COLUMNS)
        inside = c[None, :] < length[:, None]
        v = tl.load(x + r[:, None] * group + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if low is None:
            nothing = tl.max((inside & (v != v)).to(tl.int32), 1) != 0
            least = tl.where(nothing, NAN, tl.min(tl.where(inside & (v == v), v, INF), 1))
            most = tl.where(nothing, NAN, tl.max(tl.where(inside & (v == v), v, -INF), 1))
        size = tl.div_rn(most - least, tl.full([ROWS], top, tl.float32))
        v = tl.div_rn(v - least[:, None], tl.broadcast_to(size[:, None], v.shape))
        if seed is None:
            v = round_half_even(v)
        else:
            v = tl.floor(v + uniforms(tl.load(seed), r, column, group, ROWS, COLUMNS, ALIGNED))
        v = tl.where(inside & (size > 0)[:, None] & (v == v), v, 0.0)
        code = tl.minimum(tl.maximum(v, 0.0), top).to(tl.int32)
        if BITS == 4:
            place = tl.arange(0, 2) * 4
            code = tl.sum(tl.reshape(code, [ROWS, COLUMNS // 2, 2]) << place[None, None, :], 2)
            half = column // 2 + tl.arange(0, COLUMNS // 2)
            out = codes + r[:, None] * (group // 2) + half[None, :]
            tl.store(out, code.to(tl.uint8), mask=keep[:, None] & (half < group // 2)[None, :])
        else:
            tl.store(
                codes + r[:, None] * group + c[None, :], code.to(tl.uint8), mask=keep[:, None] & (c < group)[None, :]
            )
        if tl.program_id(1) == 0:
            if step == 0:
                tl.store(lows + r, least, mask=keep)
                tl.store(sizes + r, size, mask=keep)


@triton.jit(do_not_specialize=["count", "steps"])
def dequantize_groups_kernel(
    codes, low, size, x, N, count, group, steps, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    r = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    keep = r < count
    length = tl.where(keep, column_limits(r, N, group), 0)
    least, by = tl.load(low + r, mask=keep, other=0.0), tl.load(size + r, mask=keep, other=0.0)
    for step in range(0, steps):
        _, column = tile_start(step, steps, ROWS, COLUMNS, False)
        c = column + tl.arange(0, COLUMNS)
        if BITS == 4:
            half = column // 2 + tl.arange(0, COLUMNS // 2)
            inside = keep[:, None] & (half < group // 2)[None, :]
            byte = tl.load(codes + r[:, None] * (group // 2) + half[None, :], mask=inside, other=0).to(tl.int32)
            place = tl.arange(0, 2) * 4
            code = tl.reshape(byte[:, :, None] >> place[None, None, :] & 15, [ROWS, COLUMNS])
        else:
            inside = keep[:, None] & (c < group)[None, :]
            code = tl.load(codes + r[:, None] * group + c[None, :], mask=inside, other=0).to(tl.int32)
        value = least[:, None] + code.to(tl.float32) * by[:, None]
        out = x + r[:, None] * group + c[None, :]
        tl.store(out, value.to(x.dtype.element_ty), mask=c[None, :] < length[:, None])


def quantize_groups(
    x: Tensor, group: int, bits: int, low: Tensor | None, high: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """codes uint8 [G, group bits / 8], low and step float32 [G]."""
    x = x.contiguous()
    n, number = x.shape[0], dict(dtype=torch.float32, device=x.device)
    count = triton.cdiv(n, group)
    codes = torch.empty(count, group * bits // 8, dtype=torch.uint8, device=x.device)
    lows, sizes = torch.empty(count, **number), torch.empty(count, **number)
    if not count:
        return codes, lows, sizes
    aligned = group % 4 == 0
    elements = ELEMENTS if aligned or seed is None else ELEMENTS // 4  # else a block of Philox for each
    with on_device(x):
        if low is None or high is None:
            low = high = None
            if group > WHOLE:
                tiles = walk(count, group)
                part = torch.empty(2, tiles.splits, count, **number)
                group_range_kernel[tiles.grid](
                    x, part[0], part[1], n, count, group, tiles.steps, ROWS=tiles.rows, COLUMNS=tiles.columns, **LAUNCH
                )
                low, high = part[0].amin(0), part[1].amax(0)
        else:
            low, high = low.float().contiguous(), high.float().contiguous()
        if low is None:
            columns = max(8, triton.next_power_of_2(group))
            rows = max(1, min(triton.next_power_of_2(count), elements // columns))
            grid, steps = (triton.cdiv(count, rows), 1), 1
        else:
            tiles = walk(count, group, elements=elements)
            rows, columns, grid, steps = tiles.rows, tiles.columns, tiles.grid, tiles.steps
        quantize_groups_kernel[grid](
            x, low, high, seed, codes, lows, sizes, n, count, group, 1 if low is None else low.numel(), steps, BITS=bits,
            ALIGNED=aligned, ROWS=rows, COLUMNS=columns, **LAUNCH,
        )  # fmt: skip
    return codes, lows, sizes


def dequantize_groups(
    codes: Tensor, low: Tensor, step: Tensor, n: int, group: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """x [n] = low + code step."""
    x = torch.empty(n, dtype=dtype, device=codes.device)
    count = codes.shape[0]
    tiles = walk(count, group)
    if n:
        with on_device(codes):
            dequantize_groups_kernel[tiles.grid](
                codes.contiguous(), low.float().contiguous(), step.float().contiguous(), x, n, count, group, tiles.steps,
                BITS=bits, ROWS=tiles.rows, COLUMNS=tiles.columns, **LAUNCH,
            )  # fmt: skip
    return x
