"""`bgemm`, `bgemm_signs` and `hamming_topk` of the `cpp` backend (csrc/cpu/bgemm.cpp, csrc/cpu/hamming_topk.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend_cpp, kept_memory
from ..compiled import _C, MISSING, pointer
from ..registry import kernel
from .contract import row_bytes
from .reference_bits import check_epilogue

#: What multiplies (csrc/cpu/bit_products.h): -1 the fastest for the shape, else 0 ones of words, 1 the same with
#: AVX512-VPOPCNTDQ, 2 int8 with AVX512-VNNI, 3 int8 with AMX (tests).
ENGINE = -1

_OUTPUTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int32: 3}
_SIGNS = 4
_STREAMED_BYTES = 8 << 20  # a result of this size is written past the cache
_MOST_VALUE, _MOST_SUM, _MOST_PLANES = 127, 2**31 - 1, 4


def _largest(weights: Sequence[int], offset: int) -> int:
    """The largest absolute value of a number of these planes."""
    low = offset + sum(w for w in weights if w < 0)
    high = offset + sum(w for w in weights if w > 0)
    return max(abs(low), abs(high))


def why_not_product(
    a: Tensor, a_popcounts: Tensor, b: Tensor, b_popcounts: Tensor, columns: int, a_weights: Sequence[int], a_offset: int,
    b_weights: Sequence[int], b_offset: int, *_: Any,
) -> str | None:  # fmt: skip
    """Why the kernels cannot multiply these rows of bits, or None."""
    if MISSING:
        return MISSING
    for t in (a, a_popcounts, b, b_popcounts):
        if t.device.type != "cpu":
            return f"runs on CPU tensors, got {t.device}"
    for name, weights, offset in (("a", a_weights, a_offset), ("b", b_weights, b_offset)):
        if not 1 <= len(weights) <= _MOST_PLANES:
            return f"takes 1 to {_MOST_PLANES} planes, got {len(weights)} of {name}"
        # A ternary number's two bits are never such that it is -1 and 2 apart: both bounds hold for what weights allow.
        if _largest(weights, offset) > _MOST_VALUE:
            return f"takes numbers of at most {_MOST_VALUE}, got weights {list(weights)} and offset {offset} of {name}"
    if columns * _largest(a_weights, a_offset) * _largest(b_weights, b_offset) > _MOST_SUM:
        return f"takes sums that int32 holds; {columns} columns of these numbers may pass it"
    return None


def _planes(name: str, planes: Tensor, popcounts: Tensor, columns: int, weights: Sequence[int], offset: int) -> Any:
    """(csrc/bits.h's Planes, the tensors it points to)."""
    if planes.dtype != torch.uint8 or popcounts.dtype != torch.int32:
        raise TypeError(f"{name} must be uint8 planes and int32 popcounts, got {planes.dtype} and {popcounts.dtype}")
    wanted = (len(weights), row_bytes(columns))
    if planes.dim() != 3 or (planes.shape[0], planes.shape[2]) != wanted or popcounts.shape != planes.shape[:2]:
        raise ValueError(
            f"{name} of {columns} columns must be planes [{wanted[0]}, R, {wanted[1]}] and popcounts [{wanted[0]}, R], "
            f"got {list(planes.shape)} and {list(popcounts.shape)}"
        )
    planes, popcounts = planes.contiguous(), popcounts.contiguous()
    made = _C.Planes(  # type: ignore[union-attr]
        bits=pointer(planes), popcounts=pointer(popcounts), rows=planes.shape[1], columns=columns, weights=list(weights),
        offset=offset,
    )  # fmt: skip
    return made, (planes, popcounts)


def _numbers(name: str, t: Tensor | None, count: int) -> Tensor | None:
    """A vector of the epilogue as contiguous float32."""
    if t is None:
        return None
    if t.shape != (count,):
        raise ValueError(f"{name} must be [{count}], got {list(t.shape)}")
    return t.to(torch.float32).contiguous()


def _run(
    a: Tensor, a_popcounts: Tensor, b: Tensor, b_popcounts: Tensor, columns: int, a_weights: Sequence[int], a_offset: int,
    b_weights: Sequence[int], b_offset: int, row_scale: Tensor | None, column_scale: Tensor | None,
    bias: Tensor | None, activation: int, output: int, y: Tensor, popcounts: Tensor | None,
) -> None:  # fmt: skip
    dtype = torch.int32 if output == _OUTPUTS[torch.int32] else torch.float32
    check_epilogue(row_scale, column_scale, bias, activation, dtype)
    left, _kept_left = _planes("a", a, a_popcounts, columns, a_weights, a_offset)
    right, _kept_right = _planes("b", b, b_popcounts, columns, b_weights, b_offset)
    m, n = a.shape[1], b.shape[1]
    row_scale = _numbers("row_scale", row_scale, m)
    column_scale, bias = _numbers("column_scale", column_scale, n), _numbers("bias", bias, n)
    _C.bgemm_cpu(  # type: ignore[union-attr]
        a=left, b=right, row_scale=pointer(row_scale), column_scale=pointer(column_scale), bias=pointer(bias),
        activation=activation, output=output, y=pointer(y), popcounts=pointer(popcounts),
        stream=y.nbytes > _STREAMED_BYTES, isa=backend_cpp.ISA, engine=ENGINE,
    )  # fmt: skip


def _why_not_output(*args: Any) -> str | None:
    dtype = args[13]
    return None if dtype in _OUTPUTS else f"makes float32, float16, bfloat16 and int32, asked for {dtype}"


@kernel("bgemm", "cpp", lambda *args: why_not_product(*args) or _why_not_output(*args))
def bgemm(
    a: Tensor, a_popcounts: Tensor, b: Tensor, b_popcounts: Tensor, columns: int, a_weights: Sequence[int], a_offset: int,
    b_weights: Sequence[int], b_offset: int, row_scale: Tensor | None, column_scale: Tensor | None,
    bias: Tensor | None, activation: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """activation((sum_k a_ik b_jk row_scale_i) column_scale_j + bias_j) in `dtype`; the sum itself for int32."""
    y = kept_memory.empty((a.shape[1], b.shape[1]), dtype)
    _run(
        a, a_popcounts, b, b_popcounts, columns, a_weights, a_offset, b_weights, b_offset, row_scale, column_scale, bias,
        activation, _OUTPUTS[dtype], y, None,
    )  # fmt: skip
    return y


@kernel("bgemm_signs", "cpp", why_not_product)
def bgemm_signs(
    a: Tensor, a_popcounts: Tensor, b: Tensor, b_popcounts: Tensor, columns: int, a_weights: Sequence[int], a_offset: int,
    b_weights: Sequence[int], b_offset: int, row_scale: Tensor | None, column_scale: Tensor | None,
    bias: Tensor | None, activation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sign of what `bgemm` makes in float32, as bits: (planes [1, M, B], popcounts [1, M])."""
    m = a.shape[1]
    planes = torch.zeros(1, m, row_bytes(b.shape[1]), dtype=torch.uint8)
    popcounts = torch.zeros(1, m, dtype=torch.int32)
    _run(
        a, a_popcounts, b, b_popcounts, columns, a_weights, a_offset, b_weights, b_offset, row_scale, column_scale, bias,
        activation, _SIGNS, planes, popcounts,
    )  # fmt: skip
    return planes, popcounts


@kernel("hamming_topk", "cpp", why_not_product)
def hamming_topk(
    a: Tensor, a_popcounts: Tensor, b: Tensor, b_popcounts: Tensor, columns: int, a_weights: Sequence[int], a_offset: int,
    b_weights: Sequence[int], b_offset: int, b_scale: Tensor | None, count: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The `count` largest products of each row of a with rows of b, times b_scale, and the indices of these rows."""
    queries, _kept_queries = _planes("a", a, a_popcounts, columns, a_weights, a_offset)
    database, _kept_database = _planes("b", b, b_popcounts, columns, b_weights, b_offset)
    m, n = a.shape[1], b.shape[1]
    if not 0 <= count <= n:
        raise ValueError(f"count must be 0 to {n}, the rows that there are, got {count}")
    b_scale = _numbers("b_scale", b_scale, n)
    values = torch.empty(m, count, dtype=torch.int32 if b_scale is None else torch.float32)
    index = torch.empty(m, count, dtype=torch.int64)
    _C.hamming_topk_cpu(  # type: ignore[union-attr]
        queries=queries, database=database, scale=pointer(b_scale), count=count, values=pointer(values),
        index=pointer(index), isa=backend_cpp.ISA, engine=ENGINE,
    )  # fmt: skip
    return values, index
