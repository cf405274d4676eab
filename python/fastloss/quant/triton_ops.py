"""The glue of the bit ops of the `triton` backend. triton is imported when a launch is due, not with fastloss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend_triton import _missing
from ..compiled import DTYPES
from ..registry import kernel
from .contract import Pack, Surrogate, row_bytes
from .reference_quant import limit

#: Indices of columns are 32 bits.
LARGEST = 1 << 30
MOST_PLANES = 4
#: Columns of the rows that lowbit_matmul multiplies: offsets in a tile are 32 bits.
WIDEST = 1 << 22
#: Columns whose int8 products cannot leave int32.
LONGEST_INTEGER = (1 << 31) // (128 * 127) - 1


def _number(name: str, x: Tensor) -> str | None:
    """Why the kernels do not read x."""
    if x.dtype not in DTYPES:
        return f"takes {name} in float32, float16 or bfloat16, got {x.dtype}"
    return None


def _matrix(name: str, x: Tensor) -> str | None:
    if x.dim() != 2 or x.shape[1] > LARGEST:
        return f"takes {name} [R, K] with up to {LARGEST} columns, got {list(x.shape)}"
    return _missing(x) or _number(name, x)


def _planes(planes: Tensor, columns: int, weights: Sequence[int]) -> str | None:
    wanted = (len(weights), *planes.shape[1:2], row_bytes(columns))
    if planes.dtype != torch.uint8 or tuple(planes.shape) != wanted or not 0 < len(weights) <= MOST_PLANES:
        return f"takes 1 to {MOST_PLANES} planes, uint8 {list(wanted)}, got {planes.dtype} {list(planes.shape)}"
    if columns > LARGEST:
        return f"takes up to {LARGEST} columns, got {columns}"
    return _missing(planes)


def _table(name: str, table: Tensor | None, rows: int, columns: int, group: int) -> str | None:
    """A table [R or 1, G] of groups of columns."""
    groups = -(-columns // group) if group else 1
    if table is None or (table.dim() == 2 and table.shape[0] in (1, rows) and table.shape[1] == groups):
        return None
    return f"takes {name} [{rows} or 1, {groups}], got {list(table.shape)}"


def _groups(x: Tensor, groups: int, inner: int, *parameters: Tensor | None) -> str | None:
    if any(p is not None and p.numel() not in (1, groups) for p in parameters):
        return f"takes parameters of 1 or {groups} numbers, got {[p if p is None else p.numel() for p in parameters]}"
    if groups < 1 or (groups > 1 and (inner < 1 or x.numel() % (groups * inner))):
        return f"takes groups * inner that divides {x.numel()} elements, got groups={groups}, inner={inner}"
    if groups > 1 and groups * inner > LARGEST:
        return f"takes groups * inner up to {LARGEST}, got {groups * inner}"
    return None


def _why_not_pack(
    x: Tensor, kind: int, center: Tensor | None, scale: Tensor | None, group: int, low: int, planes: int
) -> str | None:
    if not 0 < planes <= MOST_PLANES:
        return f"makes 1 to {MOST_PLANES} planes, got planes={planes}"
    return (
        _matrix("x", x)
        or _table("center", center, x.shape[0], x.shape[1], group)
        or _table("scale", scale, x.shape[0], x.shape[1], group)
    )


@kernel("pack_bits", "triton", _why_not_pack)
def pack_bits(x: Tensor, kind: int, *args: Any) -> tuple[Tensor, Tensor]:
    from ..triton_kernels import pack_bits as kernels

    planes = {Pack.SIGN: 1, Pack.TERNARY: 2}.get(Pack(kind), args[-1])
    return kernels.pack_bits(x, int(kind), *args[:-1], planes, row_bytes(x.shape[1]))


def _why_not_unpack(
    planes: Tensor, columns: int, weights: Sequence[int], offset: int, scale: Tensor | None, group: int,
    dtype: torch.dtype,
) -> str | None:  # fmt: skip
    if dtype not in (*DTYPES, torch.int8, torch.int32):
        return f"makes float32, float16, bfloat16, int8 or int32, got {dtype}"
    return _planes(planes, columns, weights) or _table("scale", scale, planes.shape[1], columns, group)


@kernel("unpack_bits", "triton", _why_not_unpack)
def unpack_bits(*args: Any) -> Tensor:
    from ..triton_kernels import unpack_bits as kernels

    return kernels.unpack_bits(*args)


def _why_not_lowbit(
    x: Tensor, planes: Tensor, columns: int, weights: Sequence[int], offset: int, scale: Tensor | None, group: int,
    transposed: bool, x_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> str | None:  # fmt: skip
    integer = x.dtype == torch.int8
    depth, rows = (planes.shape[1], None) if transposed else (columns, planes.shape[1])
    if dtype not in DTYPES or (x.dtype not in DTYPES and not integer):
        return f"takes float32, float16, bfloat16 or int8 rows and makes the first three, got {x.dtype} and {dtype}"
    if x.dim() != 2 or x.shape[1] != depth or depth > WIDEST:
        return f"takes x [M, {depth}] with up to {WIDEST} columns, got {list(x.shape)}"
    if integer and (transposed or depth > LONGEST_INTEGER):
        return f"takes int8 rows of up to {LONGEST_INTEGER} columns, not transposed, got {depth} and transposed={transposed}"
    if x_scale is not None and (not integer or x_scale.numel() != x.shape[0]):
        return f"takes x_scale [{x.shape[0]}] of int8 rows, got {list(x_scale.shape)} of {x.dtype} rows"
    if bias is not None and bias.numel() != rows:
        return f"takes a bias of the {rows} rows of weights, not transposed, got {list(bias.shape)}"
    if group % 64:
        return f"takes groups of a multiple of 64 columns, got group={group}"
    return _planes(planes, columns, weights) or _table("scale", scale, planes.shape[1], columns, group)


@kernel("lowbit_matmul", "triton", _why_not_lowbit)
def lowbit_matmul(*args: Any) -> Tensor:
    from ..triton_kernels import lowbit_matmul as kernels

    return kernels.lowbit_matmul(*args)


def _why_not_binarize(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, groups: int, inner: int, *_: Any
) -> str | None:
    return _matrix("x", x) or _groups(x, groups, inner, shift, scale)


@kernel("binarize", "triton", _why_not_binarize)
def binarize(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, groups: int, inner: int, surrogate: int, p0: float,
    p1: float, save: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from ..triton_kernels import binarize as kernels

    size, t = row_bytes(x.shape[1]), limit(surrogate, p0, p1)
    return kernels.binarize(x, shift, scale, groups, inner, surrogate, p0, p1, save, size, t)


def _why_not_binarize_backward(
    grad: Tensor, x: Tensor | None, signs: Tensor | None, mask: Tensor | None, codes: Tensor | None,
    shift: Tensor | None, scale: Tensor | None, groups: int, inner: int, surrogate: int, p0: float, p1: float, needs: int,
) -> str | None:  # fmt: skip
    if x is None and mask is None and codes is None and surrogate != Surrogate.IDENTITY and needs & 5:
        return f"takes x, mask or codes for surrogate {surrogate}"
    if x is None and signs is None and needs & 2:
        return "takes x or signs for the gradient of the scale"
    for name, t, shape in (
        ("x", x, grad.shape), ("codes", codes, grad.shape), ("signs", signs, (grad.shape[0], row_bytes(grad.shape[-1]))),
        ("mask", mask, (grad.shape[0], row_bytes(grad.shape[-1]))),
    ):  # fmt: skip
        if t is not None and tuple(t.shape) != tuple(shape):
            return f"takes {name} {list(shape)}, got {list(t.shape)}"
    return (
        _matrix("grad", grad) or (None if x is None else _number("x", x)) or _groups(grad, groups, inner, shift, scale)
    )


@kernel("binarize_backward", "triton", _why_not_binarize_backward)
def binarize_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..triton_kernels import binarize as kernels

    return kernels.binarize_backward(grad, *args, row_bytes(grad.shape[1]), limit(*args[8:11]))


def _why_not_fake_quant(
    x: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, groups: int, inner: int, *_: Any
) -> str | None:
    return _matrix("x", x) or _groups(x, groups, inner, scale, offset, zero_point)


@kernel("fake_quant", "triton", _why_not_fake_quant)
def fake_quant(*args: Any) -> Tensor:
    from ..triton_kernels import fake_quant as kernels

    return kernels.fake_quant(*args)


def _why_not_fake_quant_backward(grad: Tensor, x: Tensor, *args: Any) -> str | None:
    if grad.shape != x.shape:
        return f"takes grad and x of one shape, got {list(grad.shape)} and {list(x.shape)}"
    return _number("grad", grad) or _why_not_fake_quant(x, *args)


@kernel("fake_quant_backward", "triton", _why_not_fake_quant_backward)
def fake_quant_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..triton_kernels import fake_quant as kernels

    return kernels.fake_quant_backward(*args)


def _why_not_codec(x: Tensor, group: int, bits: int) -> str | None:
    if bits not in (4, 8) or not 0 < group <= LARGEST or group * bits % 8:
        return f"takes 8 bits, or 4 with an even group, of up to {LARGEST} elements; got bits={bits}, group={group}"
    return _missing(x)


def _why_not_quantize(
    x: Tensor, group: int, bits: int, low: Tensor | None, high: Tensor | None, seed: Tensor | None
) -> str | None:
    if low is not None and high is not None and (low.numel() != high.numel() or not low.numel()):
        return f"takes as many low as high, got {low.numel()} and {high.numel()}"
    return _why_not_codec(x, group, bits) or _number("x", x)


@kernel("quantize_groups", "triton", _why_not_quantize)
def quantize_groups(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..triton_kernels import quantize_groups as kernels

    return kernels.quantize_groups(*args)


def _why_not_dequantize(
    codes: Tensor, low: Tensor, step: Tensor, n: int, group: int, bits: int, dtype: torch.dtype
) -> str | None:
    if dtype not in DTYPES:
        return f"makes float32, float16 or bfloat16, got {dtype}"
    if codes.numel() * 8 != low.numel() * group * bits or not 0 <= n <= low.numel() * group:
        wanted = f"codes [{low.numel()}, {group * bits // 8}] and up to {low.numel() * group} elements"
        return f"takes {wanted}, got {list(codes.shape)} and {n}"
    return _why_not_codec(codes, group, bits)


@kernel("dequantize_groups", "triton", _why_not_dequantize)
def dequantize_groups(*args: Any) -> Tensor:
    from ..triton_kernels import quantize_groups as kernels

    return kernels.dequantize_groups(*args)
