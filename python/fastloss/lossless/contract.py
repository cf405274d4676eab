"""The names of the lossless contract (docs/design.md), as in csrc/lossless.h, and what follows from them alone."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

BLOCK = 16384
GROUP = 128
LANES = 32
ESCAPE_CODE = 127
SLOTS = 256
#: Zero bytes behind the last section: a decoder may read so far beyond any section.
SLACK = 64


class Codec(IntEnum):
    """How the numbers of a blob are stored."""

    RAW = 0
    P7 = 1
    R8 = 2


class Layout(IntEnum):
    """In which sequence a blob holds its numbers."""

    ROWS = 0
    TILES = 1


class Number(IntEnum):
    """How a number is split into field, byte planes and bit planes."""

    BF16 = 0
    FP16 = 1
    FP32 = 2
    E4M3 = 3
    E5M2 = 4
    OPAQUE = 5


class Section(IntEnum):
    """The sections of a blob, in their order."""

    TABLE = 0
    CODES = 1
    ESCAPE_OFFSETS = 2
    ESCAPE_POSITIONS = 3
    ESCAPE_VALUES = 4
    BYTES0 = 5
    BYTES1 = 6
    BYTES2 = 7
    BITS = 8
    FIELD_FREQUENCIES = 9
    FIELD_OFFSETS = 10
    FIELD_DATA = 11
    BYTES0_FREQUENCIES = 12
    BYTES0_OFFSETS = 13
    BYTES0_DATA = 14
    BYTES1_FREQUENCIES = 15
    BYTES1_OFFSETS = 16
    BYTES1_DATA = 17
    BYTES2_FREQUENCIES = 18
    BYTES2_OFFSETS = 19
    BYTES2_DATA = 20
    RAW = 21
    BLOCK_CRC = 22


class Split(NamedTuple):
    """Parts of a number: where its field begins and how wide it is, and how many planes the rest fills."""

    bytes: int
    field_bit: int
    field_bits: int
    byte_planes: int
    bit_planes: int


SPLITS = {
    Number.BF16: Split(2, 7, 8, 1, 0),
    Number.FP16: Split(2, 10, 5, 1, 3),
    Number.FP32: Split(4, 23, 8, 3, 0),
    Number.E4M3: Split(1, 3, 4, 0, 4),
    Number.E5M2: Split(1, 2, 5, 0, 3),
}

#: The dtypes of blobs by their code in the header. Codes are part of the format: append, never change.
DTYPES: dict[torch.dtype, int] = {
    torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float8_e4m3fn: 3, torch.float8_e5m2: 4,
    torch.float8_e4m3fnuz: 5, torch.float8_e5m2fnuz: 6, torch.float64: 7, torch.bool: 8, torch.uint8: 9, torch.int8: 10,
    torch.int16: 11, torch.int32: 12, torch.int64: 13, torch.uint16: 14, torch.uint32: 15, torch.uint64: 16,
    torch.complex64: 17, torch.complex128: 18, torch.float8_e8m0fnu: 19,
}  # fmt: skip
NUMBERS: dict[torch.dtype, Number] = {
    torch.bfloat16: Number.BF16, torch.float16: Number.FP16, torch.float32: Number.FP32,
    torch.float8_e4m3fn: Number.E4M3, torch.float8_e4m3fnuz: Number.E4M3,
    torch.float8_e5m2: Number.E5M2, torch.float8_e5m2fnuz: Number.E5M2,
}  # fmt: skip
#: Numbers that P7 takes: of fewer bits its 3.5 a field are no gain.
P7_NUMBERS = (Number.BF16, Number.FP16, Number.FP32)

PLAN_HEAD = 6
PLAN_LENGTH = PLAN_HEAD + 2 * len(Section)


def number_of(dtype: torch.dtype) -> Number:
    """How `dtype` is split; OPAQUE where it is only stored raw."""
    return NUMBERS.get(dtype, Number.OPAQUE)


def blocks_of(numel: int) -> int:
    """The number of blocks."""
    return -(-numel // BLOCK)


def padded(numel: int) -> int:
    """`numel` rounded up to a group."""
    return -(-numel // GROUP) * GROUP


def has_tiles(rows: int, columns: int) -> bool:
    """Whether a matrix of this shape has a `tiles` layout."""
    return rows > 0 and columns > 0 and rows % 16 == 0 and columns % GROUP == 0


class PlanError(ValueError):
    """A plan that does not fit its blob: it would make a kernel read what is not there."""


def section_bytes(kind: int, codec: int, number: int, numel: int, item: int) -> int | None:
    """The exact size of a section; None where it depends on the numbers. `item`: bytes of one number."""
    blocks, whole = blocks_of(numel), padded(numel)
    split = SPLITS.get(Number(number))
    if kind in (Section.TABLE, *range(Section.FIELD_FREQUENCIES, Section.RAW, 3)):
        return SLOTS
    if kind == Section.CODES:
        return whole // GROUP * 56
    if kind in (Section.ESCAPE_OFFSETS, *range(Section.FIELD_OFFSETS, Section.RAW, 3)):
        return 8 * (blocks + 1)
    if kind in (Section.BYTES0, Section.BYTES1, Section.BYTES2):
        return whole
    if kind == Section.BITS:
        return whole // 8 * (split.bit_planes if split else 0)
    if kind == Section.RAW:
        return numel * item
    if kind == Section.BLOCK_CRC:
        return 4 * blocks
    return None


def _may_have(kind: int, codec: int, split: Split | None) -> bool:
    if kind == Section.BLOCK_CRC:
        return True
    if codec == Codec.RAW or split is None:
        return kind == Section.RAW
    if kind in (Section.BYTES0, Section.BYTES1, Section.BYTES2):
        return kind - Section.BYTES0 < split.byte_planes
    if kind == Section.BITS:
        return split.bit_planes > 0
    if kind <= Section.ESCAPE_VALUES:
        return codec == Codec.P7
    return codec == Codec.R8 and kind < Section.RAW and (kind - Section.FIELD_FREQUENCIES) // 3 <= split.byte_planes


def _must_have(codec: int, split: Split | None, present: Sequence[bool]) -> str | None:
    """What is missing from the sections of a blob that is not empty, or None."""
    if codec == Codec.RAW or split is None:
        return None if present[Section.RAW] else "RAW"
    if codec == Codec.P7:
        needed = [Section.TABLE, Section.CODES, Section.ESCAPE_OFFSETS]
        if present[Section.ESCAPE_POSITIONS] != present[Section.ESCAPE_VALUES]:
            return "ESCAPE_POSITIONS or ESCAPE_VALUES"
    else:
        needed = [Section.FIELD_FREQUENCIES]
        for first in range(Section.FIELD_FREQUENCIES, Section.RAW, 3):
            if any(present[first : first + 3]) and not all(present[first : first + 3]):
                return "one of " + ", ".join(Section(k).name for k in range(first, first + 3))
            plane = (first - Section.FIELD_FREQUENCIES) // 3 - 1
            if plane >= 0 and present[first] and present[Section.BYTES0 + plane]:
                return f"only one form of byte plane {plane}"
    if split.bit_planes:
        needed.append(Section.BITS)
    return next((k.name for k in needed if not present[k]), None)


@lru_cache(maxsize=4096)
def _check(plan: tuple[int, ...], size: int, item: int) -> str | None:
    if len(plan) != PLAN_LENGTH:
        return f"a plan has {PLAN_LENGTH} integers, got {len(plan)}"
    codec, number, layout, numel, rows, columns = plan[:PLAN_HEAD]
    if codec not in tuple(Codec) or number not in tuple(Number) or layout not in tuple(Layout):
        return f"codec, number and layout must be ones of the contract, got {codec}, {number}, {layout}"
    if min(numel, rows, columns) < 0 or rows * columns != numel:
        return f"{numel} numbers cannot be {rows} x {columns}"
    split = SPLITS.get(Number(number))
    if codec != Codec.RAW and (split is None or not numel or (codec == Codec.P7 and number not in P7_NUMBERS)):
        return f"{Codec(codec).name} does not take {numel} numbers of kind {Number(number).name}"
    if split is not None and item != split.bytes:
        return f"{Number(number).name} has {split.bytes} bytes, got a dtype of {item}"
    if layout == Layout.TILES and not (codec == Codec.P7 and has_tiles(rows, columns)):
        return f"layout tiles wants P7, rows a multiple of 16 and columns of 128, got {Codec(codec).name} of {rows} x {columns}"
    spans = [(plan[PLAN_HEAD + 2 * k], plan[PLAN_HEAD + 2 * k + 1]) for k in range(len(Section))]
    end = 0
    for kind, (offset, count) in enumerate(spans):
        if (offset, count) == (0, 0):
            continue
        if count <= 0 or offset < end or offset % 64 or offset + count + SLACK > size:
            return f"section {Section(kind).name} at {offset} of {count} bytes does not lie within the blob's {size}"
        end = offset + count
        want = section_bytes(kind, codec, number, numel, item)
        if want is not None and want != count:
            return f"section {Section(kind).name} must have {want} bytes, got {count}"
        if not _may_have(kind, codec, split):
            return f"{Codec(codec).name} of {Number(number).name} has no section {Section(kind).name}"
    present = [count > 0 for _, count in spans]
    if numel and (missing := _must_have(codec, split, present)):
        return f"section {missing} is missing"
    escapes = spans[Section.ESCAPE_POSITIONS][1]
    if split and (escapes % 2 or spans[Section.ESCAPE_VALUES][1] != escapes * split.bytes):
        return f"{escapes} bytes of escape positions do not go with {spans[Section.ESCAPE_VALUES][1]} of values"
    return None


def check_plan(blob: torch.Tensor, plan: Sequence[int], dtype: torch.dtype) -> None:
    """Raise PlanError unless every section of `plan` lies within `blob` and has the size that the contract asks for."""
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        raise PlanError(f"a blob is a 1-D uint8 tensor, got {blob.dtype} {list(blob.shape)}")
    number = plan[1] if len(plan) > 1 else -1
    if number_of(dtype) != number:
        raise PlanError(f"a plan of numbers of kind {number} does not decode to {dtype}")
    if reason := _check(tuple(plan), blob.numel(), dtype.itemsize):
        raise PlanError(reason)


def pair_table(counts: np.ndarray) -> np.ndarray:
    """P7's TABLE (uint8 [256]) from the counts of pairs (int64 [65536], index first | second << 8)."""
    seen = np.flatnonzero(counts != 0)  # of booleans: several times as fast
    best = seen[np.argsort(-counts[seen], kind="stable")][:ESCAPE_CODE]
    table = np.zeros(SLOTS, np.uint8)
    table[: best.size] = best & 255
    table[128 : 128 + best.size] = best >> 8
    return table


