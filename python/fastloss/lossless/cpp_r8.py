"""`r8_encode` of the `cpp` backend and its table (csrc/cpu/r8_encode.cpp, r8_frequencies.cpp); its decoder is part of
`lossless_decode`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend_cpp, registry
from ..compiled import _C, pointer
from ..registry import kernel
from . import contract
from .contract import SLOTS, blocks_of

_LOG2 = torch.tensor(contract.LOG2, dtype=torch.int32, device="cpu")


def frequencies(counts: Tensor) -> Tensor:
    """R8's FREQUENCIES (uint8 [256]) from the counts of bytes (int64 [256]): `contract.frequencies`, on the CPU."""
    counts = counts.cpu().contiguous()
    freq = torch.empty(SLOTS, dtype=torch.uint8, device="cpu")
    if _C is not None and registry.forced() != "reference":
        if _C.r8_frequencies_cpu(counts=pointer(counts), log2=pointer(_LOG2), frequencies=pointer(freq)):
            return freq
    return torch.from_numpy(contract.frequencies(counts.numpy()))


def why_not_encode(plane: Tensor, frequencies: Tensor, numel: int) -> str | None:
    """Why the compiled kernel cannot encode this, or None."""
    if missing := backend_cpp._missing(plane):
        return missing
    for name, t in (("plane", plane), ("frequencies", frequencies)):
        if t.dtype != torch.uint8 or t.dim() != 1:
            return f"takes a 1-D uint8 {name}, got {t.dtype} {list(t.shape)}"
    if frequencies.numel() != SLOTS or not 1 <= int(frequencies.sum()) < SLOTS:
        return f"takes {SLOTS} frequencies of sum 1 to {SLOTS - 1}, got {frequencies.numel()} of sum {int(frequencies.sum())}"
    if not 0 <= numel <= plane.numel():
        return f"takes up to {plane.numel()} bytes of this plane, got {numel}"
    return None


@kernel("r8_encode", "cpp", why_not_encode)
def r8_encode(plane: Tensor, frequencies: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """(offsets int64 [blocks + 1], data uint8) of the plane's first `numel` bytes."""
    plane, frequencies = plane.contiguous(), frequencies.cpu().contiguous()
    offsets = torch.empty(blocks_of(numel) + 1, dtype=torch.int64)
    payloads = _C.r8_encode_cpu(  # type: ignore[union-attr]
        plane=pointer(plane), frequencies=pointer(frequencies), numel=numel, offsets=pointer(offsets),
        isa=backend_cpp.ISA,
    )  # fmt: skip
    data = torch.empty(payloads.bytes(), dtype=torch.uint8)
    payloads.copy_to(pointer(data))
    return offsets, data
