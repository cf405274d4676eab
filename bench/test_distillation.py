"""Distillation from a teacher's head without either matrix of logits, against its four GEMMs alone, torch and torch.compile."""

from __future__ import annotations

import pytest

from common import DEVICE, TINY, Group

SHAPES = [(32, 16, 96)] if TINY else [(2048, 512, 32768)] if DEVICE == "cpu" else [(8192, 4096, 128256)]
CASES = [("forward_kl", "bfloat16"), ("jensen_shannon", "bfloat16"), ("forward_kl", "float32")]


@pytest.mark.parametrize("loss, dtype", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_backward(compare, shape, loss, dtype):
    group = Group("distillation", loss, dtype, shape)
    compare(group, budget=20.0, peaks=("torch", "torch_compile") if dtype == "bfloat16" else ())
