"""lossless_linear.cu on the host, in several thread orders, against fp64; and the glue of its backend around it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cuda_host import build
from cuda_host.lossless_linear import ROWS, TILES, Case, Matrix, aligned, encode, run, run_matrix, small_cases, weights
from cuda_host.rows import int64
from fastloss import backend_cuda, lossless
from fastloss.lossless import cuda_linear
from lossless_cases import bits, mostly_normal

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")
ORDERS = ("asc", "desc", "7")
LAYOUTS = pytest.mark.parametrize("layout", [ROWS, TILES], ids=["rows", "tiles"])


@pytest.fixture(params=ORDERS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain build, with threads in one of three orders."""
    monkeypatch.setenv("EMU_ORDER", request.param)
    return build.build(only="lossless_linear")


@pytest.mark.parametrize("number", range(len(small_cases())))
def test_small_cases(library: Path, number: int) -> None:
    run(library, small_cases()[number])


@LAYOUTS
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64])
def test_batches(n: int, layout: int) -> None:
    run(build.build(only="lossless_linear"), Case(n, 32, 256, layout, "escapes", bias=n % 2 == 0))


@LAYOUTS
@pytest.mark.parametrize("columns", [128, 256, 384, 896, 1024, 1152, 2176])
def test_columns(columns: int, layout: int) -> None:
    """Every split that has a unit for each part, by cluster and by memory; blocks of escapes across bands and rows."""
    for splits in (1, 2, 4, 8):
        if splits <= columns // 128:
            run(
                build.build(only="lossless_linear"),
                Case(3, 48, columns, layout, "escapes", splits, splits % 4 > 0, True),
            )


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 127, 128, 129, 145, 257])
def test_rows(rows: int) -> None:
    run(build.build(only="lossless_linear"), Case(2, rows, 256, ROWS, "escapes", 2, rows % 2 == 0))
    if rows % 16 == 0:
        run(build.build(only="lossless_linear"), Case(2, rows, 256, TILES, "escapes", 2))


