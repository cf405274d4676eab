"""The header of a blob: written, read and held against everything that can be recomputed (docs/design.md)."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checksum
from .contract import DTYPES, SLACK, Codec, Layout, PlanError, Section, check_plan, number_of
from .errors import CorruptError, FormatError

MAGIC = b"FLZ1"
MAJOR, MINOR = 1, 0
_FIXED = struct.Struct("<4sBBBBBBHQQ")
_SECTION = struct.Struct("<HHIQQ")
_CRC = struct.Struct("<I")
#: More dimensions than any tensor has.
_MOST_DIMENSIONS = 64
_DTYPE_OF = {code: dtype for dtype, code in DTYPES.items()}


class Header(NamedTuple):
    """What a blob says of itself. `sections`: kind -> (offset, bytes, crc32c)."""

    codec: Codec
    layout: Layout
    dtype: torch.dtype
    shape: tuple[int, ...]
    sections: Mapping[int, tuple[int, int, int]]
    bytes: int  # of the whole blob

    @property
    def numel(self) -> int:
        """The number of numbers."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns): the last dimension is the columns; a scalar is 1 x 1."""
        columns = self.shape[-1] if self.shape else 1
        return (self.numel // columns, columns) if columns else (0, 0)

    def plan(self) -> list[int]:
        """The integers that kernels take."""
        plan = [int(self.codec), int(number_of(self.dtype)), int(self.layout), self.numel, *self.matrix]
        for kind in Section:
            offset, count, _ = self.sections.get(kind, (0, 0, 0))
            plan += (offset, count)
        return plan


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _header_bytes(dimensions: int, sections: int) -> int:
    return _FIXED.size + 8 * dimensions + _SECTION.size * sections + _CRC.size


def build(
    codec: Codec, layout: Layout, dtype: torch.dtype, shape: Sequence[int], parts: Mapping[int, Tensor]
) -> tuple[Tensor, Header]:
    """A blob on the device of `parts` (kind -> 1-D uint8; empty ones are left out), and its header."""
    kept = {kind: parts[kind] for kind in sorted(parts) if parts[kind].numel()}
    at = _aligned(_header_bytes(len(shape), len(kept)))
    device = next(iter(parts.values())).device if parts else torch.device("cpu")
    sections = {}
    for kind, part in kept.items():
        sections[kind] = (at, part.numel(), checksum.of(part))
        at = _aligned(at + part.numel())
    size = at + SLACK
    header = Header(codec, layout, dtype, tuple(shape), sections, size)
    blob = torch.zeros(size, dtype=torch.uint8, device=device)
    head = write(header)
    blob[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8).to(device)
    for kind, part in kept.items():
        blob[sections[kind][0] :][: part.numel()] = part
    return blob, header


def write(header: Header) -> bytes:
    """The bytes of a header, its checksum behind it."""
    out = _FIXED.pack(
        MAGIC, MAJOR, MINOR, header.codec, DTYPES[header.dtype], header.layout, len(header.shape), len(header.sections),
        header.numel, header.bytes,
    ) + struct.pack(f"<{len(header.shape)}Q", *header.shape)  # fmt: skip
    for kind, (offset, count, crc) in sorted(header.sections.items()):
        out += _SECTION.pack(kind, 0, crc, offset, count)
    return out + _CRC.pack(checksum.of_bytes(out))


def read(blob: Tensor) -> Header:
    """The header of a blob whose sections all lie where the contract puts them.

    Raises FormatError where the bytes are no blob or of an unknown major version, CorruptError where they are damaged.
    The content of sections is not looked at: see `CompressedTensor.verify`.
    """
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        raise FormatError(f"a blob is a 1-D uint8 tensor, got {blob.dtype} {list(blob.shape)}")
    longest = _header_bytes(_MOST_DIMENSIONS, len(Section))
    head = bytes(blob[:longest].cpu().numpy())
    if len(head) < _FIXED.size:
        raise CorruptError(f"a blob of {blob.numel()} bytes has no room for a header")
    magic, major, _minor, codec, dtype, layout, dimensions, count, numel, size = _FIXED.unpack_from(head)
    if magic != MAGIC:
        raise FormatError(f"not a fastloss blob: it begins with {magic!r}, not {MAGIC!r}")
    if major != MAJOR:
        raise FormatError(
            f"this blob is of format {major}.{_minor}; this release of fastloss reads {MAJOR}.x: install a newer one"
        )
    end = _header_bytes(dimensions, count)
    if dimensions > _MOST_DIMENSIONS or count > len(Section) or end > len(head):
        raise CorruptError(f"a header of {dimensions} dimensions and {count} sections does not fit")
    if checksum.of_bytes(head[: end - _CRC.size]) != _CRC.unpack_from(head, end - _CRC.size)[0]:
        raise CorruptError("the header's checksum is wrong")
    shape = struct.unpack_from(f"<{dimensions}Q", head, _FIXED.size)
    # From here on the header is what some writer wrote; it may still be a hostile one.
    if codec not in tuple(Codec) or layout not in tuple(Layout) or dtype not in _DTYPE_OF:
        raise CorruptError(f"unknown codec {codec}, layout {layout} or dtype {dtype}")
    if math.prod(shape) != numel or math.prod(max(d, 1) for d in shape) >= 1 << 62 or size != blob.numel():
        raise CorruptError(
            f"shape {list(shape)}, {numel} numbers and {size} of {blob.numel()} bytes contradict each other"
        )
    sections: dict[int, tuple[int, int, int]] = {}
    at, last = _aligned(end), -1
    for i in range(count):
        kind, zero, crc, offset, length = _SECTION.unpack_from(head, _FIXED.size + 8 * dimensions + _SECTION.size * i)
        if kind <= last or kind >= len(Section) or zero or offset != at or not 0 < length <= size:
            raise CorruptError(f"section {i} of kind {kind} at {offset} of {length} bytes is not where it belongs")
        sections[kind] = (offset, length, crc)
        at, last = _aligned(at + length), kind
    if at + SLACK != size:
        raise CorruptError(f"the sections end at {at + SLACK}, the blob at {size}")
    header = Header(Codec(codec), Layout(layout), _DTYPE_OF[dtype], tuple(shape), sections, size)
    if numel and Section.BLOCK_CRC not in sections:
        raise CorruptError("section BLOCK_CRC is missing")
    try:
        check_plan(blob, header.plan(), header.dtype)
    except PlanError as error:
        raise CorruptError(str(error)) from None
    return header
