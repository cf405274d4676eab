"""row_sample.cu on the host, in several thread orders, against float64 and a Philox of the tests' own."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from cuda_host import build
from cuda_host.rows import CODES, Limits
from cuda_host.sample import Case, CRowSample, Plan, run, small_cases
from sampling import tail_rows

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")
H200 = Limits(132, 8, 227 << 10, 228 << 10)
A100 = Limits(108, 1, 163 << 10, 164 << 10)


@pytest.fixture(params=["asc", "desc", "7"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain build, with threads in one of three orders."""
    monkeypatch.setenv("EMU_ORDER", request.param)
    return build.build()


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize("slices", [1, 2, 8])
def test_draws(library: Path, dtype: str, slices: int) -> None:
    for v in (1, 2, 37, 1000, 2051):
        run(library, Case(v, dtype, slices=slices))


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_unaligned(library: Path, dtype: str, offset: int) -> None:
    """The columns of a vector then belong to two or three blocks of random words."""
    for v in (5, 171):
        run(library, Case(v, dtype, offset=offset, pad=offset, slices=2))


@pytest.mark.parametrize("scale, softcap", [(0.3, 0.0), (-1.0, 0.0), (1.0, 15.0), (1.7, 30.0)])
def test_scale_and_softcap(library: Path, scale: float, softcap: float) -> None:
    run(library, Case(291, "bf16", scale=scale, softcap=softcap))
    run(library, Case(291, "fp32", ("plain", "holes", "one", "nothing"), scale=scale, softcap=softcap))


@pytest.mark.parametrize("seed", [0, -1, (1 << 63) - 1, 5])
def test_seeds(library: Path, seed: int) -> None:
    run(library, Case(300, seed=seed, rows=("plain", "flat")))


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("v", [1000, 50257, 128256])
def test_as_launched(device: Limits, v: int) -> None:
    run(build.build(), Case(v, "bf16", ("plain", "flat")), limits=device)


def test_the_tail_has_64_bits(library: Path) -> None:
    logits, seed, streams, drawn = tail_rows()
    index, logp = torch.empty(2, dtype=torch.int64), torch.empty(2)
    addresses = (t.data_ptr() for t in (logits, seed, streams, index, logp))
    call, plan = CRowSample(*addresses, 2, 64, 64, CODES["fp32"], 1.0, 0.0), Plan(64, 1, 2)
    assert build.load(library).c_sample(ctypes.byref(call), ctypes.byref(plan)) is None
    assert torch.equal(index, drawn)


def test_what_it_does_not_take() -> None:
    call, library = CRowSample(), build.load(build.build())
    call.v = 2**31
    assert b"V must be below 2^31" in library.c_sample_run(ctypes.byref(call), ctypes.byref(H200))
    call.v = 5
    assert library.c_sample_run(ctypes.byref(call), ctypes.byref(H200)) is None  # no rows


@pytest.mark.parametrize("number", range(len(small_cases())))
def test_small_cases(library: Path, number: int) -> None:
    run(library, small_cases()[number])


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitized(variant: str) -> None:
    code, output = build.run_sanitized(variant, build.build(variant), module="sample")
    assert code == 0, output
