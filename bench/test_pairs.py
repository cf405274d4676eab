"""CLIP's loss without the similarity matrix, against open_clip's formula, torch.compile of it and the four GEMMs alone."""

from __future__ import annotations

import pytest

from common import DEVICE, TINY, Group
from implementations import build
from memory import peak_bytes

SHAPES = [(64, 16)] if TINY else [(8192, 256), (4096, 768)] if DEVICE == "cpu" else [(32768, 256), (16384, 768)]
LARGE = (256, 16) if TINY else (65536, 256)
EXTRA_BYTES = 1 << 30


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_backward(compare, shape, dtype):
    compare(Group("clip", "forward+backward", dtype, shape), budget=30.0, peaks=("torch", "torch_compile"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_of_65536(benchmark, dtype):
    """Minutes on a CPU: 17 GB of similarities in float32, in a gigabyte beyond the gradients. Only our own memory and time."""
    group = Group("clip", "forward+backward", dtype, LARGE)
    case = build(group)
    benchmark.group = group.name
    benchmark.pedantic(case.calls[case.ours], rounds=1, iterations=1)
    if benchmark.enabled:
        extra = max(0, peak_bytes(group, case.ours) - case.gradient_bytes)
        benchmark.extra_info.update(extra_bytes=extra, logits_bytes=case.logits_bytes, tiny=TINY)
        assert extra < EXTRA_BYTES, f"{extra / 2**20:.0f} MiB beyond the gradients"
