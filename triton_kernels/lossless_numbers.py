"""What the lossless kernels share: the sections of a blob, a number of its parts, the codes of P7, the order of tiles.

docs/design.md, "The lossless contract". Kernels are given sections, not blobs, so that every pointer has its own bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of fastloss.lossless.contract: Number, Codec, Section, sizes.
BF16, FP16, FP32 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
E4M3, E5M2 = tl.constexpr(3), tl.constexpr(4)
PLANE = tl.constexpr(6)  # no number: the bytes of a plane themselves
RAW, P7, R8 = 0, 1, 2
BLOCK = tl.constexpr(16384)
GROUP = 128
#: Pairs of a block, and of a unit of the `tiles` layout.
PAIRS = tl.constexpr(8192)
UNIT_PAIRS = tl.constexpr(1024)
TABLE, CODES, ESCAPE_OFFSETS, ESCAPE_POSITIONS, ESCAPE_VALUES = range(5)
BYTES0, BITS, FREQUENCIES0, RAW_BYTES, BLOCK_CRC = 5, 8, 9, 21, 22
_PLAN_HEAD = 6
BYTE_PLANES = {0: 1, 1: 1, 2: 3, 3: 0, 4: 0}
BIT_PLANES = {0: 0, 1: 3, 2: 0, 3: 4, 4: 3}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Plan(NamedTuple):
    """A blob whose sections can be read as numbers of more than a byte, and what its plan says."""

    blob: Tensor
    plan: tuple[int, ...]

    @property
    def codec(self) -> int:
        return self.plan[0]

    @property
    def number(self) -> int:
        return self.plan[1]

    @property
    def tiles(self) -> bool:
        return self.plan[2] == 1

    @property
    def numel(self) -> int:
        return self.plan[3]

    @property
    def columns(self) -> int:
        return self.plan[5]

    def section(self, kind: int, dtype: torch.dtype = torch.uint8, skip: int = 0) -> Tensor | None:
        """The numbers of a section without its first `skip` bytes, or None where there is no such section."""
        at, count = self.plan[_PLAN_HEAD + 2 * kind], self.plan[_PLAN_HEAD + 2 * kind + 1]
        return self.blob[at + skip : at + count].view(dtype) if count else None

    def byte_planes(self, skip: int, dtype: torch.dtype = torch.uint8) -> list[Tensor | None]:
        """Three planes, None where one is not stored raw; `skip` numbers are left out."""
        return [self.section(BYTES0 + p, dtype, skip) for p in range(3)]

    def bits(self, skip: int) -> Tensor | None:
        """The bit planes behind the first `skip` numbers, whole blocks."""
        return self.section(BITS, skip=skip // 8 * BIT_PLANES[self.number])


def read_plan(blob: Tensor, plan: Sequence[int]) -> Plan:
    """Sections lie at multiples of 64 in the blob; a blob that itself begins anywhere is copied first."""
    return Plan(blob if blob.data_ptr() % 16 == 0 and blob.is_contiguous() else blob.clone(), tuple(plan))


def padded(numel: int) -> int:
    """`numel` rounded up to a group."""
    return triton.cdiv(numel, GROUP) * GROUP


@triton.jit
def merged(field, byte0, byte1, byte2, bit0, bit1, bit2, bit3, NUMBER: tl.constexpr):
    """The bit pattern (int32) of a field, byte planes and bit planes; those that a number does not have do not matter."""
    if NUMBER == BF16:
        return field << 7 | byte0 & 127 | (byte0 & 128) << 8
    elif NUMBER == FP16:
        return field << 10 | byte0 | bit0 << 8 | bit1 << 9 | bit2 << 15
    elif NUMBER == FP32:
        return field << 23 | byte0 | byte1 << 8 | (byte2 & 127) << 16 | (byte2 & 128) << 24
    elif NUMBER == E4M3:
        return field << 3 | bit0 | bit1 << 1 | bit2 << 2 | bit3 << 7
    elif NUMBER == PLANE:
        return field
    else:
        return field << 2 | bit0 | bit1 << 1 | bit2 << 7


@triton.jit
def code_of(codes, p, keep):
    """The 7-bit codes of pairs p. A code lies in two bytes, the second perhaps beyond the section, in its slack."""
    bit = 7 * p
    low = tl.load(codes + (bit >> 3), mask=keep, other=0).to(tl.int32)
    high = tl.load(codes + (bit >> 3) + 1, mask=keep, other=0).to(tl.int32)
    return (low | high << 8) >> (bit & 7) & 127


@triton.jit
def pair_of_plane(plane, p, keep):
    """Two bytes of a plane, the first in the low half; 0 where there is no plane. `plane` is read as int16."""
    if plane is None:
        return p * 0
    else:
        return tl.load(plane + p, mask=keep, other=0).to(tl.int32) & 0xFFFF


@triton.jit
def bits_of_plane(bits, i, plane, plane_bytes, keep):
    """The byte of numbers 8 i.. of a block's bit plane."""
    return tl.load(bits + plane * plane_bytes + i, mask=keep, other=0).to(tl.int32)


