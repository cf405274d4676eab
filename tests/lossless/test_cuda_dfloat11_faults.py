"""Planted faults: the checks of test_cuda_dfloat11.py must find every one. All are in one build, and one at a time is on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from cuda_host import build
from cuda_host.dfloat11_decode import plant, run, small_cases

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")
KERNEL = "dfloat11_decode.cu"


class Fault(NamedTuple):
    """What is wrong, where, and who must see it: thread orders (results or the emulator's own checks), or a sanitizer."""

    what: str
    old: str
    new: str  # with WRONG where the fault is to be on
    found_by: tuple[str, ...] = ("asc", "desc")


FAULTS = [
    Fault("words read before they are there", "__syncthreads(); // words",
          "if (!WRONG) __syncthreads(); // words", ("desc", "tsan")),
    Fault("symbols written before they are there", "__syncthreads(); // the symbols",
          "if (!WRONG) __syncthreads(); // the symbols"),
    Fault("symbols overwritten", "__syncthreads(); // before the next",
          "if (!WRONG) __syncthreads(); // before the next", ("tsan",)),
    Fault("sums read before they are there", "__syncthreads(); // all sums", "if (!WRONG) __syncthreads(); // all sums"),
    Fault("one round only", "round < here; round += kRound", "round < here; round += WRONG ? here : kRound"),
    Fault("a code of the next thread", "at + probe.last < end", "WRONG || at + probe.last < end"),
    Fault("a probe beyond its bits", "same.value != symbol.value", "!WRONG && same.value != symbol.value"),
    Fault("two bytes at most", "level < 4", "level < (WRONG ? 2 : 4)"),
    Fault("gaps of the wrong bits", "11 - int(5 * thread % 8)", "11 - int((5 + WRONG) * thread % 8)"),
    Fault("symbols beside the alignment of the numbers", "next + begin % 8", "next + begin % 8 * !WRONG"),
    Fault("spans beyond numel", "min(int64_t(p.output_positions[block + 1]), p.numel)",
          "min(int64_t(p.output_positions[block + 1]), p.numel + WRONG * 64)", ("asan",)),
    Fault("gaps beyond the last", "byte + 1 < p.gap_bytes ?", "WRONG || byte + 1 < p.gap_bytes ?", ("asan",)),
]  # fmt: skip


def patched(variant: str) -> Path:
    """All faults in one build; one at a time is on."""
    made = [
        (KERNEL, "namespace {\n\nconstexpr int kProbeBits", "int fault = 0;\nnamespace {\n\nconstexpr int kProbeBits")
    ]
    for number, fault in enumerate(FAULTS, 1):
        made.append((KERNEL, fault.old, fault.new.replace("WRONG", f"(fault == {number})")))
    return build.build(variant, made, only="dfloat11_decode")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.what)
def test_fault_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    number = FAULTS.index(fault) + 1
    for who in fault.found_by:
        if who in ("asan", "tsan"):
            code, output = build.run_sanitized(who, patched(who), str(number), module="dfloat11_decode")
            assert code != 0 and ("data race" if who == "tsan" else "AddressSanitizer") in output, output
            continue
        monkeypatch.setenv("EMU_ORDER", who)
        found = False
        for case in small_cases():
            plant(patched("plain"), number)
            try:
                run(patched("plain"), case)
            except (AssertionError, RuntimeError):
                found = True
            plant(patched("plain"), 0)
            run(patched("plain"), case)
        assert found, f"not found in order {who}"
