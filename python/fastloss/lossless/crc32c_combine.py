"""The CRC-32C of many blocks in a row from theirs: no byte is read again.

Appending n zero bytes to a message maps its checksum linearly over GF(2), and crc(A B) = Z(crc(A)) xor crc(B) with Z the map of
len(B) zero bytes. A map is 32 columns; one of twice the length is the map applied to its own columns.
"""

from __future__ import annotations

import numpy as np

from .crc32c_table import of_bytes


def _apply(columns: np.ndarray, crc: np.ndarray) -> np.ndarray:
    out = np.zeros_like(crc)
    for bit in range(32):
        out ^= np.where(crc >> np.uint32(bit) & np.uint32(1), columns[bit], np.uint32(0))
    return out


def _one_byte() -> np.ndarray:
    # of_bytes(a byte) = T[byte ^ 255] ^ 0x00FFFFFF ^ 0xFFFFFFFF; the map of one zero byte is x >> 8 ^ T[x & 255].
    table = [of_bytes(bytes([i ^ 255])) ^ 0xFF000000 for i in range(256)]
    return np.array([(1 << bit) >> 8 ^ table[(1 << bit) & 255] for bit in range(32)], dtype=np.uint32)


def _zeros(count: int) -> np.ndarray:
    """The map of `count` zero bytes."""
    columns = np.uint32(1) << np.arange(32, dtype=np.uint32)
    power = _one_byte()
    while count:
        if count & 1:
            columns = _apply(power, columns)
        power = _apply(power, power)
        count >>= 1
    return columns


def combined(crc: np.ndarray, block: int, size: int) -> int:
    """The crc32c of `size` bytes of which `crc` (uint32) holds that of every `block`; the last may be short."""
    if not crc.size:
        return 0
    crc = crc.astype(np.uint32)
    whole, last = crc[:-1], crc[-1:]
    if not whole.size:
        return int(last[0])
    # Zeros in front change nothing, so the number of blocks may be made a power of two and halved until one is left.
    whole = np.concatenate((np.zeros((1 << (whole.size - 1).bit_length()) - whole.size, np.uint32), whole))
    columns = _zeros(block)
    while whole.size > 1:
        whole = _apply(columns, whole[::2]) ^ whole[1::2]
        columns = _apply(columns, columns)
    return int((_apply(_zeros(size - block * (crc.size - 1)), whole) ^ last)[0])
