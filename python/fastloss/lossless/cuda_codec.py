"""Decoders of the `cuda` backend (csrc/cuda: p7_decode.cu, p7_rows.cu, r8_decode.cu, crc32c.cu).

No call waits for the device, but `lossless_decode_checked`, which returns a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend_cuda
from ..compiled import _C, pointer
from ..registry import kernel
from .contract import BLOCK, Codec, Layout, Section
from .reference import section
from .tiles import from_tiles

#: cp.async copies 16 bytes at a time; a blob elsewhere is copied before it is decoded.
ALIGNMENT = 16


def place(x: Tensor) -> dict[str, int]:
    """Where a kernel runs: the tensor's device, and the stream that is current there."""
    device = x.device.index
    return {"device": device, "stream": torch._C._cuda_getCurrentRawStream(device)}


def aligned(x: Tensor) -> Tensor:
    """The tensor in contiguous memory at a multiple of 16 bytes, itself where it is so already."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def _why_not(blob: Tensor, plan: Sequence[int], *args: Any) -> str | None:
    return backend_cuda._missing(blob)


def _decode_into(out: Tensor, blob: Tensor, plan: Sequence[int], first: int, count: int) -> None:
    blob = aligned(blob)
    _C.lossless_decode_cuda(  # type: ignore[union-attr]
        blob=pointer(blob), plan=list(plan), first=first, count=count, out=pointer(out), **place(blob)
    )


def _raw(blob: Tensor, plan: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The numbers of a raw blob, as bytes [numel, bytes of one]."""
    raw = section(blob, plan, Section.RAW)
    return (blob[:0] if raw is None else raw).reshape(-1, dtype.itemsize)


@kernel("lossless_decode", "cuda", _why_not)
def lossless_decode(blob: Tensor, plan: Sequence[int], first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Numbers first..first+count in row-major order."""
    if plan[0] == Codec.RAW:
        return _raw(blob, plan, dtype)[first : first + count].clone().reshape(-1).view(dtype)
    out = torch.empty(count, dtype=dtype, device=blob.device)
    _decode_into(out, blob, plan, first, count)
    return out


@kernel("lossless_rows", "cuda", _why_not)
def lossless_rows(blob: Tensor, plan: Sequence[int], index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the matrix: P7 decodes the groups that they touch, R8 its blocks up to their end.

    A row that is out of bounds is zeros, where other backends raise IndexError: to know of it, the host would have to
    wait for the device.
    """
    rows, columns, count = plan[4], plan[5], index.shape[0]
    if plan[0] == Codec.RAW:
        out = blob.new_zeros((count, columns * dtype.itemsize))
        if rows and columns:
            good = ((index >= 0) & (index < rows))[:, None]
            found = _raw(blob, plan, dtype).reshape(rows, -1)[index.clamp(0, rows - 1)]
            out = torch.where(good, found, out)
        return out.view(dtype) if columns else blob.new_empty((count, 0), dtype=dtype)
    out, blob, index = torch.empty((count, columns), dtype=dtype, device=blob.device), aligned(blob), index.contiguous()
    _C.lossless_rows_cuda(  # type: ignore[union-attr]
        blob=pointer(blob), plan=list(plan), index=pointer(index), wide=index.dtype == torch.int64, count=count,
        out=pointer(out), **place(blob),
    )  # fmt: skip
    return out


def _why_not_crc32c(data: Tensor, block: int) -> str | None:
    return backend_cuda._missing(data)


@kernel("crc32c", "cuda", _why_not_crc32c)
def crc32c(data: Tensor, block: int) -> Tensor:
    """crc32c of every `block` bytes, int64."""
    data, size = data.contiguous(), data.numel()
    block = min(block, max(size, 1))
    out = torch.empty(-(-size // block), dtype=torch.int64, device=data.device)
    pieces = torch.empty(_C.crc32c_pieces_cuda(size, block), dtype=torch.int32, device=data.device)  # type: ignore[union-attr]
    _C.crc32c_cuda(  # type: ignore[union-attr]
        data=pointer(data), size=size, block=block, pieces=pointer(pieces), out=pointer(out), **place(data)
    )
    return out


def _why_not_checked(blob: Tensor, plan: Sequence[int], out: Tensor) -> str | None:
    if plan[3] and section(blob, plan, Section.BLOCK_CRC) is None:
        return "compares with the checksums of blocks, and this blob has none"
    return backend_cuda._missing(blob)


@kernel("lossless_decode_checked", "cuda", _why_not_checked)
def lossless_decode_checked(blob: Tensor, plan: Sequence[int], out: Tensor) -> int:
    """Decode everything into the 1-D contiguous `out`; the first block whose checksum is wrong, or -1. Waits for the device.

    Checksums are of numbers in the order of the blob: layout tiles is decoded in that order first.
    """
    numel = plan[3]
    if numel == 0:
        return -1
    if plan[0] == Codec.RAW:
        sequence = out.copy_(_raw(blob, plan, out.dtype).clone().reshape(-1).view(out.dtype))
    else:
        tiles = plan[2] == Layout.TILES
        sequence = torch.empty_like(out) if tiles else out
        _decode_into(sequence, blob, [*plan[:2], Layout.ROWS, *plan[3:]], 0, numel)
    found = crc32c(sequence.view(torch.uint8), BLOCK * out.element_size())
    if sequence is not out:
        integer = torch.int16 if out.element_size() == 2 else torch.int32
        out.view(integer).copy_(from_tiles(sequence.view(integer), plan[5]))
    stored = section(blob, plan, Section.BLOCK_CRC)
    assert stored is not None  # _why_not_checked
    wrong = found != stored.clone().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    first = torch.where(wrong.any(), wrong.to(torch.uint8).argmax(), -1)
    return int(first)
