"""Cross entropy of a linear head without its logits, against the three GEMMs alone and everyone who does the same."""

from __future__ import annotations

import pytest

from common import DEVICE, TINY, Group

SHAPES = (
    [(32, 16, 96)] if TINY else [(2048, 512, 32768)] if DEVICE == "cpu" else [(8192, 4096, 128256), (8192, 2048, 32000)]
)
CASES = [("bfloat16", "peaked"), ("bfloat16", "normal"), ("float32", "peaked")]


@pytest.mark.parametrize("dtype, inputs", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_backward(compare, shape, dtype, inputs):
    group = Group("linear_cross_entropy", "forward+backward", dtype, shape, inputs)
    main = inputs == "peaked"
    compare(group, budget=20.0, peaks=("torch", "torch_compile", "torch_chunked") if main else ())
