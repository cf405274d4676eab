"""`lowbit_matmul` of the `cpp` backend (csrc/cpu/lowbit_matmul.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend_cpp, kept_memory
from ..compiled import _C, DTYPES, pointer
from ..registry import kernel
from .contract import row_bytes

_X_DTYPES = {**DTYPES, torch.int8: 3}
#: Sums of int8 products stay below 2^31 up to here.
_LONGEST = 1 << 17


def _why_not(
    x: Tensor, planes: Tensor, columns: int, weights: Sequence[int], offset: int, scale: Tensor | None, group: int,
    transposed: bool, x_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> str | None:  # fmt: skip
    if backend_cpp.MISSING or x.device.type != "cpu":
        return backend_cpp._missing(x)
    if x.dtype not in _X_DTYPES or dtype not in DTYPES:
        return f"takes float32, float16, bfloat16 or int8 rows and makes a floating result, got {x.dtype} and {dtype}"
    if any(t is not None and t.dtype not in DTYPES for t in (scale, x_scale, bias)):
        return "takes float32, float16 and bfloat16 scales and bias"
    if not 1 <= len(weights) <= 4:
        return f"takes 1 to 4 planes, got {len(weights)}"
    low, high = (offset + sum(w for w in weights if (w < 0) == negative) for negative in (True, False))
    if low < -127 or high > 127:
        return f"takes numbers in [-127, 127], got {low} to {high}"
    if transposed and (x_scale is not None or bias is not None or x.dtype == torch.int8):
        return "transposed, it takes floating rows, without x_scale and bias"
    if x.dtype == torch.int8 and columns > _LONGEST:
        return f"takes int8 rows of up to {_LONGEST} columns, got {columns}"
    if x_scale is not None and x.dtype != torch.int8:
        return "takes x_scale with int8 rows only"
    return None


def _check(x: Tensor, planes: Tensor, columns: int, scale: Tensor | None, group: int, wanted: int, **rows: Any) -> int:
    """Groups; ValueError for what would be read out of bounds."""
    if x.dim() != 2 or x.shape[1] != wanted:
        raise ValueError(f"x must be [M, {wanted}], got {list(x.shape)}")
    line = row_bytes(columns)
    if planes.dim() != 3 or planes.dtype != torch.uint8 or planes.shape[2] != line:
        raise ValueError(
            f"planes of {columns} columns must be uint8 [P, R, {line}], got {planes.dtype} {list(planes.shape)}"
        )
    if group < 0 or group % 64:
        raise ValueError(f"group must be 0 or a multiple of 64, got {group}")
    groups = -(-columns // group) if group else 1
    if scale is not None and (
        scale.dim() != 2 or scale.shape[0] not in (1, planes.shape[1]) or scale.shape[1] != groups
    ):
        raise ValueError(f"scale must be [{planes.shape[1]} or 1, {groups}], got {list(scale.shape)}")
    for name, (given, count) in rows.items():
        if given is not None and given.shape != (count,):
            raise ValueError(f"{name} must be [{count}], got {list(given.shape)}")
    return groups


@kernel("lowbit_matmul", "cpp", _why_not)
def lowbit_matmul(
    x: Tensor, planes: Tensor, columns: int, weights: Sequence[int], offset: int, scale: Tensor | None, group: int,
    transposed: bool, x_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    rows = planes.shape[1]
    if planes.shape[0] != len(weights):
        raise ValueError(f"planes must be as many as weights, got {planes.shape[0]} and {len(weights)}")
    length, outputs = (rows, columns) if transposed else (columns, rows)
    groups = _check(x, planes, columns, scale, group, length, x_scale=(x_scale, x.shape[0]), bias=(bias, outputs))
    y = kept_memory.empty((x.shape[0], outputs), dtype)
    if not length:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    x = x if x.stride(1) == 1 or length == 1 else x.contiguous()
    planes = planes.contiguous()
    scale, x_scale, bias = (None if t is None else t.float().contiguous() for t in (scale, x_scale, bias))
    _C.lowbit_matmul_cpu(  # type: ignore[union-attr]
        x=pointer(x), planes=pointer(planes), scale=pointer(scale), x_scale=pointer(x_scale), bias=pointer(bias),
        y=pointer(y), m=x.shape[0], ldx=x.stride(0), rows=rows, columns=columns, weights=list(weights), offset=offset,
        scale_rows=0 if scale is None else scale.shape[0], groups=groups, group=group, transposed=transposed,
        x_dtype=_X_DTYPES[x.dtype], y_dtype=DTYPES[dtype], isa=backend_cpp.ISA,
    )  # fmt: skip
    return y