@LAYOUTS
def test_every_run_is_the_same(layout: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of threads and blocks, and from either way of adding parts, the bits are equal."""
    rng = np.random.default_rng(0)
    matrix = Matrix(weights(rng, (32, 1152), "escapes"), layout)
    x = encode(rng.normal(0, 1, (5, 1152)), "bf16")
    found = []
    for order in ORDERS:
        monkeypatch.setenv("EMU_ORDER", order)
        for cluster in (True, False):
            case = Case(5, 32, 1152, layout, splits=4, cluster=cluster)
            found.append(run_matrix(build.build(only="lossless_linear"), case, matrix, x, None))
    assert all(np.array_equal(f, found[0]) for f in found)


@LAYOUTS
def test_each_weight_alone(layout: int) -> None:
    """Rows of the identity give back the weights bit for bit, escaped or not, infinities and NaN among them."""
    rng = np.random.default_rng(1)
    w = rng.integers(0, 65536, (16, 128)).astype(np.uint16)
    w[w >> 7 & 255 == 0] &= 0x8000  # on a GPU too a product with 1 keeps denormals; here numpy's reading is in the way
    special = (w >> 7 & 255) == 255
    matrix = Matrix(w, layout)
    assert matrix.positions.size > 500
    for first in (0, 64):
        x = encode(np.eye(128)[first : first + 64], "bf16")
        x_only = np.where(special, 0, w).astype(np.uint16)
        found = run_matrix(
            build.build(only="lossless_linear"), Case(64, 16, 128, layout), Matrix(x_only, layout), x, None
        )
        wanted = (x_only.astype(np.uint32) << 16).view(np.float32).astype(np.float64)[:, first : first + 64].T
        assert np.array_equal(found, wanted)
        with_special = run_matrix(build.build(only="lossless_linear"), Case(64, 16, 128, layout), matrix, x, None)
        rows = special.any(axis=1)
        assert not np.isfinite(with_special[:, rows]).any() and np.array_equal(with_special[:, ~rows], wanted[:, ~rows])


def test_plan() -> None:
    """One wave of blocks where the matrix allows it; clusters where there are some."""
    library = build.load(build.build(only="lossless_linear"))
    for (rows, columns, cluster), (splits, together) in {
        (8192, 8192, 8): (4, True), (4096, 4096, 8): (8, True), (14336, 4096, 8): (2, True), (4096, 14336, 8): (8, True),
        (128256, 4096, 8): (1, False), (8192, 8192, 1): (4, False), (16, 128, 8): (1, False), (16, 256, 8): (2, True),
    }.items():  # fmt: skip
        assert library.c_lossless_linear_plan(int64(rows), int64(columns), 132, cluster) == 2 * splits + together


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitized(variant: str) -> None:
    """Out of bounds and races, of right and of hostile blobs."""
    library = build.build(variant, only="lossless_linear")
    code, output = build.run_sanitized(variant, library, module="lossless_linear")
    assert code == 0, output


class Device:
    """What the glue calls of `_C`, on the host."""

    def __init__(self, parts: int) -> None:
        self.parts, self.library = parts, build.load(build.build(only="lossless_linear"))

    def lossless_linear_parts_cuda(self, rows: int, columns: int, device: int) -> int:
        return self.parts

    def lossless_linear_cuda(self, *, plan: list[int], device: Any, stream: int, **pointers: int) -> None:
        fields = [ctypes.c_void_p(v) if k != "n" else int64(v) for k, v in pointers.items()]
        error = self.library.c_lossless_linear_blob(*fields, (int64 * len(plan))(*plan), max(self.parts, 1))
        assert error is None, error


@pytest.fixture(params=[0, 2])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is none: the backend takes tensors of the CPU. With two parts, by way of memory."""
    monkeypatch.setattr(cuda_linear, "_C", Device(request.param))
    monkeypatch.setattr(backend_cuda, "_missing", lambda x: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)


@pytest.mark.parametrize("layout", ["rows", "tiles"])
def test_glue(device: None, layout: str) -> None:
    """What `compress` makes, x that is neither contiguous nor aligned, a bias; the caller's tensors are left alone."""
    w = (
        torch.nan_to_num(mostly_normal(48 * 384, torch.bfloat16).float(), 0, 0, 0)
        .clamp(-4, 4)
        .bfloat16()
        .reshape(48, 384)
    )
    compressed = lossless.compress(w, codec="p7", layout=layout)
    blob, plan = compressed.blob, compressed.header.plan()
    bias = torch.randn(96)[::2].bfloat16()
    for x in (torch.randn(384, 3).bfloat16().T, torch.randn(3 * 384 + 1).bfloat16()[1:].reshape(3, 384)):
        before = [bits(t).clone() for t in (x, blob, bias)]
        for b in (bias, None):
            assert cuda_linear._why_not(x, blob, plan, b) is None
            y = cuda_linear.lossless_linear(x, blob, plan, b)
            wanted = x.double() @ w.double().T + (0 if b is None else b.double())
            assert y.dtype == torch.bfloat16 and (y - wanted).abs().max() <= 2**-8 * wanted.abs().max() + 1e-3
        assert all(torch.equal(bits(t), b) for t, b in zip((x, blob, bias), before, strict=True))
    assert cuda_linear.lossless_linear(x[:0], blob, plan).shape == (0, 48)


def test_what_it_does_not_take(device: None) -> None:
    """In words; what is taken is not refused."""
    x = torch.zeros(1, 256, dtype=torch.bfloat16)

    def why(w: torch.Tensor, x: torch.Tensor = x, **kind: Any) -> str:
        compressed = lossless.compress(w, **{"codec": "p7", **kind})
        return cuda_linear._why_not(x, compressed.blob, compressed.header.plan()) or ""

    w = mostly_normal(256 * 64, torch.bfloat16).reshape(64, 256)
    assert why(w) == ""
    assert "R8" in why(w, codec="r8") and "RAW" in why(w, codec="raw") and "FP16" in why(w.half())
    assert "multiple of 128" in why(w.reshape(-1, 64))
    assert "up to 64 rows" in why(w, torch.zeros(65, 256, dtype=torch.bfloat16))
    assert "byte plane" in why(torch.ones(64, 256, dtype=torch.bfloat16))
    compressed = lossless.compress(w, codec="p7")
    moved = torch.cat((torch.zeros(1, dtype=torch.uint8), compressed.blob))[1:]
    assert "aligned" in (cuda_linear._why_not(x, moved, compressed.header.plan()) or "")
    assert aligned(np.zeros(3)).size == 3
