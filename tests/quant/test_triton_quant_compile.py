"""The Triton kernels of the bit ops, compiled for GPUs that are not here: they build, spill nothing, use matrix units."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

pytest.importorskip("triton")

from triton_aot import SHARED_LIMIT, Cost
from triton_quant_aot import CALLS, QuantCase, compile_quant_case

PRODUCTS = ("lowbit_matmul_kernel", "lowbit_matmul_transposed_kernel", "context_kernel", "answer_kernel")


#: Bytes that a build may store to the stack, and why.
MAY_SPILL = {
    # no spill: the range reduction of a large cosine keeps its product of 28 bytes there, as CUDA's cosf does
    "gradient_fda_each-bf16-sm_90": 32,
}


def cases() -> list[QuantCase]:
    """Every call in bfloat16 for sm_90; products for every GPU and dtype."""
    made = [QuantCase(name, "bf16", "sm_90") for name in CALLS]
    everywhere = (
        "lowbit large",
        "lowbit ternary groups",
        "lowbit one row",
        "lowbit transposed",
        "pack codes",
        "codec 8 bits",
    )
    made += [QuantCase(name, "bf16", target) for target in ("sm_80", "sm_100") for name in everywhere]
    made += [QuantCase("lowbit large", "int8", target) for target in SHARED_LIMIT]
    made += [QuantCase(name, "int8", "sm_90") for name in ("lowbit ternary groups", "lowbit one row of groups")]
    made += [
        QuantCase(f"hash_attention{form}", "fp32", target) for form in ("", " causal") for target in ("sm_80", "sm_90")
    ]
    made += [QuantCase("lowbit large", dtype, "sm_90") for dtype in ("fp16", "fp32")]
    made.append(QuantCase("lowbit transposed groups", "fp32", "sm_80"))
    return made + [QuantCase(name, "fp32", "sm_80") for name in ("binarize codes each", "fake_quant gradient rows")]


CASES = cases()


@pytest.fixture(scope="module")
def costs() -> dict[QuantCase, dict[str, Cost]]:
    """All builds, two at a time; the compiler caches them."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(CASES, pool.map(compile_quant_case, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cost(case: QuantCase, costs: dict[QuantCase, dict[str, Cost]]) -> None:
    assert costs[case]
    for kernel, cost in costs[case].items():
        allowed = MAY_SPILL.get(str(case), 0)
        assert cost.spilled <= allowed, f"{kernel}: {cost.spilled} bytes spilled at {cost.registers} registers"
        assert cost.shared <= SHARED_LIMIT[case.target], kernel
        assert bool(cost.matrix) == (kernel in PRODUCTS), f"{kernel}: {cost.matrix}"
