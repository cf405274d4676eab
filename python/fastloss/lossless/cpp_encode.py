"""The encoders of the `cpp` backend but for R8's stream (csrc/cpu/p7_encode.cpp, csrc/cpu/lossless_split.cpp)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import backend_cpp, kept_memory
from ..compiled import _C, pointer
from ..registry import kernel
from .contract import (
    ESCAPE_CODE,
    GROUP,
    NUMBERS,
    P7_NUMBERS,
    SLOTS,
    SPLITS,
    Codec,
    Section,
    blocks_of,
    padded,
    section_bytes,
)
from .cpp_decode import why_not


def _why_not_flat(x: Tensor) -> str | None:
    if missing := why_not(x):
        return missing
    if x.dim() != 1 or not x.is_contiguous():
        return f"takes a contiguous 1-D tensor, got {list(x.shape)} of strides {x.stride()}"
    return None if x.numel() else "takes at least one number"


def why_not_split(x: Tensor) -> str | None:
    """Why the compiled kernel cannot split these numbers, or None."""
    if x.dtype not in NUMBERS:
        return f"takes {', '.join(str(d) for d in NUMBERS)}, got {x.dtype}"
    return _why_not_flat(x)


def why_not_p7(x: Tensor, table: Tensor | None = None) -> str | None:
    """Why the compiled kernels cannot make P7 of these numbers, or None."""
    if x.dtype not in NUMBERS or NUMBERS[x.dtype] not in P7_NUMBERS:
        return f"takes bfloat16, float16 and float32, got {x.dtype}"
    if table is not None and (table.dtype != torch.uint8 or table.shape != (SLOTS,)):
        return f"takes a table uint8 [{SLOTS}], got {table.dtype} {list(table.shape)}"
    return _why_not_flat(x)


def why_not_histogram(plane: Tensor, numel: int) -> str | None:
    """Why the compiled kernel cannot count these bytes, or None."""
    if plane.dtype != torch.uint8 or plane.numel() < numel:
        return f"takes {numel} or more bytes, got {plane.dtype} {list(plane.shape)}"
    return _why_not_flat(plane)


def _planes(x: Tensor) -> tuple[list[Tensor], Tensor]:
    split, size = SPLITS[NUMBERS[x.dtype]], padded(x.numel())
    planes = [kept_memory.empty((size,), torch.uint8) for _ in range(split.byte_planes)]
    return planes, kept_memory.empty((size // 8 * split.bit_planes,), torch.uint8)


@kernel("p7_histogram", "cpp", why_not_p7)
def p7_histogram(x: Tensor) -> Tensor:
    """How often each pair of fields occurs."""
    counts = torch.empty(1 << 16, dtype=torch.int64, device="cpu")
    _C.p7_histogram_cpu(  # type: ignore[union-attr]
        x=pointer(x), number=int(NUMBERS[x.dtype]), numel=x.numel(), counts=pointer(counts), isa=backend_cpp.ISA
    )
    return counts


def _p7_encode(
    x: Tensor, table: Tensor, codes: Tensor, planes: list[Tensor], bits: Tensor | None, offsets: Tensor,
    block_crc: Tensor | None = None, sums: Tensor | None = None,
) -> Any:  # fmt: skip
    """Write these sections; what escaped, as an object with `count`, `any(plane)` and `write(positions, values)`."""
    return _C.p7_encode_cpu(  # type: ignore[union-attr]
        x=pointer(x), number=int(NUMBERS[x.dtype]), numel=x.numel(), table=pointer(table), codes=pointer(codes),
        planes=[pointer(p) for p in planes], bits=pointer(bits), offsets=pointer(offsets), block_crc=pointer(block_crc),
        sums=pointer(sums), isa=backend_cpp.ISA,
    )  # fmt: skip


def _section_sums() -> Tensor:
    """Room for SectionSums of csrc/cpu/block_planes.h."""
    return torch.zeros(5, dtype=torch.int32, device="cpu")


def _by_section(sums: Tensor, room: Mapping[int, Tensor], data: Section) -> dict[int, int]:
    kinds = (Section.BYTES0, Section.BYTES1, Section.BYTES2, Section.BITS, data)
    return {kind: crc & 0xFFFFFFFF for kind, crc in zip(kinds, sums.tolist(), strict=True) if kind in room}


def p7_sizes(x: Tensor, counts: np.ndarray, table: Tensor) -> dict[int, int]:
    """The bytes of every section of P7 (BLOCK_CRC too) of the 1-D `x`, from the counts of its pairs and their table."""
    number, numel = NUMBERS[x.dtype], x.numel()
    entries = table.numpy()[:ESCAPE_CODE] + (table.numpy()[128 : 128 + ESCAPE_CODE].astype(np.int64) << 8)
    escapes = -(-numel // 2) - int(counts[np.unique(entries)].sum())
    kinds = [Section.TABLE, Section.CODES, Section.ESCAPE_OFFSETS, Section.BLOCK_CRC]
    kinds += [Section(Section.BYTES0 + p) for p in range(SPLITS[number].byte_planes)]
    kinds += [Section.BITS] if SPLITS[number].bit_planes else []
    sizes: dict[int, int] = {kind: section_bytes(kind, Codec.P7, number, numel, x.itemsize) or 0 for kind in kinds}
    return sizes | {Section.ESCAPE_POSITIONS: 2 * escapes, Section.ESCAPE_VALUES: 2 * x.itemsize * escapes}


def p7_encode_within(x: Tensor, table: Tensor, room: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], dict[int, int]]:
    """Write the sections of P7 to their places of `p7_sizes` bytes; those places, without the planes that are all 0.

    Beside them the crc32c of those sections that were summed up on the way.

    Raises RuntimeError where another thread has written to `x` since its pairs were counted.
    """
    parts = dict(room)
    planes = {kind: parts[kind] for kind in range(Section.BYTES0, Section.BYTES2 + 1) if kind in parts}
    parts[Section.TABLE].copy_(table)
    sums = _section_sums()
    escapes = _p7_encode(
        x, table, parts[Section.CODES], list(planes.values()), parts.get(Section.BITS),
        parts[Section.ESCAPE_OFFSETS], parts[Section.BLOCK_CRC], sums,
    )  # fmt: skip
    positions = parts.get(Section.ESCAPE_POSITIONS)
    if escapes.count != (0 if positions is None else positions.numel() // 2):  # the places were counted beforehand
        raise RuntimeError("the tensor changed while it was being compressed")
    if escapes.count:
        escapes.write(positions=pointer(parts[Section.ESCAPE_POSITIONS]), values=pointer(parts[Section.ESCAPE_VALUES]))
    crc = _by_section(sums, room, Section.CODES)
    return {kind: part for kind, part in parts.items() if kind not in planes or escapes.any(kind - Section.BYTES0)}, crc


@kernel("p7_encode", "cpp", why_not_p7)
def p7_encode(x: Tensor, table: Tensor) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """(codes, byte planes, bit planes, escape offsets, positions, values), x read once."""
    planes, bits = _planes(x)
    codes = kept_memory.empty((padded(x.numel()) // GROUP * 56,), torch.uint8)
    offsets = torch.empty(blocks_of(x.numel()) + 1, dtype=torch.int64, device="cpu")
    escapes = _p7_encode(x, table.contiguous(), codes, planes, bits, offsets)
    positions = torch.empty(escapes.count, dtype=torch.int16, device="cpu")
    values = torch.empty(2 * escapes.count, dtype=x.dtype, device="cpu")
    escapes.write(positions=pointer(positions), values=pointer(values))
    return codes, planes, bits, offsets, positions, values


@kernel("byte_split", "cpp", why_not_split)
def byte_split(x: Tensor) -> tuple[list[Tensor], Tensor]:
    """([field, byte planes...], bit planes), x read once."""
    planes, bits = _planes(x)
    field = kept_memory.empty((padded(x.numel()),), torch.uint8)
    _C.byte_split_cpu(  # type: ignore[union-attr]
        x=pointer(x), number=int(NUMBERS[x.dtype]), numel=x.numel(), field=pointer(field),
        planes=[pointer(p) for p in planes], bits=pointer(bits), isa=backend_cpp.ISA,
    )  # fmt: skip
    return [field, *planes], bits


def field_counts(x: Tensor) -> Tensor:
    """How often each field occurs (int64 [256])."""
    counts = torch.empty(SLOTS, dtype=torch.int64, device="cpu")
    _C.field_histogram_cpu(  # type: ignore[union-attr]
        x=pointer(x), number=int(NUMBERS[x.dtype]), numel=x.numel(), counts=pointer(counts), isa=backend_cpp.ISA
    )
    return counts


def sample_plane_counts(x: Tensor, blocks: int, apart: int) -> Tensor:
    """How often each byte occurs (int64 [byte planes, 256]) in `blocks` whole blocks, every `apart`-th of the 1-D `x`."""
    counts = torch.empty((SPLITS[NUMBERS[x.dtype]].byte_planes, SLOTS), dtype=torch.int64, device="cpu")
    _C.sample_planes_cpu(  # type: ignore[union-attr]
        x=pointer(x), number=int(NUMBERS[x.dtype]), blocks=blocks, apart=apart, counts=pointer(counts),
        isa=backend_cpp.ISA,
    )  # fmt: skip
    return counts


def r8_sizes(x: Tensor, data: int) -> dict[int, int]:
    """The bytes of every section of R8 (BLOCK_CRC too) of the 1-D `x` of which only the field is coded, in `data` bytes."""
    number, split = NUMBERS[x.dtype], SPLITS[NUMBERS[x.dtype]]
    kinds = [Section.FIELD_FREQUENCIES, Section.FIELD_OFFSETS, Section.BLOCK_CRC, Section.BITS]
    kinds += [Section(Section.BYTES0 + p) for p in range(split.byte_planes)]
    sizes: dict[int, int] = {kind: section_bytes(kind, Codec.R8, number, x.numel(), x.itemsize) or 0 for kind in kinds}
    return sizes | {Section.FIELD_DATA: data}


def r8_encode_within(
    x: Tensor, frequencies: Tensor, room: Mapping[int, Tensor], block_crc: Tensor
) -> tuple[int, dict[int, int]] | None:
    """Write all sections of R8 but BLOCK_CRC to their places, `x` read once. None where FIELD_DATA is too small.

    Returns the bytes of FIELD_DATA, and the crc32c of those sections that were summed up on the way.
    `block_crc` (int32 [blocks]) stays outside: behind FIELD_DATA nobody knows yet where it belongs.
    """
    planes = [room[Section.BYTES0 + p] for p in range(SPLITS[NUMBERS[x.dtype]].byte_planes)]
    data, sums = room[Section.FIELD_DATA], _section_sums()
    room[Section.FIELD_FREQUENCIES].copy_(frequencies)
    written = _C.r8_encode_numbers_cpu(  # type: ignore[union-attr]
        x=pointer(x), number=int(NUMBERS[x.dtype]), numel=x.numel(), frequencies=pointer(frequencies),
        planes=[pointer(p) for p in planes], bits=pointer(room.get(Section.BITS)),
        offsets=pointer(room[Section.FIELD_OFFSETS]), data=pointer(data), room=data.numel(), block_crc=pointer(block_crc),
        sums=pointer(sums), isa=backend_cpp.ISA,
    )  # fmt: skip
    return None if written < 0 else (written, _by_section(sums, room, Section.FIELD_DATA))


@kernel("byte_histogram", "cpp", why_not_histogram)
def byte_histogram(plane: Tensor, numel: int) -> Tensor:
    """How often each byte occurs among the first `numel`."""
    counts = torch.empty(SLOTS, dtype=torch.int64, device="cpu")
    _C.byte_histogram_cpu(  # type: ignore[union-attr]
        plane=pointer(plane), numel=numel, counts=pointer(counts), isa=backend_cpp.ISA
    )
    return counts
