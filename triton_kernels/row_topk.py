"""row_topk: the largest z of each row among its negatives, its positives, or both, streamed.

A pair is one integer that orders as the result does: its z in the upper 32 bits, and its column, falling, in the lower. So equal
z go to the lowest column whatever the order of the tiles, and the best of several splits are found by one sort.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import NAN, NOWHERE, on_device, wide
from .linear_row_stats import Tile
from .linear_row_stats_kernels import place
from .pair_launch import Launch
from .pair_tiles import pair_tile

NEGATIVE, POSITIVES = tl.constexpr(1), tl.constexpr(2)  # bits of `classes`
#: A row's list is kept in registers.
LONGEST = 64
ABSENT, FULL = tl.constexpr(-(1 << 63)), tl.constexpr((1 << 63) - 1)


@triton.jit
def ordered(z, j):
    """The key of a pair. NaN comes first, as in torch's sort, and 0 and -0 are equal."""
    z = tl.where(z == 0.0, 0.0, z)
    bits = tl.where(z != z, NAN, z).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (wide(-j) + NOWHERE)[None, :]


@triton.jit(do_not_specialize=["M", "N", "splits", "p0", "p1", "e0", "e1"])
def row_topk_kernel(q, k, row_scale, column_scale, row_valid, column_valid, positive_rows, positive_columns, excluded_rows,
                    excluded_columns, low, high, guide_q, guide_k, guide_limit, keys, splits, count, M, N, D, E, stride_q,
                    stride_k, stride_guide_q, stride_guide_k, p0, p1, e0, e1, CLASSES: tl.constexpr, LIST: tl.constexpr,
                    GENERAL: tl.constexpr, POSITIVE: tl.constexpr, PD: tl.constexpr, ED: tl.constexpr, BM: tl.constexpr,
                    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
                    PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """keys [M, splits, count], in no order. A tile is looked at again only while it holds a pair that enters some row's list."""
    block, split = place(tl.program_id(0), tl.cdiv(M, BM), splits, GROUP)
    row0 = block * BM
    i = row0 + tl.arange(0, BM)
    slot = tl.arange(0, LIST)
    # Places that are not asked for hold what nothing displaces; the others differ, so that one pair takes one place.
    start = tl.where(slot < count, slot.to(tl.int64) + (ABSENT + 1), FULL)
    best = tl.zeros([BM, LIST], tl.int64) + start[None, :]
    tiles = tl.cdiv(N, BN)
    each = tl.cdiv(tiles, splits)
    for tile in range(split * each, tl.minimum((split + 1) * each, tiles)):
        column0 = tile * BN
        j = column0 + tl.arange(0, BN)
        z, negative, positive = pair_tile(
            q, k, row_scale, column_scale, row_valid, column_valid, positive_rows, positive_columns, excluded_rows,
            excluded_columns, low, high, guide_q, guide_k, guide_limit, i, j, row0, column0, M, N, D, E, stride_q, stride_k,
            stride_guide_q, stride_guide_k, p0, p1, e0, e1, GENERAL, POSITIVE, PD, ED, BM, BN, BK, EVEN_D, TMA, PRECISION,
            GUIDE_PRECISION, UPCAST
        )  # fmt: skip
        member = negative
        if CLASSES == POSITIVES:
            member = positive
        elif CLASSES == NEGATIVE + POSITIVES:
            member = negative | positive
        key = tl.where(member, ordered(z, j), ABSENT)
        top, worst = tl.max(key, 1), tl.min(best, 1)
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            enters = (best == worst[:, None]) & (top > worst)[:, None]
            best = tl.where(enters, top[:, None], best)
            key = tl.where(key == top[:, None], ABSENT, key)
            top, worst = tl.max(key, 1), tl.min(best, 1)
    out = keys + (wide(i) * splits + split)[:, None] * count + slot[None, :]
    tl.store(out, best, mask=(i < M)[:, None] & (slot < count)[None, :])


def row_topk(
    pairing: tuple[Any, ...], count: int, classes: int, *, tile: Tile | None = None, splits: int | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """values [M, count] fp32 and columns [M, count] int64, falling; -inf and -1 where there are fewer."""
    launch = Launch(pairing, tile, tma, ranked=True, positives=bool(classes & POSITIVES.value))
    m, n = launch.m, launch.n
    row_blocks = triton.cdiv(m, launch.tile.rows)
    splits = splits or min(triton.cdiv(n, launch.tile.columns), triton.cdiv(launch.processors, row_blocks))
    keys = torch.empty(m, splits, count, dtype=torch.int64, device=launch.q.device)
    with on_device(launch.q):
        row_topk_kernel[(row_blocks * splits,)](
            *launch.operands(), *launch.classes, keys, splits, count, *launch.sizes, *launch.strides, *launch.offsets,
            CLASSES=int(classes), LIST=triton.next_power_of_2(count), **launch.options,
        )  # fmt: skip
    found = keys.view(m, -1).sort(dim=1, descending=True).values[:, :count]
    bits = (found >> 32).to(torch.int32)
    values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    absent = found < ABSENT.value + 1 + LONGEST
    columns = NOWHERE.value - (found & 0xFFFFFFFF)
    return torch.where(absent, -torch.inf, values), torch.where(absent, -1, columns)