@triton.jit
def decoded_pair(table, codes, bytes0, bytes1, bytes2, bits, p, in_block, plane_bytes, keep, NUMBER: tl.constexpr):
    """The bit patterns (int32) of both numbers of pairs p. Codes and byte planes begin at pair 0; `bits` at the block in which
    the pairs have the numbers `in_block`, with `plane_bytes` a bit plane."""
    code = code_of(codes, p, keep)
    first = tl.load(table + code, mask=keep, other=0).to(tl.int32)
    second = tl.load(table + 128 + code, mask=keep, other=0).to(tl.int32)
    b0 = pair_of_plane(bytes0, p, keep)
    b1, b2, e0, e1, e2 = b0, b0, b0, b0, b0
    if NUMBER == FP32:
        b1, b2 = pair_of_plane(bytes1, p, keep), pair_of_plane(bytes2, p, keep)
    if NUMBER == FP16:
        shift = (in_block & 3) * 2
        e0 = bits_of_plane(bits, in_block >> 2, 0, plane_bytes, keep) >> shift
        e1 = bits_of_plane(bits, in_block >> 2, 1, plane_bytes, keep) >> shift
        e2 = bits_of_plane(bits, in_block >> 2, 2, plane_bytes, keep) >> shift
    low = merged(first, b0 & 255, b1 & 255, b2 & 255, e0 & 1, e1 & 1, e2 & 1, e2 & 1, NUMBER)
    high = merged(second, b0 >> 8, b1 >> 8, b2 >> 8, e0 >> 1 & 1, e1 >> 1 & 1, e2 >> 1 & 1, e2 & 1, NUMBER)
    return low, high


@triton.jit
def matrix_of(units, ROWS: tl.constexpr):
    """[ROWS, 64]: units of 16 x 64 pairs, each in the order of the `tiles` layout, one below the other."""
    parts = tl.reshape(units, [ROWS // 16, 8, 4, 8, 2, 2])  # unit, g, t, i, column half, row half
    return tl.reshape(tl.permute(parts, (0, 5, 1, 3, 4, 2)), [ROWS, 64])


@triton.jit
def place_in_unit(q):
    """The row and the pair of columns of a unit's q-th pair."""
    lane = q >> 5
    return (lane >> 2) + 8 * (q & 1), (q >> 2 & 7) * 8 + (q >> 1 & 1) * 4 + (lane & 3)


@triton.jit
def escapes_of(offsets, block, total):
    """Where a block's escapes begin and end in the list, whatever the offsets say: within the list, as many as pairs at most."""
    begin = tl.minimum(tl.maximum(tl.load(offsets + block), 0), total)
    end = tl.minimum(tl.maximum(tl.load(offsets + block + 1), 0), total)
    return begin, tl.minimum(end, begin + PAIRS)
