"""Dice of segmentation logits [B, C, H, W], forward and backward, alone and with binary cross entropy."""

from __future__ import annotations

import pytest

from common import DEVICE, TINY, Group

SHAPES = [(2, 2, 8, 9)] if TINY else [(8, 4, 512, 512)] if DEVICE == "cpu" else [(32, 19, 512, 1024)]


@pytest.mark.parametrize("mode", ["dice", "combo"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_region(compare, shape, dtype, mode):
    compare(Group("region", mode, dtype, shape), budget=6.0)
