"""Blobs for the tests of the Triton backend's lossless ops, and how its ops are run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastloss
import lossless_cases as cases
from fastloss import lossless
from fastloss.lossless import header
from fastloss.lossless.compress import _crc, _p7, _r8
from fastloss.lossless.contract import Codec, Layout, Section
from fastloss.lossless.tiles import to_tiles

OPS = torch.ops.fastloss
P7, R8 = Codec.P7, Codec.R8


def run(op: str, *args: Any, backend: str = "triton") -> Any:
    with fastloss.use_backend(backend):
        return fastloss.registry.run(op, *args) if op == "lossless_decode_checked" else getattr(OPS, op)(*args)


def packed(x: Tensor, codec: Codec, layout: Layout = Layout.ROWS) -> lossless.CompressedTensor:
    """The blob of a codec, though it be larger than raw."""
    with fastloss.use_backend("reference"):
        flat = x.reshape(-1)
        if layout == Layout.TILES:
            flat = to_tiles(flat.view(cases.INTEGERS[x.element_size()]), x.shape[1]).view(x.dtype)
        parts = (_p7 if codec == P7 else _r8)(flat, x.dim())[0]
        parts[Section.BLOCK_CRC] = _crc(flat)
        return lossless.CompressedTensor(*header.build(codec, layout, x.dtype, x.shape, parts))


def decoded(c: lossless.CompressedTensor, first: int = 0, count: int | None = None) -> Tensor:
    return run("lossless_decode", c.blob, c.plan, first, c.numel() - first if count is None else count, c.dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(cases.bits(a), cases.bits(b))


def sparse(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix of weights of which one in 50 is large and one in 50 is zero: some hundred escapes."""
    w = cases.normal(rows * columns, torch.float32, 5)
    pick = torch.rand(w.shape, generator=torch.Generator().manual_seed(6))
    return torch.where(pick < 0.02, 300 * w, torch.where(pick > 0.98, 0, w)).to(dtype).reshape(rows, columns)
