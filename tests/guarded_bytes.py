"""Memory between pages that may not be touched: a read outside of it is a crash, not luck."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor


class Guarded:
    """Bytes with pages before and behind them that may not be touched."""

    def __init__(self, content: Tensor, at_end: bool) -> None:
        page = mmap.PAGESIZE
        pages = -(-content.numel() // page)
        self.map = mmap.mmap(-1, (pages + 2) * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.address = base + page + (pages * page - content.numel() if at_end else 0)
        ctypes.memmove(self.address, content.data_ptr(), content.numel())
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (base, base + (pages + 1) * page):
            assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
