"""binarize and its backward: signs times a scale, and the gradient of a surrogate; docs/design.md, "The bit contract".

Forward: one read of x, one write of what is asked for. 8192 x 8192 in bf16 on an H200: signs and mask 151 MB, 0.035-0.05 ms;
dense and mask 277 MB, 0.065-0.08 ms. Backward from a mask 277 MB, 0.065-0.08 ms; from x 403 MB, 0.09-0.12 ms (ReSTE's power is
two instructions of the special unit, FDA's waves and BiPer's cosine some 30 instructions each: 0.1-0.2 ms).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .binarize_surrogates import BIPER, CLIP, IDENTITY, slope
from .bit_tiles import (
    LAUNCH,
    OF_COLUMNS,
    OF_EACH,
    add_up,
    form,
    matrix,
    packed_bytes,
    parameter,
    period,
    round_half_even,
    store_bytes,
    store_sum,
    stride,
    tile_start,
    unpacked_bits,
    walk,
)
from .common import on_device, wide

DENSE, SIGNS, MASK, CODES = 1, 2, 4, 8  # bits of `save`
NEEDS_X, NEEDS_SCALE, NEEDS_SHIFT = 1, 2, 4  # bits of `needs`


@triton.jit
def is_positive(u, p0, SURROGATE: tl.constexpr):
    if SURROGATE == BIPER:
        return tl.sin(p0 * u) >= 0
    else:
        return u >= 0


@triton.jit(do_not_specialize=["R", "steps", "groups", "waves"])
def binarize_kernel(
    x, shift, scale, y, signs, popcounts, mask, codes, R, K, row_bytes, steps, stride_x, groups, inner, stride_shift,
    stride_scale, p0, p1, waves, limit, SURROGATE: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """popcounts [splits, R]: the ones of the columns that a program saw."""
    r = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    keep = r < R
    ones = tl.zeros([ROWS], tl.int32)
    for step in range(0, steps):
        _, column = tile_start(step, steps, ROWS, COLUMNS, False)
        c = column + tl.arange(0, COLUMNS)
        inside = keep[:, None] & (c < K)[None, :]
        u = tl.load(x + r[:, None] * stride_x + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if shift is not None:
            u -= parameter(shift, r, c, keep, c < K, groups, inner, K, stride_shift, FORM)
        positive = is_positive(u, p0, SURROGATE)
        if y is not None:
            value = tl.where(positive, 1.0, -1.0)
            if scale is not None:
                value *= parameter(scale, r, c, keep, c < K, groups, inner, K, stride_scale, FORM)
            tl.store(y + r[:, None] * K + c[None, :], value.to(y.dtype.element_ty), mask=inside)
        if signs is not None:
            found, more = packed_bytes(inside & positive, ROWS, COLUMNS)
            store_bytes(signs, found, r, keep, column, row_bytes, COLUMNS)
            ones += more
        if mask is not None:
            found, _ = packed_bytes(inside & (slope(u, p0, p1, waves, SURROGATE) != 0), ROWS, COLUMNS)
            store_bytes(mask, found, r, keep, column, row_bytes, COLUMNS)
        if codes is not None:
            a = tl.abs(u)
            code = round_half_even(tl.div_rn(a * 254.0, tl.zeros_like(a) + limit))
            code = tl.where(a <= limit, code, 255.0)  # of NaN too
            tl.store(codes + r[:, None] * K + c[None, :], code.to(tl.int32).to(tl.uint8), mask=inside)
    if signs is not None:
        tl.store(popcounts + wide(tl.program_id(1)) * R + r, ones, mask=keep)


@triton.jit(do_not_specialize=["R", "steps", "groups", "waves"])
def binarize_gradient_kernel(
    grad, x, signs, mask, codes, shift, scale, dx, scale_sums, shift_sums, R, K, row_bytes, steps, stride_grad, stride_x,
    groups, inner, stride_shift, stride_scale, p0, p1, waves, code_step, SURROGATE: tl.constexpr, FORM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """scale_sums and shift_sums: sums of rows or of columns, one a program; where a parameter is of neither, terms [R, K]."""
    DOWN: tl.constexpr = FORM == OF_COLUMNS
    scale_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    shift_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, steps):
        row, column = tile_start(step, steps, ROWS, COLUMNS, DOWN)
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        keep = r < R
        inside = keep[:, None] & (c < K)[None, :]
        here = r[:, None] * K + c[None, :]
        g = tl.load(grad + r[:, None] * stride_grad + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if x is not None:
            u = tl.load(x + r[:, None] * stride_x + c[None, :], mask=inside, other=0.0).to(tl.float32)
            if shift is not None:
                u -= parameter(shift, r, c, keep, c < K, groups, inner, K, stride_shift, FORM)
        if dx is not None or shift_sums is not None:
            by = g
            if scale is not None:
                by = g * parameter(scale, r, c, keep, c < K, groups, inner, K, stride_scale, FORM)
            if mask is not None:
                bits = unpacked_bits(mask, r, keep, column, row_bytes, ROWS, COLUMNS)
                by = tl.where(bits != 0, by, 0.0)
            elif SURROGATE != IDENTITY or x is not None:
                if codes is not None:
                    code = tl.load(codes + here, mask=inside, other=255).to(tl.int32)
                    factor = tl.full([ROWS, COLUMNS], 1.0, tl.float32)  # clip's, whatever the code below 255
                    if SURROGATE != CLIP:
                        factor = slope(code.to(tl.float32) * code_step, p0, p1, waves, SURROGATE)
                    factor = tl.where(code < 255, factor, 0.0)
                else:
                    factor = slope(u, p0, p1, waves, SURROGATE)
                by = tl.where(factor == 0, 0.0, by * factor)
            by = tl.where(inside, by, 0.0)
            if dx is not None:
                tl.store(dx + here, by.to(dx.dtype.element_ty), mask=inside)
            if shift_sums is not None:
                if FORM == OF_EACH:
                    tl.store(shift_sums + here, -by, mask=inside)
                else:
                    shift_total -= by
        if scale_sums is not None:
            if signs is not None:
                positive = unpacked_bits(signs, r, keep, column, row_bytes, ROWS, COLUMNS) != 0
            else:
                positive = is_positive(u, p0, SURROGATE)
            term = tl.where(positive, g, -g)
            if FORM == OF_EACH:
                tl.store(scale_sums + here, term, mask=inside)
            else:
                scale_total += term
    if FORM != OF_EACH:
        if scale_sums is not None:
            store_sum(scale_sums, scale_total, R, K, ROWS, COLUMNS, DOWN)
        if shift_sums is not None:
            store_sum(shift_sums, shift_total, R, K, ROWS, COLUMNS, DOWN)


def _numbers(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()


def _waves(p1: float) -> int:
    """Terms of FDA's series, whose last index p1 is."""
    return int(p1) + 1 if math.isfinite(p1) else 1


