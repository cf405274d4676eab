"""The Triton kernels, compiled for GPUs that are not here: they build, spill nothing, fit in shared memory, use matrix units."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

pytest.importorskip("triton")

from fastloss.triton_kernels.linear_row_stats import Tile

from triton_aot import ALL, SHARED_LIMIT, Case, Cost, compile_case

LINEAR = ("linear_stats", "linear_gradient")
NO_EXTRAS = ("bias", "dbias", "column_weight", "temperature", "lift")
NO_PROB, NO_TARGET = ("prob",), ("target",)
ENTROPY_AND_SUM, TEMPERED, SCORE_MEAN, TERM = 3, 8, 128, 256
EVERY_TERM = 1 | 2 | 4 | 16 | 32 | 64 | 128 | 256 | 512

#: Bytes that a build may spill, and why.
MAY_SPILL = {
    # triton 3.6 only: every statistic, a softcap and probabilities at once, in 128 registers. Never a loss's default.
    "cross_entropy-want23-softcap-prob-bf16-sm_90": 8,
}


def linear_cases() -> list[Case]:
    cases = []
    for kernel in LINEAR:
        for target, tma in (("sm_80", False), ("sm_90", True), ("sm_100", True)):
            cases.append(Case(kernel, "bf16", target, absent=NO_EXTRAS, tma=tma))
            cases.append(Case(kernel, "bf16", target, ALL, True, ("lift",), tma))
            cases.append(Case(kernel, "fp32", target, absent=NO_EXTRAS))
        cases.append(Case(kernel, "bf16", "sm_90", ENTROPY_AND_SUM, absent=("lift", "temperature"), tma=True))
        cases.append(Case(kernel, "fp16", "sm_90", absent=NO_EXTRAS[:-1], tma=True))
        cases.append(Case(kernel, "bf16", "sm_90", absent=NO_EXTRAS))  # operands that the copy engine cannot read
        cases.append(Case(kernel, "fp32", "sm_90", ALL, True, ("lift",)))
    return cases


def row_cases() -> list[Case]:
    plain = (*NO_PROB, "column_weight", "temperature")
    cases = [Case("merge", "fp32", target, ALL) for target in SHARED_LIMIT]
    cases += [Case("scale", dtype, "sm_90") for dtype in ("bf16", "fp32")]
    for target in SHARED_LIMIT:
        cases += [Case("merge_sample", "fp32", target), Case("sample", "bf16", target)]
        cases += [Case("sample", dtype, target, softcap=True) for dtype in ("fp16", "fp32")]
    for kernel in ("stats", "gradient", "cross_entropy"):
        for dtype, target in (
            ("bf16", "sm_80"),
            ("bf16", "sm_90"),
            ("bf16", "sm_100"),
            ("fp16", "sm_90"),
            ("fp32", "sm_90"),
        ):
            cases.append(Case(kernel, dtype, target, absent=plain))
        want = ALL & ~TEMPERED if kernel == "cross_entropy" else ALL  # that op has no temperature
        for dtype in ("bf16", "fp32"):
            cases.append(Case(kernel, dtype, "sm_90", want, True, NO_PROB))
            cases.append(Case(kernel, dtype, "sm_90", want, True, NO_TARGET))
    return cases


def region_cases() -> list[Case]:
    cases = []
    for kernel in ("region_stats", "region_gradient"):
        cases += [Case(kernel, "bf16", target, want) for target in SHARED_LIMIT for want in (0, 7)]
        cases += [Case(kernel, "fp32", "sm_90", want, absent=("mask",)) for want in (0, 7, 15, 17)]
    return cases


def pointwise_cases() -> list[Case]:
    training = ("weight", "pos_weight", "upstream", "values")
    cases = [Case("pointwise", "bf16", target, absent=training) for target in SHARED_LIMIT]
    cases += [Case("pointwise", dtype, "sm_90", kind, absent=training) for kind in (1, 2) for dtype in ("fp32", "fp16")]
    return cases + [Case("pointwise", "fp32", target, absent=("partial",)) for target in SHARED_LIMIT]


def term_cases() -> list[Case]:
    """Distillation as it is called, every term once, every statistic at once, generated targets, nothing but listed columns."""
    cases = []
    plain, parts = ("listed", "value", "subset"), ("part", "part_index")
    for target in SHARED_LIMIT:
        cases.append(Case("terms", "bf16", target, TERM, absent=(*plain, *parts), term=1))
        cases.append(Case("terms_gradient", "bf16", target, TERM, absent=plain, term=1))
        cases.append(Case("terms", "bf16", target, EVERY_TERM, True, absent=("value", *parts), term=2, listed=3))
        cases.append(Case("terms_gradient", "bf16", target, EVERY_TERM, True, absent=("value",), term=2, listed=3))
    for kernel, absent in (("terms", parts), ("terms_gradient", ())):
        cases.append(Case(kernel, "bf16", "sm_90", TERM, absent=(*plain, "temperature", *absent), term=1))
        cases.append(Case(kernel, "fp32", "sm_90", EVERY_TERM, True, absent=("value", *absent), term=2, listed=3))
        cases += [Case(kernel, "fp32", "sm_90", TERM, absent=(*plain, *absent), term=term) for term in range(2, 7)]
        cases.append(Case(kernel, "fp32", "sm_90", SCORE_MEAN, absent=("listed", "teacher", "subset", *absent)))
        cases.append(Case(kernel, "bf16", "sm_90", absent=("teacher", *plain[1:], "temperature", *absent), listed=3))
    for kernel in ("terms_scan", "terms"):
        cases.append(Case(kernel, "bf16", "sm_90", EVERY_TERM, True, absent=("value",), term=2, listed=3, splits=64))
    return cases


CASES = linear_cases() + row_cases() + region_cases() + pointwise_cases() + term_cases()
TOO_LARGE = Case("linear_stats", "bf16", "sm_90", ALL, True, ("lift",), True, Tile(128, 256, 64, 8, 3))


@pytest.fixture(scope="module")
def costs() -> dict[Case, Cost]:
    """All builds, two at a time; the compiler caches them."""
    cases = [TOO_LARGE, *CASES]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(cases, pool.map(compile_case, cases), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cost(case: Case, costs: dict[Case, Cost]) -> None:
    cost = costs[case]
    allowed = MAY_SPILL.get(str(case), 0)
    assert cost.spilled <= allowed, f"{cost.spilled} bytes spilled at {cost.registers} registers, {allowed} allowed"
    assert cost.shared <= SHARED_LIMIT[case.target]
    if case.kernel in LINEAR and case.dtype != "fp32":  # no matrix unit multiplies fp32
        assert cost.matrix == ({"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[case.target],)
    else:
        assert cost.matrix == ()


def test_a_spill_is_seen(costs: dict[Case, Cost]) -> None:
    """A tile twice the launcher's size must spill, or the measure is blind."""
    assert costs[TOO_LARGE].spilled > 0