_LOG2 = [0.0] + [float(np.log2(f)) for f in range(1, SLOTS + 1)]
#: round(2^20 log2 f): whole numbers, so that tables are the same on every machine.
LOG2 = [round(bits * 2**20) for bits in _LOG2]


def _slots(counts: list[int]) -> tuple[list[int], int]:
    """The split of 256 slots, one or more each, of least cost: sum counts (8 - log2 slots), in 2^-20 bits."""
    slots = [1] * len(counts)
    gains = [(-c * (LOG2[2] - LOG2[1]), i) for i, c in enumerate(counts)]
    heapq.heapify(gains)
    for _ in range(SLOTS - len(counts)):
        _, i = gains[0]
        slots[i] += 1
        gain = counts[i] * (LOG2[slots[i] + 1] - LOG2[slots[i]]) if slots[i] < SLOTS else 0
        heapq.heapreplace(gains, (-gain, i))
    return slots, sum(c * ((8 << 20) - LOG2[f]) for c, f in zip(counts, slots, strict=True))


def frequencies(counts: np.ndarray) -> np.ndarray:
    """R8's FREQUENCIES (uint8 [256]) from the counts of bytes (int64 [256]): the cheapest number of symbols that are kept.

    An escaped byte costs its slots and eight bits. Beyond eight more symbols that save nothing the search stops.
    This is the definition, and takes milliseconds; `cpp_r8.frequencies` is what `compress` calls.
    """
    order = [int(s) for s in np.lexsort((np.arange(counts.size), -counts)) if counts[s] > 0]
    total, best, found, worse = int(counts.sum()), None, np.zeros(SLOTS, np.uint8), 0
    kept = 0
    for keep in range(1, min(len(order), SLOTS - 1) + 1):
        kept += int(counts[order[keep - 1]])
        slots, cost = _slots([*(int(counts[s]) for s in order[:keep]), total - kept])
        cost += (total - kept) * (8 << 20)
        if best is None or cost < best:
            best, worse = cost, 0
            found = np.zeros(SLOTS, np.uint8)
            found[order[:keep]] = slots[:keep]
        else:
            worse += 1
            if worse == 8:
                break
    return found


def cost_bits(counts: np.ndarray, freq: np.ndarray) -> float:
    """About how many bits R8 writes for bytes of these counts, states and offsets left out."""
    escape = 16 - _LOG2[SLOTS - int(freq.sum())]
    pairs = zip(counts.tolist(), freq.tolist(), strict=True)
    return sum(c * (8 - _LOG2[f] if f else escape) for c, f in pairs if c)


def entropy_bits(counts: np.ndarray) -> float:
    """The bits below which no code of single bytes comes: -sum c log2(c / sum c)."""
    seen = counts[counts > 0].astype(np.float64)
    return float((seen * np.log2(seen.sum() / seen)).sum())
