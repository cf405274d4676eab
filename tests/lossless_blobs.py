"""Blobs put together section by section, without header and checksums: what kernels see, made fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.lossless import reference_p7, reference_r8
from fastloss.lossless.contract import NUMBERS, SLACK, Codec, Layout, Section, check_plan, frequencies, pair_table
from fastloss.lossless.tiles import to_tiles
from lossless_cases import INTEGERS


class Made(NamedTuple):
    """A blob, its plan and the numbers that it holds."""

    blob: Tensor
    plan: list[int]
    numbers: Tensor


def assemble(codec: Codec, layout: Layout, x: Tensor, shape: tuple[int, int], parts: Mapping[int, Tensor]) -> Made:
    """The sections one behind the other, at multiples of 64, with the zeros that follow."""
    spans, pieces, end = [0] * (2 * len(Section)), [torch.zeros(64, dtype=torch.uint8)], 64
    for kind in sorted(parts):
        part = parts[kind].contiguous().reshape(-1).view(torch.uint8)
        if part.numel():
            spans[2 * kind : 2 * kind + 2] = end, part.numel()
            pieces += [part, torch.zeros(-part.numel() % 64, dtype=torch.uint8)]
            end += pieces[-2].numel() + pieces[-1].numel()
    plan = [int(codec), int(NUMBERS[x.dtype]), int(layout), x.numel(), *shape, *spans]
    blob = torch.cat([*pieces, torch.zeros(SLACK, dtype=torch.uint8)])
    check_plan(blob, plan, x.dtype)
    return Made(blob, plan, x)


def p7(x: Tensor, columns: int = 0, layout: Layout = Layout.ROWS, keep_zeros: bool = False) -> Made:
    """P7 of the 1-D `x`; planes of zeros are left out unless asked for."""
    shape = (x.numel() // columns, columns) if columns else (1, x.numel())
    flat = to_tiles(x.view(INTEGERS[x.element_size()]), columns).view(x.dtype) if layout == Layout.TILES else x
    table = torch.from_numpy(pair_table(reference_p7.p7_histogram(flat).numpy()))
    codes, planes, bits, offsets, positions, values = reference_p7.p7_encode(flat, table)
    parts: dict[int, Tensor] = {
        Section.TABLE: table, Section.CODES: codes, Section.ESCAPE_OFFSETS: offsets, Section.ESCAPE_POSITIONS: positions,
        Section.ESCAPE_VALUES: values, Section.BITS: bits,
    }  # fmt: skip
    parts |= {Section(Section.BYTES0 + p): plane for p, plane in enumerate(planes) if keep_zeros or bool(plane.any())}
    return assemble(Codec.P7, layout, x, shape, parts)


def r8(x: Tensor, columns: int = 0, coded: tuple[int, ...] = ()) -> Made:
    """R8 of the 1-D `x`: the byte planes named in `coded` are coded, the others raw."""
    planes, bits = reference_r8.byte_split(x)
    parts: dict[int, Tensor] = {Section.BITS: bits}
    for p, plane in enumerate(planes):
        if p and p - 1 not in coded:
            parts[Section.BYTES0 + p - 1] = plane
            continue
        table = torch.from_numpy(frequencies(reference_r8.byte_histogram(plane, x.numel()).numpy()))
        first = Section.FIELD_FREQUENCIES + 3 * p
        offsets, data = reference_r8.r8_encode(plane, table, x.numel())
        parts |= {first: table, first + 1: offsets, first + 2: data}
    return assemble(Codec.R8, Layout.ROWS, x, (x.numel() // columns, columns) if columns else (1, x.numel()), parts)
