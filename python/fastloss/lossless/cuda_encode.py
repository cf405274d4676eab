"""Encoders of the `cuda` backend (csrc/cuda: p7_encode.cu, r8_encode.cu). They wait once, for the size of the result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend_cuda
from ..compiled import _C, pointer
from ..registry import kernel
from .contract import NUMBERS, P7_NUMBERS, SLOTS, SPLITS, blocks_of, padded
from .cuda_codec import aligned, place


def _why_not(x: Tensor, *args: Any) -> str | None:
    return backend_cuda._missing(x)


def _why_not_p7(x: Tensor, *args: Any) -> str | None:
    if NUMBERS.get(x.dtype) not in P7_NUMBERS:
        return f"P7 takes bfloat16, float16 and float32, got {x.dtype}"
    return backend_cuda._missing(x)


def _why_not_split(x: Tensor) -> str | None:
    if x.dtype not in NUMBERS:
        return f"splits {', '.join(str(d) for d in NUMBERS)}, got {x.dtype}"
    return backend_cuda._missing(x)


def _planes(x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Room for byte planes and bit planes."""
    split, whole = SPLITS[NUMBERS[x.dtype]], padded(x.numel())
    planes = [torch.empty(whole, dtype=torch.uint8, device=x.device) for _ in range(split.byte_planes)]
    return planes, torch.empty(whole // 8 * split.bit_planes, dtype=torch.uint8, device=x.device)


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


@kernel("p7_histogram", "cuda", _why_not_p7)
def p7_histogram(x: Tensor) -> Tensor:
    """How often each pair of fields occurs (int64 [65536]), over the pairs that begin inside the 1-D tensor."""
    x, counts = aligned(x), torch.zeros(65536, dtype=torch.int64, device=x.device)
    _C.p7_histogram_cuda(  # type: ignore[union-attr]
        numbers=pointer(x), numel=x.numel(), number=int(NUMBERS[x.dtype]), counts=pointer(counts), **place(x)
    )
    return counts


@kernel("p7_encode", "cuda", _why_not_p7)
def p7_encode(x: Tensor, table: Tensor) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """(codes, byte planes, bit planes, escape offsets int64, positions int16, values [2 a pair]) of the 1-D `x`."""
    x, numel, device = aligned(x), x.numel(), x.device
    table = table.to(device).contiguous()
    number = {"numbers": pointer(x), "numel": numel, "number": int(NUMBERS[x.dtype])}
    planes, bits = _planes(x)
    codes = torch.empty(padded(numel) // 128 * 56, dtype=torch.uint8, device=device)
    codes_of = torch.empty(65536, dtype=torch.uint8, device=device)
    counts = torch.empty(blocks_of(numel), dtype=torch.int64, device=device)
    _C.p7_encode_cuda(  # type: ignore[union-attr]
        **number, table=pointer(table), codes_of=pointer(codes_of), codes=pointer(codes),
        bytes=[pointer(p) for p in planes], bits=pointer(bits), escapes=pointer(counts), **place(x),
    )  # fmt: skip
    offsets = _offsets(counts)
    count = int(offsets[-1])
    positions = torch.empty(count, dtype=torch.int16, device=device)
    values = torch.empty(2 * count, dtype=x.dtype, device=device)
    if count:
        _C.p7_escapes_cuda(  # type: ignore[union-attr]
            **number, codes=pointer(codes), offsets=pointer(offsets), positions=pointer(positions),
            values=pointer(values), **place(x),
        )  # fmt: skip
    return codes, planes, bits, offsets, positions, values


@kernel("byte_split", "cuda", _why_not_split)
def byte_split(x: Tensor) -> tuple[list[Tensor], Tensor]:
    """([field, byte plane 0, ...] padded, the bit planes' section) of the 1-D `x`."""
    x = aligned(x)
    planes, bits = _planes(x)
    field = torch.empty(padded(x.numel()), dtype=torch.uint8, device=x.device)
    _C.byte_split_cuda(  # type: ignore[union-attr]
        numbers=pointer(x), numel=x.numel(), number=int(NUMBERS[x.dtype]), field=pointer(field),
        bytes=[pointer(p) for p in planes], bits=pointer(bits), **place(x),
    )  # fmt: skip
    return [field, *planes], bits


@kernel("byte_histogram", "cuda", _why_not)
def byte_histogram(plane: Tensor, numel: int) -> Tensor:
    """How often each byte occurs (int64 [256]) among the first `numel`."""
    plane, counts = _whole(plane, numel), torch.zeros(SLOTS, dtype=torch.int64, device=plane.device)
    _C.byte_histogram_cuda(  # type: ignore[union-attr]
        plane=pointer(plane), numel=numel, counts=pointer(counts), **place(plane)
    )
    return counts


def _whole(plane: Tensor, numel: int) -> Tensor:
    """The plane, at least as long as its last group: kernels read eight bytes at a time."""
    missing = padded(numel) - plane.numel()
    return aligned(torch.nn.functional.pad(plane, (0, missing)) if missing > 0 else plane)


@kernel("r8_encode", "cuda", _why_not)
def r8_encode(plane: Tensor, frequencies: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """(offsets int64 [blocks + 1], data uint8) of the plane's first `numel` bytes. Scratch: two bytes a number."""
    plane, blocks, device = _whole(plane, numel), blocks_of(numel), plane.device
    frequencies = aligned(frequencies.to(device))
    scratch = torch.empty(blocks * _C.R8_SCRATCH, dtype=torch.uint8, device=device)  # type: ignore[union-attr]
    lengths = torch.empty(blocks, dtype=torch.int64, device=device)
    literals = torch.empty(blocks, dtype=torch.int32, device=device)
    _C.r8_encode_cuda(  # type: ignore[union-attr]
        plane=pointer(plane), numel=numel, frequencies=pointer(frequencies), scratch=pointer(scratch),
        lengths=pointer(lengths), literals=pointer(literals), **place(plane),
    )  # fmt: skip
    offsets = _offsets(lengths)
    data = torch.empty(int(offsets[-1]), dtype=torch.uint8, device=device)
    _C.r8_move_cuda(  # type: ignore[union-attr]
        scratch=pointer(scratch), numel=numel, literals=pointer(literals), offsets=pointer(offsets), data=pointer(data),
        **place(plane),
    )  # fmt: skip
    return offsets, data
