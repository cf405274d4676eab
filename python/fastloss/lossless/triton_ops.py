"""The glue of the lossless ops of the `triton` backend. triton is imported when a launch is due, not with fastloss."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend_triton import _missing
from ..registry import kernel
from .contract import BLOCK
from .crc32c_table import _advance_tables, advance
from .tiles import from_tiles

_ALL = 0xFFFFFFFF


def _why_not(blob: Tensor, *_: Any) -> str | None:
    return _missing(blob)


@kernel("lossless_decode", "triton", _why_not)
def lossless_decode(blob: Tensor, plan: Sequence[int], first: int, count: int, dtype: torch.dtype) -> Tensor:
    from ..triton_kernels import lossless_decode as kernels
    from ..triton_kernels.lossless_numbers import read_plan

    return kernels.lossless_decode(read_plan(blob, plan), first, count, dtype)


@kernel("lossless_rows", "triton", _why_not)
def lossless_rows(blob: Tensor, plan: Sequence[int], index: Tensor, dtype: torch.dtype) -> Tensor:
    """On a GPU nobody may look at `index`: a row that there is not comes out as NaN (all bits 1)."""
    from ..triton_kernels import lossless_rows as kernels
    from ..triton_kernels.lossless_numbers import read_plan

    rows = plan[4]
    if not index.is_cuda and (bad := (index < 0) | (index >= rows)).any():
        raise IndexError(f"row {int(index[bad][0])} is out of bounds: rows are 0..{rows - 1}")
    return kernels.lossless_rows(read_plan(blob, plan), index, dtype)


def _why_not_linear(x: Tensor, blob: Tensor, *_: Any) -> str | None:
    return _missing(x) or _missing(blob)


@kernel("lossless_linear", "triton", _why_not_linear)
def lossless_linear(x: Tensor, blob: Tensor, plan: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """Fused where the kernel takes it; else the fastest decoder and PyTorch's own product."""
    from ..triton_kernels import lossless_linear as kernels
    from ..triton_kernels.lossless_numbers import read_plan

    p = read_plan(blob, plan)
    if kernels.takes(p, x):
        return kernels.lossless_linear(x, p, bias)
    weight = torch.ops.fastloss.lossless_decode(blob, plan, 0, plan[3], x.dtype)
    return torch.nn.functional.linear(x, weight.reshape(plan[4], plan[5]), bias)


def _signed(crc: int) -> int:
    return crc - (1 << 32) if crc >= 1 << 31 else crc


@functools.lru_cache(maxsize=16)
def _crc_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What crc32c's programs look up, made once a device."""
    from ..triton_kernels import crc32c as kernels

    one = 1 << 31  # reflected: x^0
    behind = [advance(one, 4 * (kernels.LANES - lane)) for lane in range(kernels.LANES)]
    whole = [advance(one, kernels.PIECE << k) for k in range(kernels.POWERS)]
    steps = torch.from_numpy(_advance_tables(kernels.STEP_LOG2)).reshape(-1)
    tables = (steps, torch.tensor(behind), torch.tensor(whole))
    first, second, third = ((t - (t >> 31 << 32)).to(torch.int32).to(device) for t in tables)
    return first, second, third


@kernel("crc32c", "triton", _why_not)
def crc32c(data: Tensor, block: int) -> Tensor:
    from ..triton_kernels import crc32c as kernels

    size = data.numel()
    last = size % block or min(block, size)
    starts = (_signed(advance(_ALL, min(block, size)) ^ _ALL), _signed(advance(_ALL, last) ^ _ALL))
    return kernels.crc32c(data.contiguous(), min(block, max(size, 1)), starts, _crc_tables(data.device))


@kernel("lossless_decode_checked", "triton", _why_not)
def lossless_decode_checked(blob: Tensor, plan: Sequence[int], out: Tensor) -> int:
    """Checksums are of the blob's own order, so layout `tiles` is put in rows afterwards."""
    from ..triton_kernels import lossless_decode as kernels
    from ..triton_kernels.lossless_numbers import BLOCK_CRC, read_plan

    p = read_plan(blob, plan)
    flat = kernels.lossless_decode(p, 0, p.numel, out.dtype, sequence=True)
    want = p.section(BLOCK_CRC, torch.int32)
    found = crc32c(flat.view(torch.uint8), BLOCK * out.element_size())
    wrong = (found != want.to(torch.int64) & _ALL).nonzero()
    out.copy_(from_tiles(flat, plan[5]) if p.tiles else flat)
    return int(wrong[0]) if wrong.numel() else -1
