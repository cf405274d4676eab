"""Planted faults: the checks of test_cuda_bgemm.py must find every one. All are in one build, and one at a time is on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from cuda_host import build
from cuda_host.bits import Case, TopkCase, plant, run_any

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")

CASES = [
    Case(67, 70, 1100, "any", "odd3"),
    Case(20, 33, 600, "codes3", "ternary", int8=True),
    Case(5, 36, 77, "ternary", "binary", "fp32", "rcb"),
    Case(3, 70, 77, output="signs", epilogue="b"),
    TopkCase(5, 70, 33, 70, 2, scale="hard"),
    TopkCase(9, 300, 40, 5),
    TopkCase(3, 1300, 40, 40, 25),
]


# Large tiles are left out: they double the time of a build.
SMALL_TILES = [
    ("bgemm.cu", f"if (tile == {tile}) launch_tiles<BitTile<INT8, {size}>>(p, stream);\n  else", "")
    for tile, size in ((2, "256, 128, 64, 64, 6"), (1, "128, 128, 64, 64, 4"))
]


class Fault(NamedTuple):
    """What is wrong, where, and who must see it: thread orders (results or the emulator's own checks), or a sanitizer."""

    what: str
    file: str
    old: str
    new: str  # of a statement if `old` ends in ";", else of an expression; nothing for a barrier, with its comment
    found_by: tuple[str, ...] = ("asc", "desc")


TILES, GEMM, TOPK = "bit_tiles.cuh", "bgemm.cu", "hamming_topk.cu"
FAULTS = [
    Fault("a step is read before all of it is there", TILES, "__syncthreads(); // this step", "", ("desc", "tsan")),
    Fault("a step waited for too late", TILES, "cp_async_wait<Tile::STAGES - 2>();", "cp_async_wait<Tile::STAGES - 1>();"),
    Fault("rows beyond the last are read", TILES, "i * Tile::kRows < left_a ? 16 : 0", "16", ("asan",)),
    Fault("the factor of the last pair only", TILES, "p_.pairs.pair[pair].factor", "1"),
    Fault("odd weights without their inverse", TILES, "(before >> zeros) * inverse", "before >> zeros"),
    Fault("planes of b as those of a", TILES, "pair.b * p_.n", "pair.a * p_.n"),
    Fault("bits of int8 that overlap", TILES, "b[j][word] >> (bit + h) & kOnes", "b[j][word] >> bit & kOnes"),
    Fault("the stages overwritten while they are read", GEMM, "__syncthreads(); // all have", "", ("tsan",)),
    Fault("K times the offsets left out", GEMM, "e.constant + e.a_sums(m0 + r)", "e.a_sums(m0 + r)"),
    Fault("the popcounts of b left out", GEMM, "e.b_sums(column + c)", "0"),
    Fault("scales multiplied first", GEMM, "__fmul_rn(y[c], column_scale[c])", "acc[c] * (row_scale[r] * column_scale[c])"),
    Fault("NaN is positive", GEMM, "unsigned(c < left && y[c] >= 0)", "unsigned(c < left && !(y[c] < 0))"),
    Fault("a sign beyond the last column", GEMM, "row < p.m ? inside : 0", "e.output == kOutSigns ? 4 : row < p.m ? inside : 0"),
    Fault("signs not counted", GEMM, "atomicAdd(e.popcounts + row, __popc(signs));", ";"),
    Fault("a list shifted onto itself", TOPK, "__syncwarp(); // before is", "", ("asc", "tsan")),
    Fault("a key twice", TOPK, "before < key ? before : key", "key"),
    Fault("the rest of a list not shifted", TOPK, "if (__shfl_sync(kAllLanes, before, 0) > key) break;", "break;"),
    Fault("a column beyond the part", TOPK, "if (column + c >= end) score[c] = INT32_MIN;", ";"),
    Fault("a list that refuses what is better", TOPK, "max(score[0], score[1]) > worst", "min(score[0], score[1]) > worst"),
    Fault("NaN last", TOPK, "if (x != x) return INT32_MAX;", "if (x != x) return INT32_MIN + 1;"),
    Fault("-0 below 0", TOPK, "x == 0 ? 0 : __float_as_int(x)", "__float_as_int(x)"),
    Fault("lists merged before they are merged", TOPK, "__syncthreads(); // all lists", "", ("asc", "tsan")),
]  # fmt: skip


def patches() -> list[build.Patch]:
    """Each fault beside what is right, chosen by its number; 0 is none."""
    made = [*SMALL_TILES, (TILES, "constexpr int kStepBytes", "inline int fault = 0;\nconstexpr int kStepBytes")]
    for number, fault in enumerate(FAULTS, 1):
        if "; //" in fault.old:
            barrier, comment = fault.old.split(";")
            both = f"fault == {number} ? void() : {barrier};{comment}"
        elif fault.old.endswith(";"):
            both = f"if (fault == {number}) {{ {fault.new} }} else {{ {fault.old} }}"
        else:
            both = f"(fault == {number} ? {fault.new} : {fault.old})"
        made.append((fault.file, fault.old, both))
    return made


def library(variant: str) -> Path:
    return build.build(variant, patches(), only="bits")


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_without_a_fault(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMU_ORDER", order)
    plant(library("plain"), 0)
    for case in CASES:
        run_any(library("plain"), case)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.what)
def test_fault_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    number = FAULTS.index(fault) + 1
    for who in fault.found_by:
        if who in ("asan", "tsan"):
            code, output = build.run_sanitized(who, library(who), str(number), module="bits")
            assert code != 0 and ("data race" if who == "tsan" else "AddressSanitizer") in output, output
            continue
        monkeypatch.setenv("EMU_ORDER", who)
        plant(library("plain"), number)
        found = False
        for case in CASES:
            try:
                run_any(library("plain"), case)
            except (AssertionError, RuntimeError):
                found = True
                break
        plant(library("plain"), 0)
        assert found, f"not found in order {who}"
