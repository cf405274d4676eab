"""fake_quant and its backward; docs/design.md, "The bit contract".

Bytes moved: x read and y written; backward: grad and x read, dx written. 16384 x 8192 in bf16 on an H200: 537 MB, 0.12-0.16 ms,
and 805 MB, 0.18-0.24 ms; a true division and a rounding are some 20 instructions an element, about what the memory leaves
time for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bit_tiles import (
    LAUNCH,
    OF_COLUMNS,
    add_up,
    form,
    parameter,
    period,
    round_half_even,
    store_sum,
    stride,
    tile_start,
    walk,
)
from .common import on_device

NEEDS_X, NEEDS_SCALE, NEEDS_OFFSET = 1, 2, 4  # bits of `needs`
#: Groups of fewer elements lie side by side in a row of a tile.
NARROW = 16


@triton.jit
def level(x, scale, offset, zero_point, r, c, keep_r, keep_c, groups, inner, columns, stride_scale, stride_offset, stride_zero,
          low, high, steps, shift, FORM: tl.constexpr, PLAIN: tl.constexpr, ROUNDED: tl.constexpr):  # fmt: skip
    """(v, q, inside, scale, offset). PLAIN: steps 1 and shift 0. ROUNDED: the range is tested on rne(v). A NaN passes through."""
    size = parameter(scale, r, c, keep_r, keep_c, groups, inner, columns, stride_scale, FORM)
    middle, least, most = 0.0, low, high
    if offset is not None:
        middle = parameter(offset, r, c, keep_r, keep_c, groups, inner, columns, stride_offset, FORM)
        x -= middle
    if zero_point is not None:
        zero = parameter(zero_point, r, c, keep_r, keep_c, groups, inner, columns, stride_zero, FORM)
        least, most = low - zero, high - zero
    v = tl.div_rn(x, tl.broadcast_to(size, x.shape))
    q = tl.where(v < least, least, v)
    q = tl.where(q > most, most, q)
    if PLAIN:
        q = round_half_even(q)
    else:
        q = tl.div_rn(round_half_even(q * steps - shift) + shift, tl.zeros_like(q) + steps)
    at = round_half_even(v) if ROUNDED else v
    return v, q, (at >= least) & (at <= most), size, middle


@triton.jit(do_not_specialize=["R", "rounds", "groups"])
def fake_quant_kernel(
    x, scale, offset, zero_point, y, R, K, rounds, groups, inner, stride_scale, stride_offset, stride_zero, low, high, steps,
    shift, FORM: tl.constexpr, PLAIN: tl.constexpr, ROUNDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    for step in range(0, rounds):
        row, column = tile_start(step, rounds, ROWS, COLUMNS, False)
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        at = r[:, None] * K + c[None, :]
        inside = (r < R)[:, None] & (c < K)[None, :]
        number = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        _, q, _, size, middle = level(
            number, scale, offset, zero_point, r, c, r < R, c < K, groups, inner, K, stride_scale, stride_offset, stride_zero,
            low, high, steps, shift, FORM, PLAIN, ROUNDED,
        )  # fmt: skip
        tl.store(y + at, (q * size + middle).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "rounds", "groups"])
def fake_quant_gradient_kernel(
    grad, x, scale, offset, zero_point, dx, scale_sums, offset_sums, R, K, rounds, groups, inner, stride_scale, stride_offset,
    stride_zero, low, high, steps, shift, FORM: tl.constexpr, PLAIN: tl.constexpr, ROUNDED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """scale_sums and offset_sums: the sums of rows or of columns, one for each program."""
    DOWN: tl.constexpr = FORM == OF_COLUMNS
    scale_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    offset_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, rounds):
        row, column = tile_start(step, rounds, ROWS, COLUMNS, DOWN)
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        at = r[:, None] * K + c[None, :]
        real = (r < R)[:, None] & (c < K)[None, :]
        g = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
        number = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
        v, q, inside, _, _ = level(
            number, scale, offset, zero_point, r, c, r < R, c < K, groups, inner, K, stride_scale, stride_offset, stride_zero,
            low, high, steps, shift, FORM, PLAIN, ROUNDED,
        )  # fmt: skip
        if dx is not None:
            tl.store(dx + at, tl.where(inside, g, 0.0).to(dx.dtype.element_ty), mask=real)
        if scale_sums is not None:
            scale_total += tl.where(real, g * tl.where(inside, q - v, q), 0.0)
        if offset_sums is not None:
            offset_total += tl.where(inside, 0.0, g)
    if scale_sums is not None:
        store_sum(scale_sums, scale_total, R, K, ROWS, COLUMNS, DOWN)
    if offset_sums is not None:
        store_sum(offset_sums, offset_total, R, K, ROWS, COLUMNS, DOWN)


def view(shape: tuple[int, int], groups: int, inner: int) -> tuple[int, int]:
    """(rows, columns) of the same elements in which a parameter belongs to a row or to a column."""
    rows, columns = shape
    if groups == 1 or inner % columns == 0 or (columns % (groups * inner) == 0 and inner < NARROW):
        return shape
    side_by_side = inner if inner >= NARROW else groups * inner
    return rows * columns // side_by_side, side_by_side


class Launch:
    """What both kernels are given besides tensors of elements."""

    def __init__(self, x: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, groups: int, inner: int,
                 low: float, high: float, steps: float, shift: float, rounded: bool, sums: bool) -> None:  # fmt: skip
        given = (scale, offset, zero_point)
        self.rows, self.columns = view((x.shape[0], x.shape[1]), groups, inner)
        self.form = form(self.columns, groups, inner)
        self.walk = walk(self.rows, self.columns, sums and self.form == OF_COLUMNS.value)
        self.parameters = [None if t is None else t.float().contiguous() for t in given]
        self.sizes = (
            self.rows,
            self.columns,
            self.walk.steps,
            groups,
            period(self.columns, groups, inner),
            *map(stride, given),
        )
        self.numbers = (float(low), float(high), float(steps), float(shift))
        plain = steps == 1 and shift == 0
        self.options = dict(
            FORM=self.form, PLAIN=plain, ROUNDED=rounded, ROWS=self.walk.rows, COLUMNS=self.walk.columns, **LAUNCH
        )


def fake_quant(
    x: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, groups: int, inner: int, *levels: float
) -> Tensor:
    """y [R, K]; `levels`: low, high, steps, shift, rounded."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        launch = Launch(x, scale, offset, zero_point, groups, inner, *levels, sums=False)
        with on_device(x):
            fake_quant_kernel[launch.walk.grid](
                x.contiguous(), *launch.parameters, y, *launch.sizes, *launch.numbers, **launch.options
            )
    return y


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, groups: int, inner: int,
    low: float, high: float, steps: float, shift: float, rounded: bool, needs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx [R, K] in the dtype of grad, dscale and doffset float32 [groups]; what is not in `needs` has 0 elements."""
    number = dict(dtype=torch.float32, device=x.device)
    dx = torch.empty(grad.shape if needs & NEEDS_X else 0, dtype=grad.dtype, device=grad.device)
    wanted = [bool(needs & bit) for bit in (NEEDS_SCALE, NEEDS_OFFSET)]
    if not x.numel():
        return dx, *(torch.zeros(groups if want else 0, **number) for want in wanted)
    launch = Launch(x, scale, offset, zero_point, groups, inner, low, high, steps, shift, rounded, sums=True)
    size = (launch.walk.splits, launch.columns if launch.form == OF_COLUMNS.value else launch.rows)
    sums = [torch.empty(size, **number) if want else None for want in wanted]
    with on_device(x):
        fake_quant_gradient_kernel[launch.walk.grid](
            grad.contiguous(), x.contiguous(), *launch.parameters, dx if needs & NEEDS_X else None, *sums, *launch.sizes,
            *launch.numbers, **launch.options,
        )  # fmt: skip
    dscale, doffset = (
        torch.empty(0, **number) if t is None else add_up(t, groups, inner, launch.form, launch.columns) for t in sums
    )
    return dx, dscale, doffset
