"""Numbers to fields and planes and back, in plain PyTorch (docs/design.md, "The lossless contract")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import BLOCK, SPLITS, Number, padded

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def words(x: Tensor, number: Number) -> Tensor:
    """The bit patterns of the 1-D `x` as int64, padded with zeros to a group."""
    size = SPLITS[number].bytes
    raw = x.contiguous().view(_INTEGERS[size]).to(torch.int64) & ((1 << 8 * size) - 1)
    return torch.nn.functional.pad(raw, (0, padded(x.numel()) - x.numel()))


def numbers(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The other way round."""
    if dtype.itemsize == 1:
        return bits.to(torch.uint8).view(dtype)
    half = 1 << (8 * dtype.itemsize - 1)
    return ((bits ^ half) - half).to(_INTEGERS[dtype.itemsize]).view(dtype)


def split(bits: Tensor, number: Number) -> tuple[Tensor, list[Tensor], Tensor]:
    """(field, byte planes, the bit planes' section), all uint8, of padded bit patterns."""
    s = SPLITS[number]
    field = bits >> s.field_bit & ((1 << s.field_bits) - 1)
    sign = bits >> (8 * s.bytes - 1)
    low = bits & ((1 << s.field_bit) - 1)  # the mantissa
    planes = [low >> (8 * p) & 255 for p in range(s.byte_planes)]
    if s.bit_planes == 0:
        planes[-1] = planes[-1] | sign << 7
    rows = [low >> (8 * s.byte_planes + p) & 1 for p in range(s.bit_planes - 1)] + [sign] * (s.bit_planes > 0)
    pieces = []
    for first in range(0, bits.numel(), BLOCK):
        for row in rows:
            eight = row[first : first + BLOCK].reshape(-1, 8)
            pieces.append((eight << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8))
    section = torch.cat(pieces) if pieces else bits.new_empty(0, dtype=torch.uint8)
    return field.to(torch.uint8), [p.to(torch.uint8) for p in planes], section


def merge(field: Tensor, planes: Sequence[Tensor | None], section: Tensor | None, number: Number) -> Tensor:
    """The bit patterns (int64) of fields and planes; a plane that is None is all zeros."""
    s = SPLITS[number]
    bits = field.to(torch.int64) << s.field_bit
    for p, plane in enumerate(planes):
        if plane is None:
            continue
        wide = plane.to(torch.int64)
        if p == s.byte_planes - 1 and s.bit_planes == 0:  # its top bit is the sign
            bits |= wide >> 7 << (8 * s.bytes - 1) | (wide & 127) << 8 * p
        else:
            bits |= wide << 8 * p
    if section is not None and section.numel():
        at, n = 0, field.numel()
        for first in range(0, n, BLOCK):
            m = min(BLOCK, n - first)
            for p in range(s.bit_planes):
                eight = section[at : at + m // 8].to(torch.int64)
                row = (eight[:, None] >> torch.arange(8, device=field.device) & 1).reshape(-1)
                place = 8 * s.bytes - 1 if p == s.bit_planes - 1 else 8 * s.byte_planes + p
                bits[first : first + m] |= row << place
                at += m // 8
    return bits