def binarize(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, groups: int, inner: int, surrogate: int, p0: float, p1: float,
    save: int, row_bytes: int, limit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y [R, K], signs [R, B], popcounts [R], mask [R, B], codes [R, K]; what is not in `save` has 0 elements."""
    x = matrix(x)
    rows, columns = x.shape
    tiles = walk(rows, 8 * row_bytes)
    bytes_of = dict(dtype=torch.uint8, device=x.device)
    y = torch.empty((rows, columns) if save & DENSE else 0, dtype=x.dtype, device=x.device)
    signs = torch.empty((rows, row_bytes) if save & SIGNS else 0, **bytes_of)
    ones = torch.empty((tiles.splits, rows) if save & SIGNS else (1, 0), dtype=torch.int32, device=x.device)
    mask = torch.empty((rows, row_bytes) if save & MASK else 0, **bytes_of)
    codes = torch.empty((rows, columns) if save & CODES else 0, **bytes_of)
    if rows:
        with on_device(x):
            binarize_kernel[tiles.grid](
                x, _numbers(shift), _numbers(scale), *(t if save & bit else None for t, bit in ((y, DENSE), (signs, SIGNS),
                (ones, SIGNS), (mask, MASK), (codes, CODES))), rows, columns, row_bytes, tiles.steps, x.stride(0), groups,
                period(columns, groups, inner), stride(shift), stride(scale), float(p0), float(p1), _waves(p1), limit,
                SURROGATE=surrogate, FORM=form(columns, groups, inner), ROWS=tiles.rows, COLUMNS=tiles.columns, **LAUNCH,
            )  # fmt: skip
    return y, signs, ones[0] if ones.shape[0] == 1 else ones.sum(0, dtype=torch.int32), mask, codes


def binarize_backward(
    grad: Tensor, x: Tensor | None, signs: Tensor | None, mask: Tensor | None, codes: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, groups: int, inner: int, surrogate: int, p0: float, p1: float, needs: int, row_bytes: int,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx [R, K] in the dtype of grad, dscale and dshift float32 [groups]; what is not in `needs` has 0 elements."""
    grad = matrix(grad)
    rows, columns = grad.shape
    found = form(columns, groups, inner)
    tiles = walk(rows, columns, found == OF_COLUMNS.value)
    number = dict(dtype=torch.float32, device=grad.device)
    x = None if x is None else matrix(x)
    signs, mask, codes = (None if t is None else t.contiguous() for t in (signs, mask, codes))
    dx = torch.empty((rows, columns) if needs & NEEDS_X else 0, dtype=grad.dtype, device=grad.device)
    size = (rows, columns) if found == OF_EACH.value else (tiles.splits, columns if found == OF_COLUMNS.value else rows)
    sums = [torch.empty(size, **number) if needs & bit else None for bit in (NEEDS_SCALE, NEEDS_SHIFT)]
    if not grad.numel():
        return dx, *(torch.zeros(0 if t is None else groups, **number) for t in sums)
    with on_device(grad):
        binarize_gradient_kernel[tiles.grid](
            grad, x, signs, mask, codes, _numbers(shift), _numbers(scale), dx if needs & NEEDS_X else None, *sums, rows, columns,
            row_bytes, tiles.steps, grad.stride(0), 0 if x is None else x.stride(0), groups, period(columns, groups, inner),
            stride(shift), stride(scale), float(p0), float(p1), _waves(p1), limit / 254, SURROGATE=surrogate, FORM=found,
            ROWS=tiles.rows, COLUMNS=tiles.columns, **LAUNCH,
        )  # fmt: skip
    dscale, dshift = (torch.empty(0, **number) if t is None else add_up(t, groups, inner, found, columns) for t in sums)
    return dx, dscale, dshift
