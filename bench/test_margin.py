"""Losses of the margin cost what cross entropy costs, on logits and on a linear head."""

from __future__ import annotations

import pytest

from common import DEVICE, TINY, Group
from implementations import MARGIN_LOSSES

LOGITS = (16, 96) if TINY else (512, 128256) if DEVICE == "cpu" else (8192, 128256)
HEAD = (32, 16, 96) if TINY else (1024, 512, 32768) if DEVICE == "cpu" else (8192, 4096, 128256)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", MARGIN_LOSSES)
def test_logits(compare, loss, dtype):
    compare(Group("margin", loss, dtype, LOGITS), budget=4.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", MARGIN_LOSSES[:4])
def test_linear_head(compare, loss, dtype):
    compare(Group("margin", loss, dtype, HEAD), budget=8.0)
