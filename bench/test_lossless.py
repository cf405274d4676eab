"""Lossless weights: decoding, encoding, and products and gathers on what is compressed."""

from __future__ import annotations

import pytest

from common import TINY, Group

TENSOR = (64, 256) if TINY else (8192, 4096)
PRODUCTS = [(2, 32, 128)] if TINY else [(1, 4096, 4096), *((m, 14336, 4096) for m in (1, 8, 64))]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("mode", ["p7", "p7_checked", "r8", "r8_checked"])
def test_decompress(compare, mode, dtype):
    compare(Group("decompress", mode, dtype, TENSOR, "normal"), budget=10.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", ["p7", "r8"])
def test_compress(compare, mode, dtype):
    compare(Group("compress", mode, dtype, TENSOR, "normal"), budget=10.0)


@pytest.mark.parametrize("shape", PRODUCTS, ids=lambda s: "x".join(map(str, s)))
def test_compressed_linear(compare, shape):
    compare(Group("compressed_linear", "p7", "bfloat16", shape, "normal"))


@pytest.mark.parametrize("mode", ["p7", "r8"])
def test_compressed_rows(compare, mode):
    compare(Group("compressed_rows", mode, "bfloat16", TENSOR, "normal"))
