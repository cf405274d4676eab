"""The `.safetensors` container: written in one fixed form, read by the `safetensors` package.

The package writes metadata in the order of a hash table, so two files of one model differ, and aligns to 8 bytes. Here the same
tensors give the same bytes, the data begins at a multiple of 64, and tensors come in falling order of alignment, blobs first.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from . import checksum
from .errors import CorruptError

#: The names of dtypes in a .safetensors header. Numbers of other dtypes exist as blobs only.
NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
#: Dtypes that only recent releases of the package know: in compressed files they are blobs, so that any release opens these.
RECENT = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
#: Where the data of a compressed file begins, and its blobs; the package aligns to ORDINARY_ALIGNMENT.
ALIGNMENT, ORDINARY_ALIGNMENT = 64, 8
#: The package's order of dtypes.
_RANKS = {
    name: rank
    for rank, name in enumerate(
        "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64".split()
    )
}


class Stored(NamedTuple):
    """A tensor as the container holds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def can_be_plain(dtype: torch.dtype) -> bool:
    """Whether a compressed file may hold numbers of this dtype as they are."""
    return dtype in NAMES and dtype not in RECENT


def compact(value: Any) -> str:
    """JSON without a superfluous byte."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def ordered(stored: Iterable[Stored]) -> list[Stored]:
    """The order in which tensors are written: what wants to be aligned most first, and bytes in blobs (of 64 n) before all."""

    def alignment(entry: Stored) -> int:
        is_blob = entry.dtype == torch.uint8 and entry.nbytes % ALIGNMENT == 0
        return ALIGNMENT if is_blob else entry.dtype.itemsize

    return sorted(stored, key=alignment, reverse=True)


def ordinary(stored: Iterable[Stored]) -> list[Stored]:
    """The order in which the package writes tensors: falling dtypes, then rising names."""
    return sorted(
        sorted(stored, key=lambda entry: entry.name.encode()), key=lambda e: _RANKS[NAMES[e.dtype]], reverse=True
    )


def write(
    file: BinaryIO,
    stored: list[Stored],
    metadata: Mapping[str, str],
    content: Iterable[Tensor],
    alignment: int = ALIGNMENT,
) -> int:
    """Write a container of `stored`, in this order, whose tensors `content` yields one by one; the bytes written.

    The data begins at a multiple of `alignment` bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for entry in stored:
        header[entry.name] = {
            "dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, at + entry.nbytes]
        }  # fmt: skip
        at += entry.nbytes
    head = compact(header).encode()
    head += b" " * (-(8 + len(head)) % alignment)
    file.write(len(head).to_bytes(8, "little") + head)
    for entry, tensor in zip(stored, content, strict=True):
        raw = raw_bytes(tensor)
        if raw.numel() != entry.nbytes:
            raise RuntimeError(f"tensor {entry.name!r} has {raw.numel()} bytes where {entry.nbytes} were announced")
        file.write(raw.numpy().data)
    return 8 + len(head) + at


def raw_bytes(tensor: Tensor) -> Tensor:
    """The bytes of the numbers in row-major order, on the CPU (1-D uint8)."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def canonical_checksum(stored: Iterable[tuple[str, str, list[int]]], metadata: Mapping[str, str]) -> int:
    """crc32c of what a header means: (name, dtype, shape) of every tensor and all metadata, in sorted order."""
    text = json.dumps([sorted(stored), sorted(metadata.items())], separators=(",", ":"))
    return checksum.of(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))


def package() -> Any:
    """The `safetensors` package, or an ImportError that says how to get it."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "compressed files are .safetensors files: pip install 'fastloss[lossless]' (or safetensors itself)"
        ) from error
    return safetensors


def open_container(path: str | os.PathLike[str], device: str | int = "cpu") -> Any:
    """`safetensors.safe_open` of a file. Raises CorruptError for what is not a .safetensors file, or no whole one."""
    safetensors = package()
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    try:
        return safetensors.safe_open(os.fspath(path), framework="pt", device=device)
    except safetensors.SafetensorError as error:
        raise CorruptError(f"{os.fspath(path)} is damaged, or no .safetensors file: {error}") from None
