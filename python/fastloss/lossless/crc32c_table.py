"""CRC-32C (Castagnoli, reflected polynomial 0x82F63B78) with a table, many blocks side by side."""

from __future__ import annotations

import torch
from torch import Tensor


def _table() -> list[int]:
    table = []
    for i in range(256):
        for _ in range(8):
            i = i >> 1 ^ (0x82F63B78 if i & 1 else 0)
        table.append(i)
    return table


_TABLE = _table()


def of_blocks(data: Tensor, block: int) -> Tensor:
    """crc32c of every `block` bytes of the 1-D uint8 tensor (the last may be short), int64."""
    table = torch.tensor(_TABLE, device=data.device)
    size = data.numel()
    count = -(-size // block)
    lengths = (size - torch.arange(count, device=data.device) * block).clamp(max=block)
    rows = torch.nn.functional.pad(data, (0, count * block - size)).reshape(count, block).to(torch.int64)
    crc = torch.full((count,), 0xFFFFFFFF, dtype=torch.int64, device=data.device)
    for i in range(block if count > 1 else size):
        step = crc >> 8 ^ table[(crc ^ rows[:, i]) & 255]
        crc = torch.where(lengths > i, step, crc)
    return crc ^ 0xFFFFFFFF


def of_bytes(data: bytes) -> int:
    """crc32c of a few bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF
