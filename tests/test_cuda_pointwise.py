"""pointwise_loss.cu on the host, in several thread orders, against float64: every kind, dtype, weight and result."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import numpy as np
import pytest

from cuda_host import build
from cuda_host.pointwise import BCE, KL, KL_LOG, MOST_PARTIALS, Case, CPointwise, Elements, run, small_cases
from cuda_host.rows import CODES, Limits

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")
SMALL = Limits(2, 1, 163 << 10, 164 << 10)  # two multiprocessors: a thread has more than one group
H200 = Limits(132, 8, 227 << 10, 228 << 10)
KINDS = pytest.mark.parametrize("kind", [BCE, KL, KL_LOG], ids=["bce", "kl", "kl_log"])
DTYPES = pytest.mark.parametrize("dtype", list(CODES))


@pytest.fixture(params=["asc", "desc", "7"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain build, with threads in one of three orders."""
    monkeypatch.setenv("EMU_ORDER", request.param)
    return build.build()


@KINDS
@DTYPES
def test_loss_and_gradient(library: Path, kind: int, dtype: str) -> None:
    for n, offset, target in itertools.product((1, 40, 2053), (0, 1), ("", "fp32")):
        run(library, Case(n, kind, dtype, target, share=1 / n, offset=offset), SMALL)


@KINDS
def test_more_elements_than_threads(kind: int) -> None:
    for dtype in ("fp32", "bf16"):
        run(build.build(), Case(70_001, kind, dtype, weight=0 if kind else 1013), SMALL)
    run(build.build(), Case(70_001, kind, "bf16", weight=0 if kind else 7), H200)


@KINDS
@DTYPES
def test_values_and_upstream(library: Path, kind: int, dtype: str) -> None:
    for upstream, target in itertools.product(("one", "each"), ("", "fp32")):
        run(library, Case(1031, kind, dtype, target, upstream=upstream, loss=False, values=True, share=0.25), SMALL)


@DTYPES
@pytest.mark.parametrize("weight, pos_weight", [(1, 0), (0, 1), (7, 3), (2100, 5), (350, 2100)])
def test_weights(library: Path, dtype: str, weight: int, pos_weight: int) -> None:
    for offset in (0, 1):
        run(library, Case(2100, BCE, dtype, weight=weight, pos_weight=pos_weight, offset=offset), SMALL)


def test_margins() -> None:
    """Logits of some hundreds: nothing overflows, and the gradient of a sure element keeps its digits."""
    for dtype in ("fp32", "bf16"):
        run(build.build(), Case(3000, BCE, dtype, spread=200, pos_weight=3), SMALL)


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_gradient_that_stands_already(upstream: float) -> None:
    """An upstream gradient of 1, on the device, leaves dinput as it is; any other makes it anew."""
    x, dinput, number = np.zeros(50, np.float32), np.full(50, 7, np.float32), np.array([upstream], np.float32)
    of = lambda a: Elements(a.ctypes.data, 0, len(a))  # noqa: E731
    call = CPointwise(
        of(x), of(x), Elements(), Elements(), of(number), None, Elements(), of(dinput), None, 50, BCE, 2.0, True
    )
    assert build.load(build.build()).c_pointwise(ctypes.byref(call), ctypes.byref(SMALL)) is None
    np.testing.assert_array_equal(dinput, 7 if upstream == 1 else 0.5)  # sigmoid(0) = 1/2, times 2 times 1/2


def test_what_it_does_not_take_and_nothing() -> None:
    call, library = CPointwise(), build.load(build.build())
    assert library.c_pointwise(ctypes.byref(call), ctypes.byref(SMALL)) is None
    loss, partial = np.full(1, np.nan, np.float32), np.full(MOST_PARTIALS, np.nan)
    call.loss, call.partial = loss.ctypes.data, partial.ctypes.data
    assert library.c_pointwise(ctypes.byref(call), ctypes.byref(SMALL)) is None and loss[0] == 0
    call.n, call.input.dtype, call.target.dtype = 5, CODES["bf16"], CODES["fp16"]
    assert b"dtype of the input" in library.c_pointwise(ctypes.byref(call), ctypes.byref(SMALL))


def test_small_cases(library: Path) -> None:
    for case in small_cases():
        run(library, case, SMALL)


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitized(variant: str) -> None:
    code, output = build.run_sanitized(variant, build.build(variant), module="pointwise")
    assert code == 0, output
