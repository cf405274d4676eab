"""Planted faults: the checks of test_cuda_host.py must find every one, each by the check that is named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import pytest

from cuda_host import build
from cuda_host.rows import BOTH, EVERYTHING, GRADIENT, HARD, STATS, SUM, Case, run

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")

# Only the bf16 kernels are compiled: a fault costs a build.
ONE_DTYPE = (
    "row_stats.cu",
    """p.dtype == kFloat32   ? launch_rows<float>
                           : p.dtype == kFloat16 ? launch_rows<__half>
                                                 : launch_rows<__nv_bfloat16>""",
    "launch_rows<__nv_bfloat16>",
)
CASES = [
    *(
        Case(v, mode, "bf16", HARD, want=want, slices=2, offset=3)
        for v in (131, 1003)
        for mode in (STATS, GRADIENT, BOTH)
        for want in (0, EVERYTHING)
    ),
    Case(1203, BOTH, "bf16", HARD, slices=2, keep=False, in_place=True),
    Case(5200, BOTH, "bf16", out_offset=1),
    Case(140, BOTH, "bf16", HARD, nll_only=True),
    Case(400, BOTH, "bf16", HARD, want=SUM, weight=True, softcap=20, rows_per_launch=5),
    Case(140, BOTH, "bf16", HARD, margin=(3, 2.0, 0.0)),
]
TSAN = "1"  # of rows.small_cases()


class Fault(NamedTuple):
    """What is wrong, where, and who must see it: thread orders (results or the emulator's own checks), or tsan."""

    what: str
    file: str
    old: str
    new: str
    found_by: tuple[str, ...] = ("asc", "desc")


ROWS, LEAN, GENERAL = "row_stats.cuh", "row_stats_lean.cuh", "row_stats_general.cuh"
BARRIER = "if (slices > 1) cluster_sync();\n  else __syncthreads();"
FAULTS = [
    Fault("no barrier before the blocks' parts are read", ROWS, BARRIER, "", ("asc", "desc", "tsan")),
    Fault("the cluster's barrier is only the block's", ROWS, BARRIER, "__syncthreads();"),
    Fault(
        "a block leaves while its part is read, lean", LEAN, "if (MODE != kGradient && slices > 1) cluster_wait();", ""
    ),
    Fault(
        "a block leaves while its part is read, general",
        GENERAL,
        "if (p.mode != kGradient && slices > 1) cluster_wait();",
        "",
    ),
    Fault("parts of other blocks left out", ROWS, "part + i % warps, i / warps)", "part + i % warps, 0)"),
    Fault("shuffle of half a warp", ROWS, "__shfl_xor_sync(kAllLanes,", "__shfl_xor_sync(0xffffu,"),
    Fault("tail skipped", ROWS, "else if (t < head + tail) s.single = t + vectors * N;", ""),
    Fault(
        "columns beside the target skipped",
        ROWS,
        "else if (t < head + tail + N && holder >= 0) s.single = t - tail + holder * N;",
        "",
    ),
    Fault(
        "alignment of the row ignored",
        ROWS,
        "misaligned = int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T))",
        "misaligned = 0",
    ),
    Fault("alignment of the gradient ignored", ROWS, "if (aligned) {", "if (true || aligned) {"),
    Fault(
        "one vector too many",
        ROWS,
        "for (int i = threadIdx.x; i < count; i += step, here += step) {",
        "for (int i = threadIdx.x; i <= count; i += step, here += step) {",
    ),
    Fault("the target's vector counted twice", ROWS, "if (i != skip) f(*here, i);", "f(*here, i);"),
    Fault("no wait for a copy", ROWS, "cp_async_wait<kAhead>();", ""),
    Fault("wait for one copy too few", ROWS, "cp_async_wait<kAhead>();", "cp_async_wait<kAhead + 1>();"),
    Fault("a target above V used as an index", ROWS, "if (y < 0 || y >= p.v)", "if (y < 0)"),
    Fault("an ignored row keeps its old gradient", ROWS, "put(g + s.column + i * kWidth<T>, true, zero);", ""),
    Fault("the rounding of the shift forgotten", LEAN, "logf(soft.sum) - shift_error(max) * kLn2", "logf(soft.sum)"),
    Fault("-inf - -inf", LEAN, "return max == -kInf ? 0 : __fmul_rn(max, kLog2e);", "return __fmul_rn(max, kLog2e);"),
    Fault("a later launch starts at row 0", GENERAL, "first_row + blockIdx.x / slices", "blockIdx.x / slices"),
    Fault(
        "the higher of two equal columns", GENERAL, "a.best == b.best && a.at < b.at", "a.best == b.best && a.at > b.at"
    ),
    Fault("the softcap not differentiated", GENERAL, "d[k] *= (1 - part * part) * p_.scale;", "d[k] *= p_.scale;"),
    Fault("0 * inf in the mean", GENERAL, "e == 0 ? 0 : e * x;", "e * x;"),
    Fault("a margin loss that pulls the rest along", ROWS, "return {own, -own};", "return {own, own};"),
    Fault("the slope of another margin loss", ROWS, "margin_slope(p.margin_loss,", "margin_slope(kUnlikelihood,"),
    Fault(
        "p - 1 instead of the margin form",
        ROWS,
        "return {h - rest, rest};",
        "const float py = 1 / (1 + expf(-d));\n  return {h * py + b * (py - 1), rest};",
    ),
]


@cache
def libraries() -> dict[tuple[str, str], object]:
    """All builds, two at a time."""
    wanted = [(f, v) for f in FAULTS for v in ("quick", "tsan") if v == "quick" or "tsan" in f.found_by]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(
            lambda job: build.build(job[1], [ONE_DTYPE, (job[0].file, job[0].old, job[0].new)], only="row_stats"),
            wanted,
        )
        return {(f.what, v): path for (f, v), path in zip(wanted, made, strict=True)}


def test_slim_build_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    for order in ("asc", "desc"):
        monkeypatch.setenv("EMU_ORDER", order)
        for case in CASES:
            run(build.build("quick", [ONE_DTYPE], only="row_stats"), case)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.what)
def test_fault_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    for who in fault.found_by:
        if who == "tsan":
            code, output = build.run_sanitized("tsan", libraries()[fault.what, "tsan"], TSAN)
            assert code == 66 and "data race" in output, output
            continue
        monkeypatch.setenv("EMU_ORDER", who)
        library, found = libraries()[fault.what, "quick"], []
        for case in CASES:
            try:
                run(library, case)
            except (AssertionError, RuntimeError) as error:
                found.append(str(error))
                break
        assert found, f"{fault.what}: not found in order {who}"
