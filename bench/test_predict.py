"""Tokens drawn from the softmax, with their log-probabilities: of logits that exist, and of a head."""

from __future__ import annotations

import pytest

from common import DEVICE, TINY, Group

ROWS = (16, 96) if TINY else (256, 128256) if DEVICE == "cpu" else (8192, 128256)
HEAD = (16, 8, 96) if TINY else (512, 512, 32768) if DEVICE == "cpu" else (8192, 4096, 128256)


@pytest.mark.parametrize("inputs", ["peaked", "normal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sample(compare, dtype, inputs):
    compare(Group("sample", "forward", dtype, ROWS, inputs), budget=6.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_sample(compare, dtype):
    compare(Group("linear_sample", "forward", dtype, HEAD), peaks=["torch"], budget=6.0)
