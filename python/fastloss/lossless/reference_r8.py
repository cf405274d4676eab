"""R8 in plain PyTorch: 32 interleaved rANS states of 16 bits a block, 8-bit probabilities, an escape."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import kernel
from .contract import BLOCK, LANES, NUMBERS, SLOTS, blocks_of, padded
from .reference_split import split, words

_STATES = 2 * LANES
_STEPS = BLOCK // LANES


@kernel("byte_split", "reference")
def byte_split(x: Tensor) -> tuple[list[Tensor], Tensor]:
    """([field, byte plane 0, ...] padded, the bit planes' section) of the 1-D `x`."""
    field, planes, section = split(words(x, NUMBERS[x.dtype]), NUMBERS[x.dtype])
    return [field, *planes], section


@kernel("byte_histogram", "reference")
def byte_histogram(plane: Tensor, numel: int) -> Tensor:
    """How often each byte occurs (int64 [256]) among the first `numel`."""
    return torch.bincount(plane[:numel], minlength=SLOTS)


def _slots(frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """(slots, first slot) of the 256 bytes and, last, of the escape; int64."""
    f = frequencies.to(torch.int64)
    f = torch.cat((f, (SLOTS - f.sum()).clamp(min=0)[None]))
    return f, f.cumsum(0) - f


def _blocks(plane: Tensor, numel: int) -> Tensor:
    """[blocks, steps, lanes] of the padded plane, with zeros where a block has no number."""
    blocks = blocks_of(numel)
    whole = torch.zeros(blocks * BLOCK, dtype=torch.int64, device=plane.device)
    whole[:numel] = plane[:numel].to(torch.int64)
    return whole.reshape(blocks, _STEPS, LANES)


def _steps(numel: int, device: torch.device) -> Tensor:
    """How many steps each block has."""
    first = torch.arange(blocks_of(numel), device=device) * BLOCK
    return ((numel - first).clamp(max=BLOCK) + LANES - 1) // LANES


@kernel("r8_encode", "reference")
def r8_encode(plane: Tensor, frequencies: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """(offsets int64 [blocks + 1], data uint8) of the plane's first `numel` bytes."""
    device = plane.device
    f, start = _slots(frequencies.to(device))
    bytes_ = _blocks(plane, numel)
    symbol = torch.where(f[bytes_] > 0, bytes_, SLOTS)
    steps = _steps(numel, device)
    blocks = steps.numel()
    state = torch.full((blocks, LANES), 256, dtype=torch.int64, device=device)
    emitted = torch.zeros((blocks, _STEPS, LANES), dtype=torch.int64, device=device)
    written = torch.zeros((blocks, _STEPS, LANES), dtype=torch.bool, device=device)
    for i in range(_STEPS - 1, -1, -1):
        live = (steps > i)[:, None]
        s = symbol[:, i]
        full = live & (state >= f[s] << 8)
        emitted[:, i], written[:, i] = state & 255, full
        state = torch.where(full, state >> 8, state)
        state = torch.where(live, (state // f[s].clamp(min=1) << 8) + state % f[s].clamp(min=1) + start[s], state)
    pieces, lengths = [], []
    live = torch.arange(_STEPS, device=device) < steps[:, None]
    escaped = (symbol == SLOTS) & live[:, :, None]
    for b in range(blocks):
        payload = torch.cat((
            torch.stack((state[b] & 255, state[b] >> 8), 1).reshape(-1),
            emitted[b][written[b]],
            bytes_[b][escaped[b]].flip(0),
        ))  # fmt: skip
        pieces.append(payload.to(torch.uint8))
        lengths.append(payload.numel())
    offsets = torch.tensor([0, *lengths], dtype=torch.int64, device=device).cumsum(0)
    return offsets, torch.cat(pieces) if pieces else plane[:0]


def r8_decode(frequencies: Tensor, offsets: Tensor, data: Tensor, numel: int, first: int, last: int) -> Tensor:
    """The bytes (uint8) of blocks first..last; whatever the stream holds, nothing outside it is read."""
    device = data.device
    f, start = _slots(frequencies)
    f = f.clamp(max=SLOTS)
    slot_symbol = torch.repeat_interleave(torch.arange(SLOTS + 1, device=device), f)[:SLOTS]
    slot_symbol = torch.nn.functional.pad(slot_symbol, (0, SLOTS - slot_symbol.numel()), value=SLOTS)
    size = data.numel()
    data = torch.nn.functional.pad(data, (0, _STATES + LANES)).to(torch.int64)
    begin = offsets[first:last].clamp(0, size)
    end = torch.maximum(offsets[first + 1 : last + 1].clamp(0, size), begin)
    lanes = torch.arange(LANES, device=device)
    state = data[begin[:, None] + 2 * lanes] | data[begin[:, None] + 2 * lanes + 1] << 8
    cursor = torch.minimum(begin + _STATES, end)
    literal = end.clone()
    steps = _steps(numel, device)[first:last]
    out = torch.zeros((last - first, _STEPS, LANES), dtype=torch.int64, device=device)
    for i in range(_STEPS):
        live = (steps > i)[:, None]
        slot = state & 255
        symbol = slot_symbol[slot]
        escape = (symbol == SLOTS) & live
        back = literal[:, None] - escape.to(torch.int64).cumsum(1)
        out[:, i] = torch.where(escape, data[torch.maximum(back, begin[:, None])], symbol)
        literal = torch.maximum(literal - escape.sum(1), begin)
        after = f[symbol] * (state >> 8) + slot - start[symbol]
        need = (after < 256) & live
        place = cursor[:, None] + need.to(torch.int64).cumsum(1) - 1
        after = torch.where(need, (after & 255) << 8 | data[torch.minimum(place, end[:, None])], after) & 0xFFFF
        state = torch.where(live, after, state)
        cursor = torch.minimum(cursor + need.sum(1), end)
    flat = out.to(torch.uint8).reshape(-1)
    return flat[: padded(numel) - first * BLOCK]
