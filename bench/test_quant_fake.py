"""LSQ against eager PyTorch, torch.compile and torch's own operator; activations saved as 8 bits."""

from __future__ import annotations

import pytest

from common import DEVICE, TINY, Group

SHAPES = [(16, 96)] if TINY else [(4096, 4096)] if DEVICE == "cpu" else [(16384, 8192)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_fake_quant(compare, shape, dtype):
    compare(Group("fake_quant", "forward+backward", dtype, shape, "normal"), budget=6.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_saved_gelu(compare, shape, dtype):
    compare(Group("saved_gelu", "forward+backward", dtype, shape, "normal"), budget=4.0)


@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_codec(compare, shape, mode):
    compare(Group("activation_codec", mode, "float32", shape, "normal"), budget=4.0)
