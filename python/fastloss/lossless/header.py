"""The header of a blob: written, read and held against everything that can be recomputed (docs/design.md)."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kept_memory
from . import checksum
from .contract import DTYPES, PLAN_HEAD, SLACK, Codec, Layout, PlanError, Section, check_plan, number_of
from .errors import CorruptError, FormatError

MAGIC = b"FLZ1"
MAJOR, MINOR = 1, 0
_FIXED = struct.Struct("<4sBBBBBBHQQ")
_SECTION = struct.Struct("<HHIQQ")
_CRC = struct.Struct("<I")
#: More dimensions than tensors in use have.
_MOST_DIMENSIONS = 64
#: Bytes from which on a blob's memory is kept for the next one: its whole pages of 2 MB then waste little.
_WORTH_KEEPING = 32 << 20
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
        return math.prod(self.shape[:-1]), columns

    def plan(self) -> list[int]:
        """The integers that kernels take."""
        plan = [int(self.codec), int(number_of(self.dtype)), int(self.layout), self.numel, *self.matrix]
        plan += [0] * (2 * len(Section))
        for kind, (offset, count, _) in self.sections.items():
            plan[PLAN_HEAD + 2 * kind] = offset
            plan[PLAN_HEAD + 2 * kind + 1] = count
        return plan


def _fits(shape: Sequence[int]) -> bool:
    return len(shape) <= _MOST_DIMENSIONS and math.prod(max(d, 1) for d in shape) < 1 << 62


def check_shape(shape: Sequence[int]) -> None:
    """Raise ValueError where a header cannot hold this shape."""
    if not _fits(shape):
        raise ValueError(
            f"a blob has up to {_MOST_DIMENSIONS} dimensions, their extents (zeros left out) below 2^62 together, "
            f"got {len(shape)} of {list(shape[:8])}{'...' if len(shape) > 8 else ''}"
        )


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _header_bytes(dimensions: int, sections: int) -> int:
    return _FIXED.size + 8 * dimensions + _SECTION.size * sections + _CRC.size


class Room(NamedTuple):
    """A blob to be, and the places of its sections (kind -> 1-D uint8). Between them nothing is written yet."""

    blob: Tensor
    parts: Mapping[int, Tensor]
    memory: Tensor  # where the blob begins; there may be more of it
    crc: Mapping[int, int] = {}  # kind -> crc32c of the sections where that is known already


def room(
    dimensions: int, sizes: Mapping[int, int], device: torch.device, memory: Tensor | None = None,
    crc: Mapping[int, int] | None = None,
) -> Room:  # fmt: skip
    """Room for sections of these bytes; of 0: none. `memory`: of a larger room, whose sections become smaller."""
    kept = {kind: sizes[kind] for kind in sorted(sizes) if sizes[kind]}
    at, places = _aligned(_header_bytes(dimensions, len(kept))), {}
    for kind, size in kept.items():
        places[kind] = at
        at = _aligned(at + size)
    if memory is not None:  # the blob's own storage ends where it does
        blob = torch.from_numpy(memory.numpy()[: at + SLACK])
    elif device.type == "cpu" and at >= _WORTH_KEEPING:
        blob = kept_memory.empty((at + SLACK,), torch.uint8)
    else:
        blob = torch.empty(at + SLACK, dtype=torch.uint8, device=device)
    parts = {kind: blob[at : at + kept[kind]] for kind, at in places.items()}
    return Room(blob, parts, blob if memory is None else memory, crc or {})


def build(
    codec: Codec, layout: Layout, dtype: torch.dtype, shape: Sequence[int], parts: Mapping[int, Tensor],
    within: Room | None = None,
) -> tuple[Tensor, Header]:  # fmt: skip
    """A blob on the device of `parts` (kind -> 1-D uint8; empty ones are left out), and its header.

    Where the sections are exactly those of `within`, that is the blob: parts that already lie there are not copied.
    """
    sizes = {kind: part.numel() for kind, part in parts.items() if part.numel()}
    if within is None or {kind: part.numel() for kind, part in within.parts.items()} != sizes:
        device = next(iter(parts.values())).device if parts else torch.device("cpu")
        within = room(len(shape), sizes, device)
    blob, sections, end = within.blob, {}, 0
    for kind, place in within.parts.items():
        if place.data_ptr() != parts[kind].data_ptr():
            place.copy_(parts[kind])
        offset = int(place.storage_offset())
        blob[end:offset].zero_()
        end = offset + sizes[kind]
        known = within.crc.get(kind)
        sections[kind] = (offset, sizes[kind], checksum.of(place) if known is None else known)
    blob[end:].zero_()
    header = Header(codec, layout, dtype, tuple(shape), sections, blob.numel())
    head = write(header)
    blob[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8).to(blob.device)
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

    Raises TypeError for no dense tensor, FormatError where the bytes are no blob or of an unknown major version,
    CorruptError where they are damaged.
    The content of sections is not looked at: see `CompressedTensor.verify`.
    """
    if not isinstance(blob, Tensor) or blob.layout != torch.strided or blob.is_meta:
        kind = f"{blob.layout} on {blob.device}" if isinstance(blob, Tensor) else type(blob).__name__
        raise TypeError(f"a blob is a dense 1-D uint8 tensor, got {kind}")
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
    if math.prod(shape) != numel or not _fits(shape) or size != blob.numel():
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
