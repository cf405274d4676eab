"""The pointwise losses against torch's own and torch.compile: a training step, and the loss alone."""

from __future__ import annotations

import pytest

from common import DEVICE, TINY, Group

SHAPES = [(16, 96)] if TINY else [(4096, 4096), (64, 1000)] if DEVICE == "cpu" else [(8192, 32768), (64, 1000)]


@pytest.mark.parametrize("op", ["binary_cross_entropy_with_logits", "kl_div"])
@pytest.mark.parametrize("mode", ["forward+backward", "forward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_pointwise(compare, shape, dtype, mode, op):
    compare(Group(op, mode, dtype, shape, "normal"), budget=4.0)
