"""Products of bits against torch's in bf16, fp32 and int8, and the nearest codes of a database against fp32 and topk."""

from __future__ import annotations

import pytest

from common import TINY, Group

SHAPES = [(32, 48, 64)] if TINY else [(4096, 4096, 4096), (64, 4096, 4096), (1, 4096, 4096), (1024, 1024, 1024)]
SEARCHES = [(4, 100, 64)] if TINY else [(1, 1_000_000, 512), (64, 1_000_000, 512)]
MANY_QUERIES = (8, 100, 64) if TINY else (1000, 1_000_000, 512)


@pytest.mark.parametrize("dtype", ["int32", "bfloat16"])
@pytest.mark.parametrize("mode", ["binary", "two_bits"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_bgemm(compare, shape, mode, dtype):
    compare(Group("bgemm", mode, dtype, shape, "normal"), budget=10.0)


@pytest.mark.parametrize("shape", SEARCHES, ids=lambda s: "x".join(map(str, s)))
def test_hamming_topk(compare, shape):
    compare(Group("hamming_topk", "forward", "int32", shape, "normal"), budget=15.0)


@pytest.mark.slow
def test_a_thousand_queries(compare):
    """4 GB of fp32 scores for torch."""
    compare(Group("hamming_topk", "forward", "int32", MANY_QUERIES, "normal"), budget=15.0)
