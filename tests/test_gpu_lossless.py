"""The lossless kernels on a GPU: every byte as the reference has it on the CPU, hostile blobs, streams, graphs."""

from __future__ import annotations

import os

import pytest
import torch

import fastloss
import lossless_blobs
from gpu_lossless_checks import (
    PAIRED,
    SIZES,
    blobs,
    check_checked,
    check_crc32c,
    check_decode,
    check_encoders,
    check_hostile,
    check_rows,
    check_tiles,
    same,
)  # fmt: skip
from lossless_cases import CODED, mostly_normal, normal

pytestmark = pytest.mark.gpu
OPS = torch.ops.fastloss


def test_every_op_has_a_kernel() -> None:
    assert not os.environ.get("FASTLOSS_GPU_STRICT") or fastloss.compiled._C is not None
    made = lossless_blobs.p7(normal(1000, torch.bfloat16), 100)
    blob, x = made.blob.cuda(), made.numbers.cuda()
    index = torch.tensor([1], device="cuda")
    for op, arguments in {
        "lossless_decode": (blob, made.plan, 0, 1000, x.dtype), "lossless_rows": (blob, made.plan, index, x.dtype),
        "crc32c": (blob, 100), "p7_histogram": (x,), "byte_split": (x,),
    }.items():  # fmt: skip
        assert fastloss.registry.choose(op, *arguments) == "cuda", op


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_decode(dtype: torch.dtype) -> None:
    for count in SIZES:
        for made in blobs(dtype, count):
            check_decode("cuda", "cuda", made)


@pytest.mark.parametrize("dtype", PAIRED, ids=str)
def test_tiles(dtype: torch.dtype) -> None:
    check_tiles("cuda", "cuda", dtype)


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_rows(dtype: torch.dtype) -> None:
    for rows, columns in ((40, 130), (9, 17), (7, 5000), (2, 17000)):
        for made in blobs(dtype, rows * columns, columns):
            check_rows("cuda", "cuda", made)


def test_crc32c() -> None:
    check_crc32c("cuda", "cuda")


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_encoders(dtype: torch.dtype) -> None:
    for count in (1, 129, 16385, 40001):
        check_encoders("cuda", "cuda", mostly_normal(count, dtype))


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_decode_checked(dtype: torch.dtype) -> None:
    for made in blobs(dtype, 20000):
        check_checked("cuda", "cuda", made)


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_hostile(dtype: torch.dtype) -> None:
    check_hostile("cuda", "cuda", dtype)
    torch.cuda.synchronize()


@pytest.mark.parametrize("codec", ["p7", "r8"])
def test_large(codec: str) -> None:
    """A matrix of 8192 x 8192: encoded, decoded and compared on the device."""
    x = torch.randn(8192, 8192, device="cuda").mul_(0.02).bfloat16()
    with fastloss.use_backend("cuda"):
        packed = fastloss.lossless.compress(x, codec)
        back = fastloss.lossless.decompress(packed)
    assert torch.equal(x.view(torch.int16), back.view(torch.int16))
    assert packed.blob.numel() < 0.73 * x.numel() * 2


def test_no_host_sync_and_graph() -> None:
    """Decoding waits for nothing; captured once, a replay decodes what the blob holds then."""
    first, second = (lossless_blobs.p7(normal(50000, torch.bfloat16, seed), 500) for seed in (1, 2))
    other = lossless_blobs.r8(normal(50000, torch.bfloat16, 3), 500)
    index = torch.tensor([3, 99, -1], device="cuda")
    size = max(first.blob.numel(), second.blob.numel())
    blob, r8 = torch.zeros(size, dtype=torch.uint8, device="cuda"), other.blob.cuda()
    blob[: first.blob.numel()] = first.blob.cuda()

    def step() -> list[torch.Tensor]:
        found = [
            OPS.lossless_decode(b, plan, 5, 49000, torch.bfloat16) for b, plan in ((blob, first.plan), (r8, other.plan))
        ]
        return [*found, OPS.lossless_rows(r8, other.plan, index, torch.bfloat16), OPS.crc32c(r8, 4096)]

    with fastloss.use_backend("cuda"):
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            want = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        same(captured, want, "replayed")
        same(captured[0], first.numbers[5:49005], "decoded in a graph")


def test_on_a_stream_of_its_own() -> None:
    made, stream = lossless_blobs.p7(normal(100000, torch.bfloat16)), torch.cuda.Stream()
    blob = made.blob.cuda()
    torch.cuda.synchronize()
    with fastloss.use_backend("cuda"), torch.cuda.stream(stream):
        got = OPS.lossless_decode(blob, made.plan, 0, 100000, torch.bfloat16)
    stream.synchronize()
    same(got, made.numbers, "on a stream")
