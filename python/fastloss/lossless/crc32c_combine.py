"""The CRC-32C of many blocks in a row from theirs: no byte is read again."""

from __future__ import annotations

import numpy as np

from .crc32c_table import _advance_tables, _look_up, advance


def combined(crc: np.ndarray, block: int, size: int) -> int:
    """The crc32c of `size` bytes of which `crc` holds that of every `block`, a power of two; the last may be short.

    crc(AB) = advance(crc(A), len B) ^ crc(B), with the initial value and the final complement in it, too.
    """
    if not crc.size:
        return 0
    whole, last = crc[:-1].astype(np.int64), int(crc[-1])
    if not whole.size:
        return last
    # Zeros in front change nothing, so the number of blocks is made a power of two and halved until one is left.
    whole = np.concatenate((np.zeros((1 << (whole.size - 1).bit_length()) - whole.size, np.int64), whole))
    level = block.bit_length() - 1
    while whole.size > 1:
        whole = _look_up(whole[::2], _advance_tables(level)) ^ whole[1::2]
        level += 1
    return advance(int(whole[0]), size - block * (crc.size - 1)) ^ last
