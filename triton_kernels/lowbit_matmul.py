"""lowbit_matmul: tiles, splits, launches; the kernels are in lowbit_matmul_kernels.py.

What it costs on an H200, K = R = 8192: making a bit a bfloat16 takes some four instructions a plane, shared by the rows of a
tile.
- 1 row, 1 plane, bf16: 8.4 MB of bits would be 2 us; 67 M numbers of four to six instructions are 9-14 us, with both launches
  15-20 us (cuBLAS on bf16 weights reads 134 MB: 28 us). 4 planes: 30-45 us.
- 8192 rows, 1 plane, bf16: 1.1 TFLOP at 500-650 TFLOP/s, 1.7-2.2 ms (cuBLAS bf16 1.45 ms); group scales 2.0-2.6 ms; int8 rows
  1.2-1.8 ms.
- transposed with a scale a row: two pieces, 3.4-4.5 ms; float32 rows: three pieces, 5-7 ms (cuBLAS fp32 some 20 ms).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .bit_tiles import matrix
from .common import on_device
from .linear_row_stats import Tile
from .lowbit_matmul_kernels import lowbit_matmul_kernel, lowbit_matmul_transposed_kernel, lowbit_merge_kernel

#: Programs that fill any GPU when there are few rows. Not a property of the one at hand: sums do not depend on it.
PROGRAMS = 512
MERGE = 256
#: Offsets in a tile are 32 bits, and a tile has up to 256 rows.
WIDEST = 1 << 22


def default_tile(rows: int, pieces: int, grouped: bool, tma: bool, capability: tuple[int, int]) -> Tile:
    """The largest tile that does not spill; for few rows, one whose registers hold more bits than sums."""
    if rows <= 16:
        return Tile(16, 32, 128, 4, 3)
    if rows <= 64:
        return Tile(64, 64, 64, 4, 3)
    if capability[0] < 9:  # sums and operands share the registers
        return Tile(64, 64, 32, 8, 3) if pieces > 1 else Tile(128, 64, 32, 8, 3)
    if pieces > 1:
        return Tile(64, 128, 64, 8, 3)
    if tma and not grouped and capability[0] == 9:
        return Tile(256, 128, 64, 8, 3)
    return Tile(128, 64 if grouped and capability[0] >= 10 else 128, 64, 8, 3)


def takes_tma(x: Tensor, pieces: int, capability: tuple[int, int]) -> bool:
    """Can the copy engine of sm_90 and later read x?"""
    pitch = x.stride(0) * x.element_size()
    return capability[0] >= 9 and pieces == 1 and x.data_ptr() % 16 == 0 and pitch % 16 == 0 and pitch > 0


def operand(x: Tensor, pieces: int) -> tl.dtype:
    """What the matrix unit multiplies; the interpreter's dot knows no bfloat16."""
    if pieces == 1 and x.dtype in (torch.int8, torch.float16):
        return tl.int8 if x.dtype == torch.int8 else tl.float16
    return tl.float32 if x.device.type == "cpu" else tl.bfloat16


def capability_of(x: Tensor) -> tuple[int, int]:
    """(0, 0) in the interpreter."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def lowbit_matmul(
    x: Tensor, planes: Tensor, columns: int, weights: Sequence[int], offset: int, scale: Tensor | None, group: int,
    transposed: bool, x_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype, *, tile: Tile | None = None,
    tma: bool | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """y [M, R], or [M, K] if transposed."""
    x = matrix(x) if x.stride(0) <= WIDEST else x.contiguous()
    words = planes.contiguous().view(torch.int32)
    m, r = x.shape[0], planes.shape[1]
    n, depth = (columns, r) if transposed else (r, columns)
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    scale, x_scale, bias = (None if t is None else t.float().contiguous() for t in (scale, x_scale, bias))
    if not y.numel():
        return y
    if not depth:
        return y.zero_() if bias is None else y.copy_(bias.expand(m, n))
    of_rows = scale is not None and scale.shape[0] > 1
    pieces = 3 if x.dtype == torch.float32 else 1
    if transposed and of_rows and pieces == 1:
        pieces = 3 if dtype == torch.float32 else 2  # 16 bits are enough for a result of 8 or 11
    group = 0 if scale is None else group
    capability = capability_of(x)
    tma = takes_tma(x, pieces, capability) if tma is None else tma
    tile = tile or default_tile(m, pieces, group != 0, tma, capability)
    if group:  # a block of columns lies in one group
        tile = tile._replace(
            **{"columns" if transposed else "depth": math.gcd(group, tile.columns if transposed else tile.depth)}
        )
    blocks, steps = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns), triton.cdiv(depth, tile.depth)
    wanted = splits or (max(1, PROGRAMS // blocks) if m <= 64 else 1)
    whole = group // tile.depth if group and not transposed else 1  # a split holds whole groups
    each = triton.cdiv(triton.cdiv(steps, min(wanted, steps)), whole) * whole
    splits = triton.cdiv(steps, each)
    integer = x.dtype == torch.int8 and group == 0
    out = (
        y
        if splits == 1
        else torch.empty(splits, m, n, dtype=torch.int32 if integer else torch.float32, device=x.device)
    )
    source = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]) if tma else x
    scale_row = scale.shape[1] if scale is not None and of_rows else 0
    sizes = (m, r, columns, words.shape[2], each, x.stride(0), scale_row)
    options = dict(
        WEIGHTS=tuple(weights), OFFSET=offset, GROUP=group, SPLIT=splits > 1, TMA=tma, EVEN=depth % tile.depth == 0,
        PIECES=pieces, DTYPE=operand(x, pieces),
        BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    with on_device(x):
        if transposed:
            lowbit_matmul_transposed_kernel[(blocks, splits)](
                source, words, scale, out, *sizes, OF_ROWS=of_rows, **options
            )
        else:
            lowbit_matmul_kernel[(blocks, splits)](source, words, scale, x_scale, bias, out, *sizes, **options)
        if splits > 1:
            done = transposed or group != 0  # scales are in the sums
            lowbit_merge_kernel[(triton.cdiv(m * n, MERGE),)](
                out, None if done else scale, None if done else x_scale, bias, y, m, n, splits, scale_row, BLOCK=MERGE,
                num_warps=4,
            )  # fmt: skip
    return y
