"""Products of floating rows with packed numbers, as the layers call them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import batched
from .bit_tensor import BitTensor
from .ops import wide
from .reference_bits import by_group

_ops = torch.ops.fastloss
#: The largest code of `quantize_rows`.
INT8_TOP = 127


class Coding(NamedTuple):
    """What the numbers of a BitTensor are made of, besides its tensors."""

    columns: int
    weights: tuple[int, ...]
    offset: int
    group: int = 0


def coding_of(bits: BitTensor) -> Coding:
    return Coding(bits.columns, tuple(bits.weights), bits.offset, bits.group)


def signs(columns: int) -> Coding:
    """One plane of -1 and +1."""
    return Coding(columns, (2,), -1)


def ternary(columns: int) -> Coding:
    """Planes nonzero and positive: -1, 0 and +1."""
    return Coding(columns, (-1, 2), 0)


def matmul(
    x: Tensor, planes: Tensor, coding: Coding, scale: Tensor | None = None, *, transposed: bool = False,
    x_scale: Tensor | None = None, bias: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The op `lowbit_matmul` (docs/design.md, "The bit contract"), with the result in x's dtype unless `dtype` says another."""
    return _ops.lowbit_matmul.default(
        x, planes, coding.columns, list(coding.weights), coding.offset, scale, coding.group, transposed, x_scale, bias,
        dtype or x.dtype,
    )  # fmt: skip


def integers(planes: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
    """The integers [R, K] as floating numbers."""
    return _ops.unpack_bits.default(
        planes, coding.columns, list(coding.weights), coding.offset, None, coding.group, dtype
    )


def dense(planes: Tensor, coding: Coding, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers [R, K], differentiable in their scale."""
    found = integers(planes, coding, dtype)
    return found if scale is None else found * by_group(scale.to(dtype), coding.group, coding.columns)


def transposed_matmul(grad: Tensor, planes: Tensor, coding: Coding, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """grad (value scale): on the packed bits, or differentiable where the running backward has to be."""
    if again(grad):
        return (grad.to(wide(grad)) @ dense(planes, coding, scale, wide(grad))).to(dtype)
    return matmul(grad, planes, coding, scale, transposed=True, dtype=dtype)


def again(grad: Tensor) -> bool:
    """Whether the running backward is itself differentiated, or batched: it then takes PyTorch's own operations."""
    return torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(grad))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [M, K], scale [M]): scale = absmax of the row / 127, codes = rne(x / scale); a row of zeros has scale 0.

    A row with a NaN or an infinity has a scale that is none either, and so products of NaN.
    """
    x = x.to(wide(x))
    scale = x.abs().amax(1) / INT8_TOP if x.shape[1] else x.new_zeros(x.shape[0])
    codes = (x / scale[:, None]).round_().nan_to_num_(0.0).clamp_(-INT8_TOP, INT8_TOP)
    return codes.to(torch.int8), scale


def dequantized(x: Tensor) -> Tensor:
    """x as `quantize_rows` rounds it, with the gradient of the identity."""
    codes, scale = quantize_rows(x.detach())
    return x + (codes * scale[:, None] - x).detach()
