"""`pack_bits` and `unpack_bits` of the `cpp` backend (csrc/cpu/pack_bits.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend_cpp, kept_memory
from ..compiled import _C, DTYPES, pointer
from ..registry import kernel
from .contract import Pack, row_bytes

MOST_PLANES = 4


def why_not_pack(x: Tensor, kind: int, *args: Any) -> str | None:
    """Why the compiled kernel cannot pack this, or None."""
    if missing := backend_cpp._missing(x):
        return missing
    if x.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16, got {x.dtype}"
    planes = args[-1]
    if planes < {Pack.SIGN: 1, Pack.TERNARY: 2, Pack.CODES: 1}[Pack(kind)] or planes > MOST_PLANES:
        return f"takes 1 plane for signs, 2 for ternary and up to {MOST_PLANES} for codes, got {planes}"
    return None


def table(name: str, values: Tensor | None, rows: int, columns: int, group: int) -> Tensor | None:
    """[R or 1, G] as the kernel reads it; ValueError where it is not that."""
    if values is None:
        return None
    groups = -(-columns // group) if group else 1
    if values.dim() != 2 or values.shape[0] not in (1, rows) or values.shape[1] != groups:
        raise ValueError(f"{name} must be [{rows} or 1, {groups}], got {list(values.shape)}")
    return values.to(torch.float32).contiguous()


@kernel("pack_bits", "cpp", why_not_pack)
def pack_bits(
    x: Tensor, kind: int, center: Tensor | None, scale: Tensor | None, group: int, low: int, planes: int
) -> tuple[Tensor, Tensor]:
    """Bits and how many there are, x read once."""
    (rows, columns), x = x.shape, x.contiguous()
    center, scale = table("center", center, rows, columns, group), table("scale", scale, rows, columns, group)
    count = {Pack.SIGN: 1, Pack.TERNARY: 2}.get(Pack(kind), planes)
    bits = kept_memory.empty((count, rows, row_bytes(columns)), torch.uint8)
    popcounts = torch.zeros(count, rows, dtype=torch.int32, device="cpu")
    _C.pack_bits_cpu(  # type: ignore[union-attr]
        x=pointer(x), center=pointer(center), scale=pointer(scale), center_rows=0 if center is None else len(center),
        scale_rows=0 if scale is None else len(scale), rows=rows, columns=columns, group=group, dtype=DTYPES[x.dtype],
        kind=int(kind), low=low, planes=count, bits=pointer(bits), popcounts=pointer(popcounts), isa=backend_cpp.ISA,
    )  # fmt: skip
    return bits, popcounts


def why_not_unpack(
    planes: Tensor, columns: int, weights: Sequence[int], offset: int, scale: Tensor | None, group: int,
    dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """Why the compiled kernel cannot unpack this, or None."""
    if missing := backend_cpp._missing(planes):
        return missing
    if dtype not in DTYPES:
        return f"makes float32, float16 and bfloat16, got {dtype}"
    if len(weights) > MOST_PLANES:
        return f"takes up to {MOST_PLANES} planes, got {len(weights)}"
    return None


@kernel("unpack_bits", "cpp", why_not_unpack)
def unpack_bits(
    planes: Tensor, columns: int, weights: Sequence[int], offset: int, scale: Tensor | None, group: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """value * scale, rounded once."""
    planes = planes.contiguous()
    count, rows, width = planes.shape
    if planes.dtype != torch.uint8 or width != row_bytes(columns) or count != len(weights):
        raise ValueError(
            f"{columns} columns and {len(weights)} weights want uint8 planes [{len(weights)}, R, {row_bytes(columns)}], "
            f"got {planes.dtype} {list(planes.shape)}"
        )
    scale = table("scale", scale, rows, columns, group)
    x = kept_memory.empty((rows, columns), dtype)
    _C.unpack_bits_cpu(  # type: ignore[union-attr]
        bits=pointer(planes), rows=rows, columns=columns, weights=list(weights), offset=offset, scale=pointer(scale),
        scale_rows=0 if scale is None else len(scale), group=group, dtype=DTYPES[dtype], x=pointer(x),
        isa=backend_cpp.ISA,
    )  # fmt: skip
    return x
