"""Planted faults: the checks of test_cuda_codec.py must find every one. All are in one build, and one at a time is on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import lossless_blobs
from cuda_host import build
from cuda_host.lossless import Case, plant, save
from fastloss.lossless.contract import PLAN_HEAD, Layout, Section
from fastloss.lossless.reference import lossless_decode
from lossless_calls import checksums, decoded, gathered, p7_encoders, r8_encoders
from lossless_cases import bits, mostly_normal

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")


@functools.cache
def cases() -> list[Case]:
    """A few calls of every kernel, and blobs whose escape positions and offsets are out of range."""
    half, wide = mostly_normal(16384 + 137, torch.bfloat16), mostly_normal(4001, torch.float32)
    p7, r8 = lossless_blobs.p7(half), lossless_blobs.r8(half, coded=(0,))
    found = [
        decoded(p7), decoded(p7, 77, 16400), decoded(r8), decoded(lossless_blobs.r8(wide, coded=(1,))),
        decoded(lossless_blobs.r8(mostly_normal(200, torch.float8_e4m3fn))), decoded(lossless_blobs.p7(wide)),
        decoded(lossless_blobs.p7(mostly_normal(3000, torch.float16))),
        decoded(lossless_blobs.p7(mostly_normal(8192, torch.bfloat16), 256, Layout.TILES)),
        gathered(lossless_blobs.p7(half[:3007], 31), torch.tensor([96, 0, 97, -1])),
        gathered(lossless_blobs.r8(half[:3007], 31), torch.tensor([96, 0, 97, -1])),
        *checksums()[:8], *p7_encoders(half), *r8_encoders(half),
    ]  # fmt: skip
    at, count = p7.plan[PLAN_HEAD + 2 * Section.ESCAPE_OFFSETS : PLAN_HEAD + 2 * Section.ESCAPE_OFFSETS + 2]
    bad = p7.blob.clone()
    bad[at + 8 : at + count] = 127
    found.append(Case("decode", [bad.numpy(), p7.plan, 0, half.numel(), 2], None))
    at, count = p7.plan[PLAN_HEAD + 2 * Section.ESCAPE_POSITIONS : PLAN_HEAD + 2 * Section.ESCAPE_POSITIONS + 2]
    bad = p7.blob.clone()
    bad[at : at + count] = torch.tensor(
        [8195 % 256, 8195 // 256] * (count // 2), dtype=torch.uint8
    )  # in the next block
    want = bits(lossless_decode(bad, p7.plan, 0, half.numel(), half.dtype)).numpy()
    found.append(Case("decode", [bad.numpy(), p7.plan, 0, half.numel(), 2], want))
    bad = r8.blob.clone()
    at, count = r8.plan[PLAN_HEAD + 2 * Section.FIELD_OFFSETS : PLAN_HEAD + 2 * Section.FIELD_OFFSETS + 2]
    bad[at + 8 : at + count] = 127
    found.append(Case("decode", [bad.numpy(), r8.plan, 0, half.numel(), 2], None))
    return found


class Fault(NamedTuple):
    """What is wrong, where, and who must see it: thread orders (results or the emulator's own checks), or a sanitizer."""

    what: str
    file: str
    old: str
    new: str  # of a statement if `old` ends in ";", else of an expression; nothing for a barrier, with its comment
    found_by: tuple[str, ...] = ("asc",)


P7, PAIRS, ROWS, R8, CRC = "p7_decode.cu", "p7_pairs.cuh", "p7_rows.cu", "r8_decode.cu", "crc32c.cu"
P7_ENCODE, R8_ENCODE, NUMBERS, SLOTS = "p7_encode.cu", "r8_encode.cu", "lossless_numbers.cuh", "r8_slots.cuh"
#: An offset as it is stored, and clamped.
OFFSET = "int64_t(__ldg(reinterpret_cast<const long long *>({}) + at))"
FAULTS = [
    Fault("codes read before they are there", P7, "__syncthreads(); // codes and table", "", ("desc", "tsan")),
    Fault("escapes written before what they replace", P7, "__syncthreads(); // all is stored", "", ("desc", "tsan")),
    Fault("the table of another lane's bank", P7, "unsigned(lane) * 4", "unsigned(lane) * 4 + 128"),
    Fault("rows of a tile not exchanged", P7, "exchange(v, lane);", ";"),
    Fault("positions beyond the block", PAIRS, "if (position >= kLosslessBlock / 2) continue;", ";", ("desc",)),
    Fault(
        "escapes beyond the list", PAIRS, f"min(c.escapes, {OFFSET.format('c.escape_offsets')})",
        OFFSET.format("c.escape_offsets"), ("asan",),
    ),
    Fault("a number beyond the last", NUMBERS, "at + k >= low && at + k < high", "at + k >= low", ("asan",)),
    Fault("the sign of fp32 in its mantissa", NUMBERS, "(4 + at) << 12 | (4 + at) << 8 | 0x10", "(4 + at) << 8 | 0x10"),
    Fault("an id out of bounds", ROWS, "row < 0 || row >= c.rows", "row < 0"),
    Fault("a byte of the stream too late", R8, "cursor + __popc(hungers & below)", "cursor + __popc(hungers & below) + 1"),
    Fault("escapes in the wrong order", R8, "literal - 1 - __popc(escapes & below)", "literal - 1"),
    Fault("bytes read before they are there", R8, "__syncwarp(); // bytes are there", "", ("asc", "tsan")),
    Fault("bytes overwritten before they are read", R8, "__syncwarp(); // bytes are read", "", ("tsan",)),
    Fault(
        "a payload beyond its data", R8, f"min(plane.data_bytes, {OFFSET.format('plane.offsets')})",
        OFFSET.format("plane.offsets"), ("asan",),
    ),
    Fault("slots of lanes too far below", SLOTS, "lane >= int(step)", "lane > int(step)"),
    Fault("the wrong byte of a remainder", CRC, "remainder >> 16 & 255", "remainder >> 15 & 255"),
    Fault("bytes before a piece", CRC, "at + k >= start", "at + k >= start - 4"),
    Fault("a sum of too few lanes", CRC, "lane >> k & 1", "k < 4 && (lane >> k & 1)"),
    Fault("codes overwritten before they are read", P7_ENCODE, "__syncthreads(); // codes are read", "", ("tsan",)),
    Fault("escapes of a warp left out", P7_ENCODE, "next += of_warp[w];", "if (w) next += of_warp[w];"),
    Fault("literals forwards", R8_ENCODE, "__popc(escapes) - 1 - __popc(escapes & below)", "__popc(escapes & below)"),
    Fault("a state reduced too early", R8_ENCODE, "x >= f << 8", "x >= f << 7"),
]  # fmt: skip


def patches() -> list[build.Patch]:
    """Each fault beside what is right, chosen by its number; 0 is none."""
    header = "lossless_codecs.h"  # every kernel includes it
    made = [(header, "struct CudaLosslessDecode", "inline int fault = 0;\nstruct CudaLosslessDecode")]
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
    return build.build(variant, patches(), only="lossless")


def found(number: int, path: Path) -> bool:
    """Whether one of the cases sees the fault."""
    plant(path, number)
    try:
        for case in cases():
            case.run(path)
    except (AssertionError, RuntimeError):
        return True
    finally:
        plant(path, 0)
    return False


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases, for the sanitizers."""
    path = tmp_path_factory.mktemp("faults") / "cases.npz"
    save(path, cases())
    return path


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_without_a_fault(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMU_ORDER", order)
    assert not found(0, library("plain"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.what)
def test_fault_is_found(fault: Fault, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = FAULTS.index(fault) + 1
    for who in fault.found_by:
        if who in ("asan", "tsan"):
            code, output = build.run_sanitized(who, library(who), str(written), str(number), module="lossless")
            assert code != 0 and ("data race" if who == "tsan" else "AddressSanitizer") in output, output
        else:
            monkeypatch.setenv("EMU_ORDER", who)
            assert found(number, library("plain")), f"not found in order {who}"
