"""The lossless ops (docs/design.md, "The lossless contract"): schemas, fakes and what their arguments must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import _define
from .contract import Layout, check_plan


def _matrix(plan: Sequence[int]) -> tuple[int, int]:
    return plan[4], plan[5]


def _check_decode(blob: Tensor, plan: Sequence[int], first: int, count: int, dtype: torch.dtype) -> None:
    check_plan(blob, plan, dtype)
    numel, columns = plan[3], plan[5]
    if first < 0 or count < 0 or first + count > numel:
        raise IndexError(f"numbers {first}..{first + count} are not among the {numel} of this tensor")
    if plan[2] == Layout.TILES and (first % (16 * columns) or count % (16 * columns)):
        raise ValueError(
            f"layout tiles decodes multiples of 16 rows of {columns} numbers, got {count} numbers from {first}"
        )


def _check_rows(blob: Tensor, plan: Sequence[int], index: Tensor, dtype: torch.dtype) -> None:
    check_plan(blob, plan, dtype)
    if index.dtype not in (torch.int64, torch.int32) or index.dim() != 1:
        raise TypeError(f"index must be 1-D int64 or int32, got {index.dtype} {list(index.shape)}")
    if index.device != blob.device:
        raise ValueError(f"index must be on {blob.device}, got {index.device}")
    if plan[2] == Layout.TILES:
        raise ValueError("rows are gathered from layout rows, not tiles")


def _check_linear(x: Tensor, blob: Tensor, plan: Sequence[int], bias: Tensor | None) -> None:
    check_plan(blob, plan, x.dtype)
    rows, columns = _matrix(plan)
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"x must be [n, {columns}], got {list(x.shape)}")
    for name, t in (("blob", blob), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, got {t.device}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (rows,)):
        raise ValueError(f"bias must be {x.dtype} [{rows}], got {bias.dtype} {list(bias.shape)}")


def _check_crc(data: Tensor, block: int) -> None:
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise TypeError(f"data must be 1-D uint8, got {data.dtype} {list(data.shape)}")
    if block < 1:
        raise ValueError(f"block must be at least 1 byte, got {block}")


def _check_dfloat11(
    luts: Tensor, codes: Tensor, sign_mantissa: Tensor, output_positions: Tensor, gaps: Tensor, numel: int,
    bytes_per_thread: int, threads_per_block: int,
) -> None:  # fmt: skip
    tensors = dict(
        luts=luts, codes=codes, sign_mantissa=sign_mantissa, output_positions=output_positions, gaps=gaps
    )  # fmt: skip
    for name, t in tensors.items():
        if t.dtype != torch.uint8:
            raise TypeError(f"{name} must be uint8, got {t.dtype}")
        if t.device != luts.device:
            raise ValueError(f"{name} must be on {luts.device}, got {t.device}")
    if luts.dim() != 2 or luts.shape[1] != 256 or not 2 <= luts.shape[0] <= 18:
        raise ValueError(f"luts must be [2..18, 256]: up to 17 tables and the lengths, got {list(luts.shape)}")
    if numel < 0 or sign_mantissa.numel() != numel:
        raise ValueError(f"sign_mantissa must have {numel} bytes, got {sign_mantissa.numel()}")
    if not 4 <= bytes_per_thread <= 8 or not 1 <= threads_per_block <= 1024:
        raise ValueError(
            f"bytes_per_thread must be 4..8 and threads_per_block 1..1024, got {bytes_per_thread} and {threads_per_block}"
        )
    blocks = -(-codes.numel() // (bytes_per_thread * threads_per_block))
    if output_positions.numel() != 4 * (blocks + 1):
        raise ValueError(f"output_positions must be {4 * (blocks + 1)} bytes, got {output_positions.numel()}")
    if gaps.numel() * 8 < 5 * threads_per_block * blocks:
        raise ValueError(f"{gaps.numel()} bytes of gaps are too few for {blocks} blocks of {threads_per_block} threads")


_define(
    "lossless_decode(Tensor blob, int[] plan, int first, int count, ScalarType dtype) -> Tensor",
    lambda blob, plan, first, count, dtype: blob.new_empty(count, dtype=dtype),
    _check_decode,
)
_define(
    "lossless_rows(Tensor blob, int[] plan, Tensor index, ScalarType dtype) -> Tensor",
    lambda blob, plan, index, dtype: blob.new_empty((index.shape[0], plan[5]), dtype=dtype),
    _check_rows,
)
_define(
    "lossless_linear(Tensor x, Tensor blob, int[] plan, Tensor? bias=None) -> Tensor",
    lambda x, blob, plan, bias=None: x.new_empty((x.shape[0], plan[4])),
    _check_linear,
)
_define(
    "crc32c(Tensor data, int block) -> Tensor",
    lambda data, block: data.new_empty(-(-data.shape[0] // block), dtype=torch.int64),
    _check_crc,
)
_define(
    "dfloat11_decode(Tensor luts, Tensor codes, Tensor sign_mantissa, Tensor output_positions, Tensor gaps, int numel,"
    " int bytes_per_thread=8, int threads_per_block=512) -> Tensor",
    lambda luts, codes, sign_mantissa, output_positions, gaps, numel, *_: luts.new_empty(numel, dtype=torch.bfloat16),
    _check_dfloat11,
)

from . import (  # noqa: E402,F401  (they register their kernels)
    cpp_decode,
    cpp_dfloat11,
    cpp_encode,
    cpp_linear,
    cpp_r8,
    cuda_codec,
    cuda_dfloat11,
    cuda_encode,
    cuda_linear,
    reference,
    reference_dfloat11,
    triton_ops,
)
