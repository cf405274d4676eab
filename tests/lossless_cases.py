"""Numbers that lossless compression must survive, shared by the tests of all backends."""

from __future__ import annotations

import torch
from torch import Tensor

#: Around a group (128), a vector (64), a block (16,384).
SIZES = (1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 4095, 16383, 16384, 16385, 32769, 50001)
CODED = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor: two tensors are the same when these are."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def normal(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Weights as they come: normal numbers of scale 0.02, for fp8 of scale 16."""
    generator = torch.Generator().manual_seed(seed)
    scale = 16 if dtype.itemsize == 1 else 0.02
    return (torch.randn(count, generator=generator) * scale).to(dtype)


def uniform_bits(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bit pattern, each as likely as any other: NaN payloads, infinities, denormals."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def every_pattern(dtype: torch.dtype) -> Tensor:
    """All patterns of an 8- or 16-bit dtype."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def mostly_normal(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Weights with one pattern in sixteen uniform: many escapes, and still smaller when coded."""
    x, odd = normal(count, dtype, seed), uniform_bits(count, dtype, seed + 1)
    pick = torch.rand(count, generator=torch.Generator().manual_seed(seed + 2)) < 1 / 16
    integer = INTEGERS[dtype.itemsize]
    return torch.where(pick, odd.view(integer), x.view(integer)).view(dtype)


def constant(count: int, dtype: torch.dtype) -> Tensor:
    """One value throughout."""
    return torch.full((count,), 0.75).to(dtype)
