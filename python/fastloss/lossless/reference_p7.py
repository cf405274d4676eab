"""P7 in plain PyTorch: a 7-bit code a pair of fields, and a list of the pairs that have none."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import kernel
from .contract import BLOCK, ESCAPE_CODE, NUMBERS, blocks_of
from .reference_split import numbers, split, words


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The padded bit patterns, and first field | second field << 8 of each pair."""
    number = NUMBERS[x.dtype]
    bits = words(x, number)
    field = split(bits, number)[0].to(torch.int64)
    return bits, field[0::2] | field[1::2] << 8


@kernel("p7_histogram", "reference")
def p7_histogram(x: Tensor) -> Tensor:
    """How often each pair of fields occurs (int64 [65536]), over the pairs that begin inside the 1-D tensor."""
    return torch.bincount(_pairs(x)[1][: (x.numel() + 1) // 2], minlength=65536)


@kernel("p7_encode", "reference")
def p7_encode(x: Tensor, table: Tensor) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """(codes, byte planes, bit planes, escape offsets int64, positions int16, values [2 a pair]) of the 1-D `x`."""
    bits, pair = _pairs(x)
    entries = table.to(device=x.device, dtype=torch.int64)
    keys = entries[:ESCAPE_CODE] | entries[128 : 128 + ESCAPE_CODE] << 8
    code_of = torch.full((65536,), ESCAPE_CODE, dtype=torch.int64, device=x.device)
    code_of[keys.flip(0)] = torch.arange(ESCAPE_CODE - 1, -1, -1, device=x.device)  # of equal entries the first
    valid = torch.arange(pair.numel(), device=x.device) < (x.numel() + 1) // 2
    code = torch.where(valid, code_of[pair], 0)
    escaped = (code == ESCAPE_CODE).nonzero()[:, 0]
    values = torch.stack((bits[0::2][escaped], bits[1::2][escaped]), 1).reshape(-1)
    bits[0::2][escaped] = 0
    bits[1::2][escaped] = 0
    _, planes, section = split(bits, NUMBERS[x.dtype])
    eight = (code.reshape(-1, 8) << 7 * torch.arange(8, device=x.device)).sum(1)  # 56 bits
    codes = (eight[:, None] >> 8 * torch.arange(7, device=x.device) & 255).to(torch.uint8).reshape(-1)
    counts = torch.bincount(escaped // (BLOCK // 2), minlength=blocks_of(x.numel()))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    positions = (escaped % (BLOCK // 2)).to(torch.int16)
    return codes, planes, section, offsets, positions, numbers(values, x.dtype)


def p7_fields(table: Tensor, codes: Tensor) -> Tensor:
    """The fields of padded numbers."""
    sevens = codes.reshape(-1, 7).to(torch.int64)
    eight = (sevens << 8 * torch.arange(7, device=codes.device)).sum(1)
    code = (eight[:, None] >> 7 * torch.arange(8, device=codes.device) & 127).reshape(-1)
    return torch.stack((table[code], table[128 + code]), 1).reshape(-1)


def p7_patch(out: Tensor, first_block: int, offsets: Tensor, positions: Tensor, values: Tensor, numel: int) -> None:
    """Write the escapes of the blocks that `out` (1-D, whole blocks from first_block on) holds, skipping bad positions."""
    blocks = blocks_of(out.numel())
    bounds = offsets[first_block : first_block + blocks + 1].clamp(0, positions.numel())
    for b in range(blocks):
        at = int(bounds[b])
        end = min(int(bounds[b + 1]), at + BLOCK // 2)  # a block has no more pairs
        if end <= at:
            continue
        place = (positions[at:end].to(torch.int64) & 0xFFFF) * 2
        pair = values.reshape(-1, 2)[at:end]
        for half in (0, 1):
            where = place + half
            good = (where < BLOCK) & (b * BLOCK + where < out.numel())
            out[b * BLOCK + where[good]] = pair[good, half]
