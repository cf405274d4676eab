"""region_stats.cu on the host, in several thread orders, against float64: dtypes, targets, masks, slices, alignments."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuda_host import build
from cuda_host.regions import ALL, BCE, ENTROPY, PROBABILITIES, SHARP, SQUARED, Case, run, small_cases

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")


@pytest.fixture(params=["asc", "desc", "7"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain build, with threads in one of three orders."""
    monkeypatch.setenv("EMU_ORDER", request.param)
    return build.build()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("target", ["byte", "fp32", "own"])
def test_dtypes(library: Path, dtype: str, target: str) -> None:
    run(library, Case(2048, 2, dtype, target, slices=2))
    run(library, Case(37, 3, dtype, target, ALL, mask_share=1))
    run(library, Case(1003, 4, dtype, target, mask_share=2, slices=3, offset=1))


@pytest.mark.parametrize("want", [SQUARED, BCE, ENTROPY, ALL | SHARP, SQUARED | PROBABILITIES, SHARP | PROBABILITIES])
def test_statistics(library: Path, want: int) -> None:
    run(library, Case(517, 2, want=want, slices=2))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_hard_regions(library: Path, dtype: str) -> None:
    run(library, Case(67, 4, dtype, want=ALL, hard=True))


def test_more_slices_than_values(library: Path) -> None:
    run(library, Case(3, 2, "bf16", slices=4))


@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_small_cases(library: Path, case: Case) -> None:
    run(library, case)


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitized(variant: str) -> None:
    """Out of bounds and races."""
    code, output = build.run_sanitized(variant, build.build(variant), module="regions")
    assert code == 0, output
