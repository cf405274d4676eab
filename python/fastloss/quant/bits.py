"""Packing of numbers into bits, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops  # noqa: F401  (ops registers what torch.ops.fastloss holds)
from .bit_tensor import BitTensor, check_bits
from .contract import Pack

_ops = torch.ops.fastloss
_MOST = 4


def _check_numbers(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., K] with at least one column, got {list(x.shape)}")


def _parameter(name: str, p: Tensor | float | None, x: Tensor, group: int) -> Tensor | None:
    """As [R or 1, G]."""
    if p is None:
        return None
    rows, groups = x.numel() // x.shape[-1], -(-x.shape[-1] // group) if group else 1
    p = torch.as_tensor(p, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device).detach()
    if p.numel() == 1:
        return p.reshape(1, 1).expand(1, groups).contiguous()
    if p.numel() == rows * groups:
        return p.reshape(rows, groups).contiguous()
    if p.numel() == groups:
        return p.reshape(1, groups).contiguous()
    raise ValueError(f"{name} must hold 1, {groups} or {rows * groups} numbers for {rows} rows, got {list(p.shape)}")


def _pack(
    x: Tensor, kind: Pack, center: Tensor | None, size: Tensor | None, group: int, low: int, planes: int
) -> tuple[Tensor, Tensor]:
    flat = x.detach().reshape(-1, x.shape[-1])
    made, popcounts = _ops.pack_bits.default(flat, int(kind), center, size, group, low, planes)
    return made.reshape(planes, *x.shape[:-1], made.shape[-1]), popcounts.reshape(planes, *x.shape[:-1])


def pack_bits(x: Tensor, *, center: Tensor | float | None = None, scale: Tensor | float | None = None) -> BitTensor:
    """The signs of x - center as bits: 1 where x >= center (so sign(0) = sign(-0.0) = +1), 0 elsewhere, also for NaN.

    Args:
        x: [..., K] float32, float16, bfloat16 or float64.
        center: one number, or one a row; None: 0.
        scale: what the bits of a row are times when unpacked, one number or one a row; None: 1.

    Returns:
        BitTensor of one plane, values -1 and +1. 1/32 of the bytes of float32 (rows are padded to 512 columns). No
        gradient: `binarize` has one.
    """
    _check_numbers(x)
    planes, popcounts = _pack(x, Pack.SIGN, _parameter("center", center, x, 0), None, 0, 0, 1)
    return BitTensor(planes, popcounts, _float(_parameter("scale", scale, x, 0)), x.shape[-1], (2,), -1)


def pack_ternary(
    x: Tensor, threshold: Tensor | float, *, center: Tensor | float | None = None, scale: Tensor | float | None = None
) -> BitTensor:
    """-1, 0, +1 for x - center < -threshold, between, > threshold: two planes, nonzero and positive. NaN is 0.

    Args: as of `pack_bits`; threshold: one number, or one a row. `ternarize` finds threshold and scale.
    """
    _check_numbers(x)
    center, size = _parameter("center", center, x, 0), _parameter("threshold", threshold, x, 0)
    planes, popcounts = _pack(x, Pack.TERNARY, center, size, 0, 0, 2)
    return BitTensor(planes, popcounts, _float(_parameter("scale", scale, x, 0)), x.shape[-1], (-1, 2), 0)


def pack_codes(
    x: Tensor, scale: Tensor | float, bits: int, *, signed: bool = True, odd: bool = False, group: int = 0
) -> BitTensor:
    """round(x / scale), to even at a half, clamped to the integers of `bits` bits, in as many planes.

    Args:
        x: [..., K].
        scale: one number; one a row; or [R, G] for groups of columns. Numbers are divided by it, and are times it
            when unpacked.
        bits: 1 to 4.
        signed: -2^(bits-1) .. 2^(bits-1) - 1; else 0 .. 2^bits - 1.
        odd: the levels -(2^bits - 1), .., -1, 1, .., 2^bits - 1 in units of scale / 2 instead (no zero; SEQ's
            levels): round(x / scale - 1/2) + 1/2.
        group: columns that share a scale, a multiple of 64; 0: all of a row.

    NaN gets the lowest code. ValueError for what is not so.
    """
    _check_numbers(x)
    if bits != int(bits) or not 1 <= bits <= _MOST:
        raise ValueError(f"bits must be 1 to {_MOST}, got {bits}")
    if group % 64 or group < 0:
        raise ValueError(f"group must be 0 or a multiple of 64, got {group}")
    size = _parameter("scale", scale, x, group)
    assert size is not None
    low = -(2 ** (bits - 1)) if signed or odd else 0
    center = size / 2 if odd else None
    planes, popcounts = _pack(x, Pack.CODES, center, size, group, low, bits)
    if odd:
        return BitTensor(
            planes, popcounts, _float(size / 2), x.shape[-1], tuple(2 << p for p in range(bits)), 1 - 2**bits, group
        )
    return BitTensor(planes, popcounts, _float(size), x.shape[-1], tuple(1 << p for p in range(bits)), low, group)


def _float(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.float()


def unpack_bits(bits: BitTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers [..., K] of a BitTensor, times its scale, in a floating dtype; or the integers without it in an
    integer one."""
    check_bits("bits", bits)
    scale = bits.scale if dtype.is_floating_point else None
    planes, _ = bits.flat()
    made = _ops.unpack_bits.default(planes, bits.columns, list(bits.weights), bits.offset, scale, bits.group, dtype)
    return made.reshape(bits.shape)
