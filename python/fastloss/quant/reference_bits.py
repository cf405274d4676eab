"""The `reference` backend of packing and of products of bits: plain PyTorch, exact, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import kernel
from .contract import Activation, Pack, row_bytes
from .ops import wide


def pack(bits: Tensor) -> Tensor:
    """bool [..., K] -> uint8 [..., B], LSB first, zeros behind."""
    columns = bits.shape[-1]
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, 8 * row_bytes(columns) - columns))
    weights = 2 ** torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack(planes: Tensor, columns: int) -> Tensor:
    """uint8 [..., B] -> uint8 0 and 1 [..., K]."""
    shifts = torch.arange(8, device=planes.device, dtype=torch.uint8)
    return ((planes[..., None] >> shifts) & 1).flatten(-2)[..., :columns]


def packed(bits: Tensor) -> tuple[Tensor, Tensor]:
    """bool [P, R, K] -> (planes, popcounts)."""
    return pack(bits), bits.sum(-1, dtype=torch.int32)


def by_group(scale: Tensor, group: int, columns: int) -> Tensor:
    """[R or 1, G] of groups of columns -> something that broadcasts with [R, K]."""
    return scale if group == 0 else scale.repeat_interleave(group, 1)[:, :columns]


def values(planes: Tensor, columns: int, weights: Sequence[int], offset: int) -> Tensor:
    """The integers [R, K] in float64."""
    if planes.dim() != 3 or planes.shape[0] != len(weights) or planes.shape[2] != row_bytes(columns):
        raise ValueError(
            f"planes of {columns} columns must be [{len(weights)}, R, {row_bytes(columns)}], got {list(planes.shape)}"
        )
    bits = unpack(planes, columns).double()
    factor = torch.tensor(weights, dtype=torch.float64, device=planes.device)
    return offset + (bits * factor[:, None, None]).sum(0)


@kernel("pack_bits", "reference")
def pack_bits(
    x: Tensor, kind: int, center: Tensor | None, scale: Tensor | None, group: int, low: int, planes: int
) -> tuple[Tensor, Tensor]:
    x, columns = x.to(wide(x)), x.shape[1]
    middle = 0.0 if center is None else by_group(center.to(x.dtype), group, columns)
    size = 1.0 if scale is None else by_group(scale.to(x.dtype), group, columns)
    if kind == Pack.SIGN:
        return packed((x >= middle)[None])
    d = x - middle
    if kind == Pack.TERNARY:
        return packed(torch.stack((d.abs() > size, d > size)))
    codes = (d / size).round().nan_to_num(low, 2.0**24, -(2.0**24)).clamp(low, low + 2**planes - 1).int() - low
    shifts = torch.arange(planes, device=x.device, dtype=torch.int32)[:, None, None]
    return packed((codes >> shifts & 1).bool())


@kernel("unpack_bits", "reference")
def unpack_bits(
    planes: Tensor, columns: int, weights: Sequence[int], offset: int, scale: Tensor | None, group: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    found = values(planes, columns, weights, offset)
    return found.to(dtype) if scale is None else (found * by_group(scale, group, columns)).to(dtype)


def products(
    a: Tensor, b: Tensor, columns: int, a_weights: Sequence[int], a_offset: int, b_weights: Sequence[int], b_offset: int
) -> Tensor:
    """sum over k of a_ik b_jk, exactly, in float64."""
    return values(a, columns, a_weights, a_offset) @ values(b, columns, b_weights, b_offset).T


def check_epilogue(
    row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None, activation: int, dtype: torch.dtype
) -> None:
    """Raise TypeError or ValueError for what `bgemm` makes on no backend."""
    if dtype != torch.int32 and not dtype.is_floating_point:
        raise TypeError(f"bgemm makes int32 and floating numbers, asked for {dtype}")
    if activation not in tuple(Activation):
        raise ValueError(f"activation must be 0 to {max(Activation)}, got {activation}")
    if dtype == torch.int32 and (activation or any(t is not None for t in (row_scale, column_scale, bias))):
        raise ValueError("dtype int32 is the sum itself: without scales, bias and activation")


def in_int32(acc: Tensor) -> Tensor:
    """Exact integers in int32; ValueError for what it does not hold."""
    if acc.numel() and (largest := acc.abs().amax().item()) > 2**31 - 1:
        raise ValueError(f"sums must fit in int32, got one of {largest:.0f}")
    return acc.to(torch.int32)


def _epilogue(
    acc: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None, activation: int
) -> Tensor:
    y = acc.float()
    if row_scale is not None:
        y = y * row_scale[:, None]
    if column_scale is not None:
        y = y * column_scale
    if bias is not None:
        y = y + bias
    if activation == Activation.RELU:
        return y.relu()
    if activation == Activation.HARDTANH:
        return torch.nn.functional.hardtanh(y)
    return torch.nn.functional.silu(y) if activation == Activation.SILU else y


@kernel("bgemm", "reference")
def bgemm(
    a: Tensor, a_popcounts: Tensor, b: Tensor, b_popcounts: Tensor, columns: int, a_weights: Sequence[int],
    a_offset: int, b_weights: Sequence[int], b_offset: int, row_scale: Tensor | None, column_scale: Tensor | None,
    bias: Tensor | None, activation: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_epilogue(row_scale, column_scale, bias, activation, dtype)
    acc = products(a, b, columns, a_weights, a_offset, b_weights, b_offset)
    if dtype == torch.int32:
        return in_int32(acc)
    return _epilogue(acc, row_scale, column_scale, bias, activation).to(dtype)


@kernel("bgemm_signs", "reference")
def bgemm_signs(
    a: Tensor, a_popcounts: Tensor, b: Tensor, b_popcounts: Tensor, columns: int, a_weights: Sequence[int],
    a_offset: int, b_weights: Sequence[int], b_offset: int, row_scale: Tensor | None, column_scale: Tensor | None,
    bias: Tensor | None, activation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc = products(a, b, columns, a_weights, a_offset, b_weights, b_offset)
    return packed((_epilogue(acc, row_scale, column_scale, bias, activation) >= 0)[None])


@kernel("hamming_topk", "reference")
def hamming_topk(
    a: Tensor, a_popcounts: Tensor, b: Tensor, b_popcounts: Tensor, columns: int, a_weights: Sequence[int],
    a_offset: int, b_weights: Sequence[int], b_offset: int, b_scale: Tensor | None, count: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc = products(a, b, columns, a_weights, a_offset, b_weights, b_offset)
    score = in_int32(acc) if b_scale is None else acc.float() * b_scale
    order = torch.argsort(score, dim=1, descending=True, stable=True)[:, :count].contiguous()
    return score.gather(1, order), order


@kernel("lowbit_matmul", "reference")
def lowbit_matmul(
    x: Tensor, planes: Tensor, columns: int, weights: Sequence[int], offset: int, scale: Tensor | None, group: int,
    transposed: bool, x_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    w = values(planes, columns, weights, offset)
    if scale is not None:
        w = w * by_group(scale, group, columns)
    y = x.double() @ (w if transposed else w.T)
    if x_scale is not None:
        y = y * x_scale[:, None]
    return (y if bias is None else y + bias).to(dtype)
