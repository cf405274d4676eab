"""x *= factor, where factor is one number on the device: nothing is read or written where it is 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import on_device, wide

BLOCK = 4096


@triton.jit
def scale_kernel(x, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by == 1.0:
        return
    at = wide(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside).to(tl.float32)
    tl.store(x + at, (value * by).to(x.dtype.element_ty), mask=inside)


def scale_unless_one_(x: Tensor, factor: Tensor) -> None:
    """x [contiguous, any shape] *= factor [one float32]; no host sync."""
    if not x.is_contiguous():
        raise ValueError(f"scale_unless_one_ takes a contiguous tensor, got strides {tuple(x.stride())}")
    if x.numel():
        with on_device(x):
            scale_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, factor, x.numel(), BLOCK=BLOCK, num_warps=8)
