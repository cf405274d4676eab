"""CRC-32C (Castagnoli, reflected polynomial 0x82F63B78) of many blocks side by side.

Without its initial value and final complement a CRC is linear over GF(2): zeros in front change nothing, and
crc(AB) = advance(crc(A), len B) ^ crc(B), where advance(c, n) runs n zero bytes through the register. So the CRCs of stripes
fold in pairs.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_STRIPE = 32
_ALL = 0xFFFFFFFF


def _byte_table() -> np.ndarray:
    crc = np.arange(256, dtype=np.int64)
    for _ in range(8):
        crc = np.where(crc & 1, crc >> 1 ^ 0x82F63B78, crc >> 1)
    return crc


_TABLE = _byte_table()
_TABLE_LIST: list[int] = _TABLE.tolist()


def _look_up(crc: np.ndarray, tables: np.ndarray) -> np.ndarray:
    return tables[0][crc & 255] ^ tables[1][crc >> 8 & 255] ^ tables[2][crc >> 16 & 255] ^ tables[3][crc >> 24]


@lru_cache(maxsize=64)
def _advance_tables(log2_bytes: int) -> np.ndarray:
    """int64 [4, 256]: advance(c, 2^log2_bytes) is the sum of four look-ups, one a byte of c."""
    ordinary = np.arange(256)[None, :] << 8 * np.arange(4)[:, None]
    if log2_bytes == 0:
        return ordinary >> 8 ^ _TABLE[ordinary & 255]
    half = _advance_tables(log2_bytes - 1)
    return _look_up(_look_up(ordinary, half), half)


def advance(crc: int, count: int) -> int:
    """The register after `count` zero bytes."""
    state = np.array(crc)
    for k in range(count.bit_length()):
        if count >> k & 1:
            state = _look_up(state, _advance_tables(k))
    return int(state)


def of_blocks(data: Tensor, block: int) -> Tensor:
    """crc32c of every `block` bytes of the 1-D uint8 tensor (the last may be short), int64."""
    size = data.numel()
    block = min(block, max(size, 1))
    whole, rest = divmod(size, block)
    parts = [_equal_blocks(data[: whole * block].reshape(whole, block))] if whole else []
    if rest:
        parts.append(_equal_blocks(data[whole * block :].reshape(1, rest)))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=data.device)


def _equal_blocks(rows: Tensor) -> Tensor:
    count, size = rows.shape
    stripes = 1 << (-(-size // _STRIPE) - 1).bit_length()
    padded = torch.nn.functional.pad(rows, (stripes * _STRIPE - size, 0)).reshape(count, stripes, _STRIPE)
    table = torch.from_numpy(_TABLE).to(rows.device)
    crc = torch.zeros((count, stripes), dtype=torch.int64, device=rows.device)
    for i in range(_STRIPE):
        crc = crc >> 8 ^ table[(crc ^ padded[:, :, i]) & 255]
    level = _STRIPE.bit_length() - 1
    while crc.shape[1] > 1:
        tables = torch.from_numpy(_advance_tables(level)).to(rows.device)
        left, right = crc[:, 0::2], crc[:, 1::2]
        for b in range(4):
            right = right ^ tables[b][left >> 8 * b & 255]
        crc, level = right, level + 1
    return crc[:, 0] ^ advance(_ALL, size) ^ _ALL


def of_bytes(data: bytes) -> int:
    """crc32c of a few bytes."""
    crc = _ALL
    for byte in data:
        crc = crc >> 8 ^ _TABLE_LIST[(crc ^ byte) & 255]
    return crc ^ _ALL
