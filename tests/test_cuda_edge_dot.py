"""edge_dot.cu on the host, in several thread orders, against float64: dtypes, widths, alignments, ids out of range."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuda_host import build
from cuda_host.edges import Case, run, small_cases

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")


@pytest.fixture(params=["asc", "desc", "7"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain build, with threads in one of three orders."""
    monkeypatch.setenv("EMU_ORDER", request.param)
    return build.build()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("d", [1, 4, 7, 16, 48, 65, 256, 1152])
def test_widths(library: Path, dtype: str, d: int) -> None:
    run(library, Case(d, dtype=dtype))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_alignments(library: Path, dtype: str) -> None:
    for offset, pad in ((0, 1), (1, 0), (0, 8), (3, 5)):
        run(library, Case(72, dtype=dtype, offset=offset, pad=pad))


@pytest.mark.parametrize("d", [3, 130, 300])
def test_ids_out_of_range_are_nan_and_nothing_is_read(library: Path, d: int) -> None:
    run(library, Case(d, outside=True))


def test_many_and_no_edges(library: Path) -> None:
    run(library, Case(20, 1000))
    run(library, Case(20, 0))


@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_small_cases(library: Path, case: Case) -> None:
    run(library, case)


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitized(variant: str) -> None:
    """Out of bounds and races."""
    code, output = build.run_sanitized(variant, build.build(variant), module="edges")
    assert code == 0, output
