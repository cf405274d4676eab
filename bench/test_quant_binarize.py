"""Signs with the gradients of surrogates, and packed bits, against eager PyTorch and torch.compile."""

from __future__ import annotations

import pytest

from common import DEVICE, TINY, Group

SHAPES = [(16, 96)] if TINY else [(4096, 4096), (16, 64)] if DEVICE == "cpu" else [(8192, 8192), (64, 1024)]


@pytest.mark.parametrize("mode", ["clip", "reste", "reste u8", "approx", "swish", "fda", "biper"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_binarize(compare, shape, dtype, mode):
    compare(Group("binarize", mode, dtype, shape, "normal"), budget=4.0)


@pytest.mark.parametrize("mode", ["pack", "back"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_pack_bits(compare, shape, dtype, mode):
    compare(Group("pack_bits", mode, dtype, shape, "normal"), budget=2.0)
