"""Planted faults: the checks of test_cuda_linear.py must find every one. All are in one build, and one at a time is on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from cuda_host import build
from cuda_host.lossless_linear import plant, run, small_cases

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")


class Fault(NamedTuple):
    """What is wrong, where, and who must see it: thread orders (results or the emulator's own checks), or a sanitizer."""

    what: str
    file: str
    old: str
    new: str  # with WRONG where the fault is to be on
    found_by: tuple[str, ...] = ("asc", "desc")


UNITS, LINEAR = "lossless_linear.cuh", "lossless_linear.cu"
FAULTS = [
    Fault("a unit is read before it is there", LINEAR, "__syncthreads(); // the unit",
          "if (!WRONG) __syncthreads(); // the unit", ("desc", "tsan")),
    Fault("a unit waited for too late", LINEAR, "cp_async_wait<S::kCount - 2>();",
          "if (WRONG) cp_async_wait<S::kCount - 1>(); else cp_async_wait<S::kCount - 2>();"),
    Fault("sums over stages that are read", LINEAR, "__syncthreads(); // all have",
          "if (!WRONG) __syncthreads(); // all have", ("tsan",)),
    Fault("a block leaves while its sums are read", LINEAR, "if (shares > 1) cluster_sync(); // nobody",
          "if (shares > 1 && !WRONG) cluster_sync(); // nobody"),
    Fault("sums read before they are there", LINEAR, "if (shares > 1) cluster_sync();\n",
          "if (shares > 1 && !WRONG) cluster_sync();\n"),
    Fault("rows of x beyond the last are read", LINEAR, "x_row + 16 * i < p.n ? 16 : 0",
          "WRONG || x_row + 16 * i < p.n ? 16 : 0", ("asan",)),
    Fault("escapes of a neighbouring band", LINEAR, "number >= begin && number < end",
          "number >= begin - WRONG * 2 * p.columns() && number < end", ("asan",)),
    Fault("offsets not clamped", LINEAR, "uint64_t(p.escapes)), from",
          "WRONG ? ~0ull : uint64_t(p.escapes)), from", ("asan",)),
    Fault("escapes added by every part", LINEAR, "band, part, p.splits, lane);",
          "band, WRONG ? 0 : part, WRONG ? 1 : p.splits, lane);"),
    Fault("escapes of rows 8 and beyond", LINEAR, "pair[0].row == g + 8 ? ", "!WRONG && pair[0].row == g + 8 ? "),
    Fault("no bias behind parts", LINEAR, "rounded(y, p.bias, at % p.rows)", "rounded(y, WRONG ? nullptr : p.bias, at % p.rows)"),
    Fault("a code across two words", UNITS, "__funnelshift_r(words[word], words[word + 1], bit - 7)",
          "__funnelshift_r(words[word], words[word + !WRONG], bit - 7)"),
    Fault("the second field in the first's place", UNITS, "<< 23;", "<< (WRONG ? 7 : 23);"),
    Fault("the sign left out", UNITS, "0x807f807fu", "(WRONG ? 0x007f007fu : 0x807f807fu)"),
    Fault("codes of odd quarters not shifted", UNITS, "16 * (t & 1)", "16 * (t & 1 & !WRONG)"),
    Fault("rows beyond the last are read as they are", UNITS, "min(p.rows - band * kUnitRows, int64_t(kUnitRows))",
          "(WRONG ? 16 : min(p.rows - band * kUnitRows, int64_t(kUnitRows)))", ("asan",)),
    Fault("tiles: registers 1 and 2 exchanged", UNITS, "{g + 8 * (r & 1),", "{g + 8 * (WRONG ? r >> 1 : r & 1),"),
]  # fmt: skip


def patches() -> list[build.Patch]:
    """Each fault beside what is right, chosen by its number; 0 is none."""
    made = [(UNITS, "constexpr int kUnitRows", "inline int fault = 0;\nconstexpr int kUnitRows")]
    for number, fault in enumerate(FAULTS, 1):
        made.append((fault.file, fault.old, fault.new.replace("WRONG", f"(fault == {number})")))
    return made


def library(variant: str) -> Path:
    return build.build(variant, patches(), only="lossless_linear")


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_without_a_fault(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMU_ORDER", order)
    plant(library("plain"), 0)
    for case in small_cases():
        run(library("plain"), case)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.what)
def test_fault_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    number = FAULTS.index(fault) + 1
    for who in fault.found_by:
        if who in ("asan", "tsan"):
            code, output = build.run_sanitized(who, library(who), str(number), module="lossless_linear")
            assert code != 0 and ("data race" if who == "tsan" else "AddressSanitizer") in output, output
            continue
        monkeypatch.setenv("EMU_ORDER", who)
        plant(library("plain"), number)
        found = False
        for case in small_cases():
            try:
                run(library("plain"), case)
            except (AssertionError, RuntimeError):
                found = True
                break
        plant(library("plain"), 0)
        assert found, f"not found in order {who}"
