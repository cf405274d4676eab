"""The `reference` backend of the lossless ops: the contract in plain PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import kernel
from . import crc32c_table
from .contract import BLOCK, PLAN_HEAD, SPLITS, Codec, Layout, Number, Section, blocks_of
from .reference_p7 import p7_fields, p7_patch
from .reference_r8 import r8_decode
from .reference_split import merge, numbers
from .tiles import from_tiles


def section(blob: Tensor, plan: Sequence[int], kind: int) -> Tensor | None:
    """The bytes of one section, or None."""
    at, count = plan[PLAN_HEAD + 2 * kind], plan[PLAN_HEAD + 2 * kind + 1]
    return blob[at : at + count] if count else None


def _as(part: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A section's numbers; a section need not be aligned for its dtype."""
    return torch.empty(0, dtype=dtype) if part is None else part.clone().view(dtype)


def _decode_blocks(blob: Tensor, plan: Sequence[int], first: int, last: int, dtype: torch.dtype) -> Tensor:
    """The numbers of blocks first..last in sequence order."""
    codec, number, _, numel = plan[:4]
    begin, end = first * BLOCK, min(last * BLOCK, numel)
    if codec == Codec.RAW:
        raw = section(blob, plan, Section.RAW)
        return _as(raw[begin * dtype.itemsize : end * dtype.itemsize] if raw is not None else None, dtype)
    split = SPLITS[Number(number)]
    planes: list[Tensor | None] = []
    if codec == Codec.P7:
        table, codes = section(blob, plan, Section.TABLE), section(blob, plan, Section.CODES)
        assert table is not None and codes is not None  # check_plan
        field = p7_fields(table, codes[first * 7168 : last * 7168])
    else:
        field = _coded(blob, plan, Section.FIELD_FREQUENCIES, first, last)
    for p in range(split.byte_planes):
        raw = section(blob, plan, Section.BYTES0 + p)
        coded = Section.BYTES0_FREQUENCIES + 3 * p
        if raw is not None:
            planes.append(raw[begin : begin + field.numel()])
        elif section(blob, plan, coded) is not None:
            planes.append(_coded(blob, plan, coded, first, last))
        else:
            planes.append(None)
    bits = section(blob, plan, Section.BITS)
    if bits is not None:
        size = BLOCK // 8 * split.bit_planes
        bits = bits[first * size : last * size]
    out = numbers(merge(field, planes, bits, Number(number)), dtype)[: end - begin]
    if codec == Codec.P7:
        offsets = _as(section(blob, plan, Section.ESCAPE_OFFSETS), torch.int64)
        positions = _as(section(blob, plan, Section.ESCAPE_POSITIONS), torch.int16)
        values = _as(section(blob, plan, Section.ESCAPE_VALUES), dtype)
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
        p7_patch(out.view(integer), first, offsets, positions, values.view(integer), numel)
    return out


def _coded(blob: Tensor, plan: Sequence[int], kind: int, first: int, last: int) -> Tensor:
    frequencies, offsets, data = (section(blob, plan, kind + k) for k in range(3))
    assert frequencies is not None and data is not None  # check_plan
    return r8_decode(frequencies, _as(offsets, torch.int64), data, plan[3], first, last)


@kernel("lossless_decode", "reference")
def lossless_decode(blob: Tensor, plan: Sequence[int], first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Numbers first..first+count in row-major order."""
    if count == 0:
        return blob.new_empty(0, dtype=dtype)
    start = first // BLOCK
    out = _decode_blocks(blob, plan, start, blocks_of(first + count), dtype)[first - start * BLOCK :][:count]
    return from_tiles(out, plan[5]) if plan[2] == Layout.TILES else out.contiguous()


@kernel("lossless_rows", "reference")
def lossless_rows(blob: Tensor, plan: Sequence[int], index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the matrix; each block is decoded once."""
    rows, columns = plan[4], plan[5]
    bad = (index < 0) | (index >= rows)
    if bool(bad.any()):
        raise IndexError(f"row {int(index[bad][0])} is out of bounds: rows are 0..{rows - 1}")
    unique, inverse = index.unique(return_inverse=True)
    parts = [lossless_decode(blob, plan, int(r) * columns, columns, dtype) for r in unique]
    table = torch.stack(parts) if parts else blob.new_empty((0, columns), dtype=dtype)
    return table.view(torch.uint8)[inverse].view(dtype).reshape(index.shape[0], columns)


@kernel("lossless_linear", "reference")
def lossless_linear(x: Tensor, blob: Tensor, plan: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias of the decoded W."""
    weight = lossless_decode(blob, plan, 0, plan[3], x.dtype).reshape(plan[4], plan[5])
    return torch.nn.functional.linear(x, weight, bias)


@kernel("crc32c", "reference")
def crc32c(data: Tensor, block: int) -> Tensor:
    """crc32c of every `block` bytes, int64."""
    return crc32c_table.of_blocks(data, block)


@kernel("lossless_decode_checked", "reference")
def lossless_decode_checked(blob: Tensor, plan: Sequence[int], out: Tensor) -> int:
    """Decode everything into the 1-D contiguous `out`; the first block whose checksum is wrong, or -1."""
    flat = _decode_blocks(blob, plan, 0, blocks_of(plan[3]), out.dtype)
    want = _as(section(blob, plan, Section.BLOCK_CRC), torch.int32).to(torch.int64) & 0xFFFFFFFF
    wrong = (crc32c(flat.view(torch.uint8), BLOCK * out.element_size()) != want).nonzero()
    out.copy_(from_tiles(flat, plan[5]) if plan[2] == Layout.TILES else flat)
    return int(wrong[0]) if wrong.numel() else -1
