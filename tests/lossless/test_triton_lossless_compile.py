"""The Triton kernels of the lossless ops, compiled for GPUs that are not here: they build, spill nothing, use matrix units."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

pytest.importorskip("triton")

from triton_aot import SHARED_LIMIT, Cost
from triton_lossless_aot import CALLS, DTYPES, QuantCase, compile_lossless_case, takes


def cases() -> list[QuantCase]:
    """Every call in bfloat16 for sm_90, the largest for every GPU; what takes more registers in other dtypes."""
    made = [QuantCase(name, "bf16", "sm_90") for name in CALLS]
    everywhere = ("p7 rows", "p7 tiles", "r8", "linear 16", "linear 64 tiles", "crc32c")
    made += [QuantCase(name, "bf16", target) for target in ("sm_80", "sm_100") for name in everywhere]
    made += [
        QuantCase(name, "fp16", "sm_90")
        for name in ("p7 rows", "gather p7", "linear 1", "linear 64", "linear 64 tiles")
    ]
    made.append(QuantCase("linear 64", "fp16", "sm_80"))
    others = ("p7 rows", "gather p7", "gather r8")
    made += [QuantCase(name, dtype, "sm_80") for name in others for dtype in DTYPES if dtype not in ("bf16", "fp16")]
    return [case for case in made if takes(case.name, case.dtype)]


CASES = cases()


@pytest.fixture(scope="module")
def costs() -> dict[QuantCase, dict[str, Cost]]:
    """All builds, two at a time; the compiler caches them."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(CASES, pool.map(compile_lossless_case, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cost(case: QuantCase, costs: dict[QuantCase, dict[str, Cost]]) -> None:
    assert costs[case]
    for kernel, cost in costs[case].items():
        assert not cost.spilled, f"{kernel}: {cost.spilled} bytes spilled at {cost.registers} registers"
        assert cost.shared <= SHARED_LIMIT[case.target], kernel
        few = case.name in ("linear 1", "linear 2 tiles")
        assert bool(cost.matrix) == (kernel == "lossless_linear_kernel" and not few), f"{kernel}: {cost.matrix}"
