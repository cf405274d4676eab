"""The bit ops on a GPU: every op of every backend against the reference, both engines of the products, streams, graphs."""

from __future__ import annotations

import os

import pytest
import torch

import fastloss
from bit_cases import KINDS
from fastloss.quant import cuda_bgemm, selftest
from gpu_quant_checks import OPS, SHAPES, check_bgemm, check_every_op, check_hamming_topk, epilogue, operands, to

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Bits and int8, tiles of each size (csrc/cuda/bit_products.h), and what the device wants.
PLANS = (-1, 0, 1, 2, 4, 5, 6)


def first_backend(op: str) -> str | None:
    """The backend that a CUDA tensor gets, which is not the reference."""
    names = [b for b in fastloss.registry.ORDER["cuda"] if b != "reference" and b in fastloss.registry.backends(op)]
    return names[0] if names else None


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One of the kernels of a product."""
    if request.param in (0, 1, 2) and torch.cuda.get_device_capability()[0] >= 10:
        pytest.skip("no tensor cores for bits from sm_100 on")
    if request.param % 4 == 2 and torch.cuda.get_device_properties(0).shared_memory_per_block_optin < 160 << 10:
        pytest.skip("no room for the largest tiles")
    monkeypatch.setattr(cuda_bgemm, "PLAN", request.param)
    return int(request.param)


def test_every_op_has_a_kernel() -> None:
    assert not os.environ.get("FASTLOSS_GPU_STRICT") or fastloss.compiled._C is not None
    x, w = torch.randn(7, 100, device="cuda"), torch.randn(9, 100, device="cuda")
    chosen = {op: fastloss.registry.choose(op, *selftest.arguments(op, x, w)) for op in selftest.OPS}
    assert all(chosen[op] == "cuda" for op in ("bgemm", "bgemm_signs", "hamming_topk")), chosen
    assert all(chosen[op] != "reference" for op in chosen if op != "nearest_key"), chosen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bgemm_shapes(shape: tuple[int, int, int], plan: int) -> None:
    check_bgemm("cuda", "cuda", shape)


@pytest.mark.parametrize("a", list(KINDS))
def test_bgemm_kinds(a: str, plan: int) -> None:
    for b in KINDS:
        check_bgemm("cuda", "cuda", (40, 70, 600), a, b)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 20000, 512), (200, 5000, 64)], ids=str)
def test_hamming_topk(shape: tuple[int, int, int], plan: int) -> None:
    check_hamming_topk("cuda", "cuda", shape)
    check_hamming_topk("cuda", "cuda", shape, "ternary", "2 bits")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 77), (33, 513), (130, 1100)], ids=str)
def test_every_op(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert check_every_op(first_backend, "cuda", *shape, dtype) > 50


def test_large_product(plan: int) -> None:
    """4096 x 4096 x 4096: rows at the start, in the middle and at the end against the reference."""
    product = to("cuda", operands(4096, 4096, 4096))
    at = torch.tensor([0, 1, 63, 64, 127, 128, 2047, 4094, 4095], device="cuda")
    rows = (product[0][:, at].contiguous(), product[1][:, at].contiguous(), *product[2:])
    with fastloss.use_backend("reference"):
        want = OPS.bgemm(*rows, None, None, None, 0, torch.int32)
    with fastloss.use_backend("cuda"):
        assert torch.equal(OPS.bgemm(*product, None, None, None, 0, torch.int32)[at], want)


def test_search_of_a_million(plan: int) -> None:
    """64 queries among a million codes of 512 bits, without a matrix of them."""
    planes = torch.randint(0, 256, (1, 1 << 20, 64), dtype=torch.uint8, device="cuda")
    bits = torch.arange(8, device="cuda", dtype=torch.uint8)
    counts = sum((planes >> b & 1).sum(-1, dtype=torch.int32) for b in bits)
    queries, at = planes[:, :64].contiguous(), counts[:, :64].contiguous()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with fastloss.use_backend("cuda"):
        values, index = OPS.hamming_topk(queries, at, planes, counts, 512, [2], -1, [2], -1, None, 10)
    assert torch.cuda.max_memory_allocated() - before < 32 << 20
    assert torch.equal(index[:, 0].cpu(), torch.arange(64)) and bool((values[:, 0] == 512).all())
    few = torch.tensor([0, 31, 63], device="cuda")
    for query, best, where in zip(queries[0, few], values[few], index[few], strict=True):
        differing = sum(((planes[0] ^ query) >> b & 1).sum(-1, dtype=torch.int32) for b in bits)
        right = torch.sort(512 - 2 * differing, descending=True, stable=True)
        assert torch.equal(best, right.values[:10]) and torch.equal(where, right.indices[:10])


def test_no_host_sync_and_graph() -> None:
    """No call waits for the device; captured once, a replay takes new bits."""
    product, more = to("cuda", operands(70, 600, 513)), to("cuda", epilogue(70, 600))

    def step() -> list[torch.Tensor]:
        return [
            OPS.bgemm(*product, *more, torch.bfloat16),
            *OPS.bgemm_signs(*product, *more),
            *OPS.hamming_topk(*product, None, 5),
        ]

    with fastloss.use_backend("cuda"):
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for old, new in zip(product[:4], operands(70, 600, 513)[:4], strict=True):
            old.copy_(new)
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(torch.nan_to_num(got), torch.nan_to_num(want))


def test_on_a_stream_of_its_own() -> None:
    product, stream = to("cuda", operands(300, 257, 1100)), torch.cuda.Stream()
    with fastloss.use_backend("cuda"):
        want = OPS.hamming_topk(*product, None, 7)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            got = OPS.hamming_topk(*product, None, 7)
        stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
