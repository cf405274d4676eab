"""`bgemm`, `bgemm_signs` and `hamming_topk` of the `cuda` backend (csrc/cuda/bgemm.cu, hamming_topk.cu)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend_cuda
from ..compiled import _C, DTYPES, pointer
from ..registry import kernel
from .contract import row_bytes

#: What a tile of the product becomes (csrc/cuda/bit_products.h).
OUTPUTS = {**DTYPES, torch.int32: 3}
SIGNS = 4
MOST_PLANES = 4
LONGEST_LIST = 1024
#: -1: the kernel that the device wants. Tests name one: 4 (bits as int8; 0: as bits) + 0, 1 or 2 (tiles of 64 x 64, 128 x 128,
#: 256 x 128).
PLAN = -1


def _largest(weights: Sequence[int], offset: int) -> int:
    """The largest absolute value that the planes can hold."""
    return max(abs(offset + sum(w for w in weights if w > 0)), abs(offset + sum(w for w in weights if w < 0)))


def _why_not(
    a: Tensor, a_popcounts: Tensor, b: Tensor, b_popcounts: Tensor, columns: int, a_weights: Sequence[int],
    a_offset: int, b_weights: Sequence[int], b_offset: int, *rest: Any,
) -> str | None:  # fmt: skip
    if reason := backend_cuda._missing(a):
        return reason
    for other in (a_popcounts, b, b_popcounts, *rest):
        if isinstance(other, Tensor) and other.device != a.device:
            return f"takes tensors of one device, got {a.device} and {other.device}"
    if len(a_weights) > MOST_PLANES or len(b_weights) > MOST_PLANES:
        return f"takes up to {MOST_PLANES} planes, got {len(a_weights)} and {len(b_weights)}"
    if columns * _largest(a_weights, a_offset) * _largest(b_weights, b_offset) >= 2**31:
        return f"counts in 32 bits, and {columns} columns of these weights can reach 2^31"
    return None


def _why_not_bgemm(a: Tensor, *args: Any) -> str | None:
    dtype = args[-1]
    if dtype not in OUTPUTS:
        return f"writes int32, float32, float16 and bfloat16, got {dtype}"
    return _why_not(a, *args)


def _why_not_topk(a: Tensor, *args: Any) -> str | None:
    count = args[-1]
    if count > LONGEST_LIST:
        return f"keeps up to {LONGEST_LIST} a row, got count={count}"
    return _why_not(a, *args)


def _place(x: Tensor) -> tuple[int, int]:
    device = x.device.index
    return device, torch._C._cuda_getCurrentRawStream(device)


class _Operand:
    """The planes of one side: `args` for the kernel. It keeps alive what `args` points to."""

    def __init__(
        self, name: str, planes: Tensor, popcounts: Tensor, columns: int, weights: Sequence[int], offset: int
    ) -> None:
        shape = (len(weights), planes.shape[1] if planes.dim() == 3 else -1, row_bytes(columns))
        if planes.dtype != torch.uint8 or tuple(planes.shape) != shape:
            raise ValueError(
                f"{name} of {columns} columns must be uint8 [{len(weights)}, rows, {shape[2]}], "
                f"got {planes.dtype} {list(planes.shape)}"
            )
        if popcounts.dtype != torch.int32 or popcounts.shape != planes.shape[:2]:
            raise ValueError(
                f"{name}_popcounts must be int32 {list(planes.shape[:2])}, got {popcounts.dtype} {list(popcounts.shape)}"
            )
        planes, popcounts = planes.contiguous(), popcounts.contiguous()
        if planes.data_ptr() % 16:  # the kernel copies 16 bytes at a time
            planes = planes.clone()
        self.kept = planes, popcounts
        self.args = (pointer(planes), pointer(popcounts), planes.shape[1], columns, list(weights), offset)


def _operands(
    a: Tensor, a_popcounts: Tensor, b: Tensor, b_popcounts: Tensor, columns: int, a_weights: Sequence[int],
    a_offset: int, b_weights: Sequence[int], b_offset: int,
) -> tuple[_Operand, _Operand]:  # fmt: skip
    return (
        _Operand("a", a, a_popcounts, columns, a_weights, a_offset),
        _Operand("b", b, b_popcounts, columns, b_weights, b_offset),
    )


def _vector(name: str, x: Tensor | None, size: int) -> Tensor | None:
    if x is None:
        return None
    if x.numel() != size:
        raise ValueError(f"{name} must have {size} numbers, got {list(x.shape)}")
    return x.to(torch.float32).contiguous()


def _bgemm(product: tuple[Any, ...], epilogue: tuple[Any, ...], output: int, out: Tensor, popcounts: Tensor) -> None:
    a, b = _operands(*product)
    m, n = product[0].shape[1], product[2].shape[1]
    row_scale, column_scale, bias, activation = epilogue
    row_scale, column_scale = _vector("row_scale", row_scale, m), _vector("column_scale", column_scale, n)
    bias = _vector("bias", bias, n)
    device, stream = _place(product[0])
    _C.bgemm_cuda(  # type: ignore[union-attr]
        a=a.args, b=b.args, row_scale=pointer(row_scale), column_scale=pointer(column_scale), bias=pointer(bias),
        activation=int(activation), output=output, out=pointer(out), popcounts=pointer(popcounts), plan=PLAN,
        device=device, stream=stream,
    )  # fmt: skip


@kernel("bgemm", "cuda", _why_not_bgemm)
def bgemm(*args: Any) -> Tensor:
    """activation((acc row_scale) column_scale + bias), or acc itself as int32."""
    product, epilogue, dtype = args[:9], args[9:13], args[13]
    a, b = product[0], product[2]
    if dtype == torch.int32 and (epilogue[3] or any(x is not None for x in epilogue[:3])):
        raise ValueError("an int32 product takes no scale, bias or activation")
    out = torch.empty((a.shape[1], b.shape[1]), dtype=dtype, device=a.device)
    _bgemm(product, epilogue, OUTPUTS[dtype], out, out)
    return out


@kernel("bgemm_signs", "cuda", _why_not)
def bgemm_signs(*args: Any) -> tuple[Tensor, Tensor]:
    """The signs of that number in float32, packed."""
    product, epilogue = args[:9], args[9:13]
    a, n = product[0], product[2].shape[1]
    planes = torch.empty((1, a.shape[1], row_bytes(n)), dtype=torch.uint8, device=a.device)
    popcounts = torch.zeros((1, a.shape[1]), dtype=torch.int32, device=a.device)
    _bgemm(product, epilogue, SIGNS, planes, popcounts)
    return planes, popcounts


@kernel("hamming_topk", "cuda", _why_not_topk)
def hamming_topk(*args: Any) -> tuple[Tensor, Tensor]:
    """The `count` largest products of each row, falling, the lowest index first among equals."""
    product, b_scale, count = args[:9], args[9], args[10]
    m, n = product[0].shape[1], product[2].shape[1]
    if not 0 <= count <= n:
        raise ValueError(f"count must be 0 to {n}, the rows of b; got {count}")
    a, b = _operands(*product)
    b_scale = _vector("b_scale", b_scale, n)
    device, stream = _place(product[0])
    splits = _C.hamming_topk_splits_cuda(m, n, device)  # type: ignore[union-attr]
    where = product[0].device
    keys = torch.empty((m, splits, count), dtype=torch.int64, device=where)
    values = torch.empty((m, count), dtype=torch.int32 if b_scale is None else torch.float32, device=where)
    index = torch.empty((m, count), dtype=torch.int64, device=where)
    _C.hamming_topk_cuda(  # type: ignore[union-attr]
        a=a.args, b=b.args, scale=pointer(b_scale), count=count, keys=pointer(keys), splits=splits,
        values=pointer(values), index=pointer(index), plan=PLAN, device=device, stream=stream,
    )  # fmt: skip
    return values, index
