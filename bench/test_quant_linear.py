"""Layers on packed weights: decoding and larger batches against torch's linear, training against eager and compiled STE."""

from __future__ import annotations

import pytest

from common import TINY, Group

WIDE = (256, 64) if TINY else (4096, 4096)
TRAINED = [(16, 96, 64)] if TINY else [(512, 2048, 2048), (2048, 2048, 2048)]


@pytest.mark.parametrize("bits", ["1", "1.58", "2", "4", "4g", "1.58 int8"])
@pytest.mark.parametrize("rows", [1, 8, 64, 512])
def test_packed_weights(compare, rows, bits):
    compare(Group("lowbit_linear", bits, "float32", (rows, *WIDE), "normal"), budget=3.0)


@pytest.mark.parametrize("bits", ["1", "4"])
@pytest.mark.parametrize("rows", [1, 512])
def test_packed_weights_bfloat16(compare, rows, bits):
    compare(Group("lowbit_linear", bits, "bfloat16", (rows, *WIDE), "normal"), budget=3.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_binary_inference(compare, dtype):
    compare(Group("binary_inference", "forward", dtype, (64, *WIDE), "normal"), budget=3.0)


@pytest.mark.parametrize("layer", ["binary", "ternary"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", TRAINED, ids=lambda s: "x".join(map(str, s)))
def test_training(compare, shape, dtype, layer):
    compare(Group("quantised_training", layer, dtype, shape, "normal"), budget=8.0)
