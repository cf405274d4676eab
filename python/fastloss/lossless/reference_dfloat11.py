"""DFloat11's decoder (format 0.5) in plain PyTorch: all threads of 64 bits at once, as on a GPU.

The layout. A number's exponent (bits 14..7 of bf16) is a Huffman code, its other bits are SIGN_MANTISSA: u8 [numel],
sign << 7 | bits 6..0. CODES: the codes one behind the other, the first bit of each byte its most significant; beyond the
last byte bits are 0.

LUTS: u8 [tables + 1, 256]. To read a code, look its first byte up in table 0, whatever bits of the next code it
holds. A value v >= 240 for which table 256 - v exists (256 - v < tables) says: look the next byte up in that table, four
bytes at most, and the fourth byte's value is taken as it is. The value found is the exponent e, and LUTS[tables, e] the
length of its code in bits, 1..32.

Thread t owns bits 8 B t .. 8 B (t + 1) of CODES (B = bytes_per_thread), and decodes the codes that *begin* there. GAPS:
5 bits a thread, most significant first: the first bit of its first code, counted from its own first bit. Block b is
threads T b .. T (b + 1) (T = threads_per_block). OUTPUT_POSITIONS: u32 [blocks + 1], the number of codes before each
block, and numel at the end. The last block may seem to hold more codes, made of the padding of the last byte: they are
none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import kernel
from .errors import CorruptError

_LONGEST = 32  # bits of a code: four tables


def positions_of(output_positions: Tensor, numel: int) -> Tensor:
    """OUTPUT_POSITIONS as int64. Raises CorruptError unless they rise from 0 to numel."""
    positions = output_positions.clone().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    steps = positions[1:] - positions[:-1]
    if not positions.numel() or int(positions[0]) != 0 or int(positions[-1]) != numel or bool((steps < 0).any()):
        raise CorruptError(f"output positions do not rise from 0 to {numel}")
    return positions


def gaps_of(gaps: Tensor, threads: int) -> Tensor:
    """The first `threads` numbers of 5 bits, int64."""
    first = 5 * torch.arange(threads, device=gaps.device)
    wide = torch.nn.functional.pad(gaps, (0, 1)).to(torch.int64)
    pair = wide[first // 8] << 8 | wide[first // 8 + 1]
    return pair >> (11 - first % 8) & 31


def _next_codes(luts: Tensor, codes: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """(exponents, lengths) of the codes that begin at the bits `at`. codes: int64, with eight zeros behind."""
    tables, first = luts.shape[0] - 1, at // 8
    word = torch.zeros_like(at)
    for byte in range(5):
        word = word << 8 | codes[(first + byte).clamp(max=codes.numel() - 1)]
    word = word >> (8 - at % 8) & 0xFFFFFFFF
    value = luts[0, word >> 24]
    more = torch.ones_like(at, dtype=torch.bool)
    for byte in range(1, 4):
        more = more & (value >= 240) & (256 - value < tables)
        table = torch.where(more, 256 - value, 0)
        value = torch.where(more, luts[table, word >> (24 - 8 * byte) & 255], value)
    return value, luts[tables, value]


def _all_codes(
    luts: Tensor, codes: Tensor, gaps: Tensor, blocks: int, bytes_per_thread: int, threads_per_block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(exponents, first bits, bits behind) of all codes that threads find, [blocks, codes in order], -1 where none is."""
    width, bits = 8 * bytes_per_thread, 8 * codes.numel()
    luts, codes = luts.to(torch.int64), torch.nn.functional.pad(codes, (0, 8)).to(torch.int64)
    threads = blocks * threads_per_block
    begin = torch.arange(threads, device=codes.device) * width
    at = begin + gaps_of(gaps, threads)
    room = (begin + width).clamp(max=bits)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(width):
        here = at < room
        exponent, length = _next_codes(luts, codes, at)
        found.append((torch.where(here, exponent, -1), at, at + length))
        at = torch.where(here, at + length, at)
    exponents, starts, ends = (torch.stack(column, 1).reshape(blocks, -1) for column in zip(*found, strict=True))
    return exponents, starts, ends


def decode(
    luts: Tensor, codes: Tensor, sign_mantissa: Tensor, output_positions: Tensor, gaps: Tensor, numel: int,
    bytes_per_thread: int, threads_per_block: int,
) -> tuple[Tensor, int]:  # fmt: skip
    """(the numbers, the first block that does not hold as many codes as it should, each beginning where the one before
    ends and the very last one in the last byte; or -1). Raises CorruptError as `positions_of`.
    """
    positions = positions_of(output_positions, numel)
    if positions.numel() == 1:
        return torch.empty(0, dtype=torch.bfloat16, device=codes.device), -1
    exponents, starts, ends = _all_codes(luts, codes, gaps, positions.numel() - 1, bytes_per_thread, threads_per_block)
    values = torch.zeros(numel, dtype=torch.int64, device=codes.device)
    bad, at = -1, 0
    for b, want in enumerate((positions[1:] - positions[:-1]).tolist()):
        mine = exponents[b] >= 0
        value, start, end = (t[b][mine][:want] for t in (exponents, starts, ends))
        first, last = int(positions[b]), b == positions.numel() - 2
        values[first : first + value.numel()] = value
        length = end - start
        right = value.numel() == want and (last or int(mine.sum()) == want)
        right = right and bool(((length > 0) & (length <= _LONGEST)).all())
        right = right and bool((start == torch.cat((start.new_tensor([at]), end[:-1]))[:want]).all())
        at = int(end[-1]) if end.numel() else at
        if last:
            right = right and 0 <= 8 * codes.numel() - at < 8
        bad = b if bad < 0 and not right else bad
    other = sign_mantissa.to(torch.int64)
    word = (other & 0x80) << 8 | values << 7 | (other & 0x7F)
    return ((word ^ 0x8000) - 0x8000).to(torch.int16).view(torch.bfloat16), bad


@kernel("dfloat11_decode", "reference")
def dfloat11_decode(
    luts: Tensor, codes: Tensor, sign_mantissa: Tensor, output_positions: Tensor, gaps: Tensor, numel: int,
    bytes_per_thread: int, threads_per_block: int,
) -> Tensor:  # fmt: skip
    """The numbers (bf16 [numel]); damaged bytes give other numbers, or CorruptError from `positions_of`."""
    return decode(
        luts, codes, sign_mantissa, output_positions, gaps, numel, bytes_per_thread, threads_per_block
    )[0]  # fmt: skip


@kernel("dfloat11_decode_checked", "reference")
def dfloat11_decode_checked(
    luts: Tensor, codes: Tensor, sign_mantissa: Tensor, output_positions: Tensor, gaps: Tensor, numel: int,
    bytes_per_thread: int, threads_per_block: int,
) -> tuple[Tensor, int]:  # fmt: skip
    """(the numbers, the first damaged block or -1)."""
    return decode(luts, codes, sign_mantissa, output_positions, gaps, numel, bytes_per_thread, threads_per_block)
