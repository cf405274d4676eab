"""A small dense layer and its compressed twin, shared by the tests of layers over compressed weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastloss.lossless import CompressedLinear
from lossless_cases import bits

ROWS, COLUMNS = 48, 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def matrix(dtype: torch.dtype = torch.float32, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


def same(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.equal(bits(a), bits(b))


def pair(dtype: torch.dtype = torch.float32, bias: bool = True, **options: Any) -> tuple[nn.Linear, CompressedLinear]:
    torch.manual_seed(1)
    dense = nn.Linear(COLUMNS, ROWS, bias=bias, dtype=dtype)
    return dense, CompressedLinear.from_linear(copy.deepcopy(dense), **options)
