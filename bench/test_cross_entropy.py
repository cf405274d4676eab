"""Cross entropy of logits that exist: forward and backward, on memory as it comes and on memory touched before."""

from __future__ import annotations

import pytest

from common import DEVICE, TINY, Group

SHAPES = [(16, 96)] if TINY else [(512, 128256)] if DEVICE == "cpu" else [(8192, 128256), (4096, 32000)]


@pytest.mark.parametrize("inputs", ["peaked", "normal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_backward(compare, shape, dtype, inputs):
    group = Group("cross_entropy", "forward+backward", dtype, shape, inputs)
    main = inputs == "peaked"
    compare(group, warm=True, peaks=("torch", "torch_compile") if main else ())
