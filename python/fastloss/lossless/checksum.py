"""CRC-32C by the fastest backend: of a tensor's bytes, and of a few bytes."""

from __future__ import annotations

from torch import Tensor

from .. import backend_cpp, registry
from ..compiled import _C, pointer
from . import crc32c_table


def of(part: Tensor) -> int:
    """crc32c of a 1-D uint8 tensor."""
    count = part.numel()
    if not count:
        return 0
    if registry.choose("crc32c", part, count) == "cpp":  # without a tensor for the one number
        part = part.contiguous()
        return int(_C.crc32c_of_cpu(data=pointer(part), bytes=count, isa=backend_cpp.ISA))  # type: ignore[union-attr]
    return int(registry.run("crc32c", part, count)[0])


def of_bytes(data: bytes) -> int:
    """crc32c of a few bytes."""
    if _C is None or registry.forced() == "reference":
        return crc32c_table.of_bytes(data)
    return int(_C.crc32c_of_bytes_cpu(data, isa=backend_cpp.ISA))


def of_blocks(part: Tensor, block: int) -> Tensor:
    """crc32c of every `block` bytes (int64)."""
    return registry.run("crc32c", part, block)
