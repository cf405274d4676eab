"""The Triton kernels of pairs, compiled for GPUs that are not here: as test_triton_compile.py does for rows."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

pytest.importorskip("triton")

from triton_aot import SHARED_LIMIT, Cost
from triton_pair_aot import PairCase, compile_pair_case

COLUMNS, MEAN, SECOND = 1, 2, 4
TILED = ("pair_stats", "pair_gradient", "pair_map", "pair_map_gradient", "row_topk")
CLIP, QUEUE = ("diagonal",), ("diagonal", "excluded diagonal", "valid", "column scale")
SUPERVISED = ("ids", "excluded diagonal")
EVERYTHING = (
    "ids",
    "diagonal",
    "excluded ids",
    "excluded diagonal",
    "valid",
    "column scale",
    "boost",
    "margin",
    "window",
)
BITS = ("bits", "excluded bits", "diagonal", "valid")
MAPPED = ("ids", "valid", "window", "column scale", "guide", "thresholds")
GUIDED = ("diagonal", "excluded diagonal", "guide")


def statistics_cases() -> list[PairCase]:
    cases = []
    for kernel in ("pair_stats", "pair_gradient"):
        for target, tma in (("sm_80", False), ("sm_90", True), ("sm_100", True)):
            cases += [PairCase(kernel, "bf16", target, features, COLUMNS, tma) for features in (CLIP, SUPERVISED, BITS)]
            cases.append(PairCase(kernel, "bf16", target, QUEUE, 0, tma))
            cases.append(PairCase(kernel, "bf16", target, (*QUEUE, "boost"), COLUMNS | MEAN | SECOND, tma))
            cases.append(PairCase(kernel, "bf16", target, (*EVERYTHING, "guide"), COLUMNS | MEAN | SECOND, tma))
            cases.append(PairCase(kernel, "fp32", target, CLIP, COLUMNS))
            cases.append(PairCase(kernel, "fp32", target, EVERYTHING, COLUMNS | MEAN | SECOND))
        cases.append(PairCase(kernel, "fp32", "sm_90", (*EVERYTHING, "guide"), COLUMNS | MEAN | SECOND))
        cases.append(PairCase(kernel, "fp16", "sm_90", CLIP, COLUMNS, True))
        cases.append(PairCase(kernel, "bf16", "sm_90", CLIP, COLUMNS))  # operands that the copy engine cannot read
        cases.append(PairCase(kernel, "bf16", "sm_90", GUIDED, COLUMNS, True))
    return cases


def other_tiles() -> list[PairCase]:
    """Every function of pair_map once; lists of the longest length."""
    cases = []
    for target, tma in (("sm_80", False), ("sm_90", True), ("sm_100", True)):
        for kernel in ("pair_map", "pair_map_gradient"):
            cases.append(PairCase(kernel, "bf16", target, (*CLIP, "thresholds"), 0, tma))
            cases.append(PairCase(kernel, "bf16", target, MAPPED, 3, tma))
        cases.append(PairCase("row_topk", "bf16", target, EVERYTHING, 3, tma))
    for kernel in ("pair_map", "pair_map_gradient"):
        cases += [PairCase(kernel, "fp32", "sm_90", ("ids", "thresholds"), function) for function in range(3)]
    return cases + [PairCase("row_topk", "fp32", "sm_90", CLIP, 1)]


def vector_cases() -> list[PairCase]:
    """Kernels over rows, columns or edges, one arch each: nothing in them depends on it."""
    cases = [PairCase(kernel, "bf16", "sm_90") for kernel in ("edge_dot", "edge_sum")]
    cases.append(PairCase("merge_rows", "fp32", "sm_80", ("ids", "first", "last"), COLUMNS | MEAN | SECOND))
    cases.append(PairCase("merge_columns", "fp32", "sm_100", (*QUEUE, "last"), COLUMNS))
    cases += [PairCase("merge_columns", "fp32", "sm_90", ("ids", *last), COLUMNS) for last in ((), ("first",))]
    cases.append(PairCase("diagonal", "bf16", "sm_90", (*QUEUE, "excluded ids", "margin")))
    cases.append(PairCase("diagonal", "fp32", "sm_80", ("diagonal", "excluded bits")))
    cases.append(PairCase("diagonal_gradient", "fp32", "sm_90", QUEUE))
    return cases + [
        PairCase(kernel, "fp32", "sm_90", (*QUEUE, "thresholds"), 0) for kernel in ("map_merge", "map_diagonal")
    ]


CASES = statistics_cases() + other_tiles() + vector_cases()


@pytest.fixture(scope="module")
def costs() -> dict[PairCase, Cost]:
    """All builds, two at a time; the compiler caches them."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(CASES, pool.map(compile_pair_case, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cost(case: PairCase, costs: dict[PairCase, Cost]) -> None:
    cost = costs[case]
    assert cost.spilled == 0, f"{cost.spilled} bytes spilled at {cost.registers} registers"
    assert cost.shared <= SHARED_LIMIT[case.target]
    if case.kernel in TILED and case.dtype != "fp32":  # no matrix unit multiplies fp32
        assert cost.matrix == ({"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[case.target],)
    else:
        assert cost.matrix == ()
