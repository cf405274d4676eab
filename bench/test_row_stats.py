"""The row kernel by itself, each mode against a copy of the same bytes, and a user's own loss on top of it."""

from __future__ import annotations

import pytest

from common import DEVICE, TINY, Group

SHAPES = [(16, 96)] if TINY else [(512, 128256)] if DEVICE == "cpu" else [(8192, 128256), (4096, 32000)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.mark.parametrize("mode", ["stats", "entropy", "gradient", "both"])
@each_dtype
@each_shape
def test_mode(compare, shape, dtype, mode):
    compare(Group("row_stats", mode, dtype, shape), budget=4.0)


@each_dtype
@each_shape
def test_focal(compare, shape, dtype):
    compare(Group("focal", "forward+backward", dtype, shape), budget=6.0)
