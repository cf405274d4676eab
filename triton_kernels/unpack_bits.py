"""unpack_bits: planes of bits back to (offset + sum of weighted bits) * scale; docs/design.md, "The bit contract".

Bytes moved: P / 8 an element read, 2 or 4 written. 8192 x 8192 to bf16 from one plane on an H200: 143 MB, 0.03-0.045 ms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bit_tiles import LAUNCH, tile_start, unpacked_bits, walk
from .common import on_device, wide
from .pack_bits import of_columns, row_stride


@triton.jit(do_not_specialize=["R", "steps", "offset"])
def unpack_bits_kernel(
    planes, scale, values, R, K, row_bytes, steps, stride_scale, offset, WEIGHTS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    r = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    keep = r < R
    for step in range(0, steps):
        _, column = tile_start(step, steps, ROWS, COLUMNS, False)
        c = column + tl.arange(0, COLUMNS)
        value = tl.zeros([ROWS, COLUMNS], tl.int32) + offset
        for p in tl.static_range(len(WEIGHTS)):
            bits = unpacked_bits(planes + wide(p) * R * row_bytes, r, keep, column, row_bytes, ROWS, COLUMNS)
            value += WEIGHTS[p] * bits
        out = values + r[:, None] * K + c[None, :]
        inside = keep[:, None] & (c < K)[None, :]
        if scale is None:
            tl.store(out, value.to(values.dtype.element_ty), mask=inside)
        else:
            scaled = value.to(tl.float32) * of_columns(scale, r, c, keep, stride_scale, K, GROUP)
            tl.store(out, scaled.to(values.dtype.element_ty), mask=inside)


def unpack_bits(
    planes: Tensor,
    columns: int,
    weights: Sequence[int],
    offset: int,
    scale: Tensor | None,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """value * scale [R, K]."""
    planes = planes.contiguous()
    _, rows, row_bytes = planes.shape
    scale = None if scale is None else scale.float().contiguous()
    values = torch.empty(rows, columns, dtype=dtype, device=planes.device)
    tiles = walk(rows, columns)
    if values.numel():
        with on_device(planes):
            unpack_bits_kernel[tiles.grid](
                planes, scale, values, rows, columns, row_bytes, tiles.steps, row_stride(scale), offset,
                WEIGHTS=tuple(weights), GROUP=group, ROWS=tiles.rows, COLUMNS=tiles.columns, **LAUNCH,
            )  # fmt: skip
    return values
