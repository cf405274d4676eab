"""row_terms.cu on the host, in several thread orders, against float64; and planted faults, which must all be found."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import fastloss  # noqa: F401  registers the reference
from cuda_host import build
from cuda_host.reference import ARGMAX, ENTROPY, SUM, SUMSQ
from cuda_host.rows import CODES, GRADIENT, STATS, Limits, Plan
from cuda_host.terms import EVERYTHING, HARD, Case, CRowTerms, run, small_cases
from cuda_host.terms_truth import (
    KL,
    MIXTURE,
    SCORE_MEAN,
    SUBSET,
    TEACHER,
    TEACHER_MEAN,
    TERM,
    TOTAL_VARIATION,
    Row,
    gradient,
    statistics,
)
from fastloss import reference_terms

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")
H200 = Limits(132, 8, 227 << 10, 228 << 10)
A100 = Limits(108, 1, 163 << 10, 164 << 10)
TERMS = pytest.mark.parametrize("term", range(1, 7), ids="kl mixture total_variation log_cosh bce_logits bce".split())


@pytest.fixture(params=["asc", "desc", "7"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain build, with threads in one of three orders."""
    monkeypatch.setenv("EMU_ORDER", request.param)
    return build.build()


@TERMS
def test_terms(library: Path, term: int) -> None:
    """Every pair of dtypes; temperatures, soft caps, numbers of listed columns and shapes of launch in turn."""
    for i, (dtype, teacher) in enumerate(itertools.product(CODES, CODES)):
        more = {"temperature": bool(i % 2), "softcap": 15.0 * (i % 3 == 1), "k": (0, 1, 3)[(i + term) % 3]}
        run(library, Case(261 + i, dtype, teacher, term=term, rows=HARD, threads=32, slices=1 + i % 3, **more))


@TERMS
@pytest.mark.parametrize("temperature", [False, True])
def test_ids_and_unaligned_rows(library: Path, term: int, temperature: bool) -> None:
    for k, dtype, offset in zip((0, 1, 3), CODES, (1, 3, 5), strict=True):
        for v in (1, 2, 7, 8, 61):
            places = {"offset": offset, "teacher_offset": offset + (v == 61), "out_offset": 2, "pad": offset}
            run(library, Case(v, dtype, dtype, term=term, k=k, temperature=temperature, slices=2, **places))


@pytest.mark.parametrize("want", [0, ENTROPY, SUM, SUMSQ, ARGMAX, TEACHER, TEACHER_MEAN, SCORE_MEAN, TERM, SUBSET])
def test_one_statistic(library: Path, want: int) -> None:
    run(library, Case(261, "bf16", "fp32", want=want, rows=HARD, k=3))
    run(
        library,
        Case(261, "fp32", "fp32" if want & (TEACHER | TEACHER_MEAN | SCORE_MEAN | TERM) else None, want=want, k=0),
    )


@pytest.mark.parametrize("numbers", [(1.0, 0.0, 0.5), (0.0, 1.0, 0.5), (0.3, 0.9, 0.1)])
def test_directions(library: Path, numbers: tuple[float, float, float]) -> None:
    """A divergence whose factor is 0 does not count, though it be infinite."""
    for term in (KL, MIXTURE):
        run(library, Case(130, term=term, numbers=numbers, rows=("holes", "teacher holes", "huge", "alone", "alike")))


@pytest.mark.parametrize("dtype", list(CODES))
def test_generated_teacher(library: Path, dtype: str) -> None:
    narrow, wide = (-3.0, 0.06, 0.05), (-3.0, 0.06, 1.5)
    for want, term, numbers in [(SCORE_MEAN, 0, narrow), (SCORE_MEAN | TERM, TOTAL_VARIATION, wide), (TERM, KL, wide)]:
        rows = ("plain", "ignored", "offset", "holes")
        run(library, Case(101, dtype, None, want, term, numbers, rows=rows, value=True, slices=2, threads=32))


@pytest.mark.parametrize("scale, softcap", [(0.3, 0.0), (-1.0, 0.0), (1.7, 30.0)])
def test_scale_and_softcap(library: Path, scale: float, softcap: float) -> None:
    for term in (KL, TOTAL_VARIATION, 4):
        run(library, Case(191, "bf16", "bf16", term=term, rows=HARD, scale=scale, softcap=softcap))


def test_shared_teacher_subsets_and_ids_that_are_ignored(library: Path) -> None:
    run(library, Case(203, "bf16", "bf16", shared=True, rows=("plain", "twice", "offset")))
    run(library, Case(203, "fp32", "fp16", shared=True, rows=("plain", "twice", "offset"), slices=2))
    run(library, Case(203, want=EVERYTHING, empty_subset=True))
    run(library, Case(203, ignore_index=5, k=3, rows=("plain", "ignored", "absent", "twice")))


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "read again"])
def test_long_rows_in_place(library: Path, dtype: str, keep: bool) -> None:
    """More groups than threads; the gradient over the logits themselves."""
    rows = ("plain", "ignored", "twice", "above")
    run(library, Case(4200, dtype, "fp32", rows=rows, threads=256, keep=keep, in_place=True))
    run(library, Case(1003, dtype, "bf16", rows=rows, slices=4, keep=keep, offset=3, in_place=True, rows_per_launch=3))


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("v", [1000, 50257])
def test_as_launched(device: Limits, v: int) -> None:
    """By way of row_terms_cuda and its plan, as the package calls it."""
    run(build.build(), Case(v, "bf16", "bf16", rows=("plain", "twice"), want=TERM), limits=device)


@pytest.mark.parametrize(
    ("v", "n", "mode", "teacher", "device", "slices", "keep", "threads"),
    [
        (128256, 8192, STATS, True, H200, 8, True, 256),  # 64 KiB of logits and teacher a block: three fit
        (128256, 8192, STATS, False, H200, 4, True, 256),
        (128256, 8192, GRADIENT, True, H200, 16, True, 256),  # blocks that do not talk to each other
        (128256, 1, GRADIENT, True, H200, 64, True, 128),
        (1000, 8192, STATS, True, H200, 1, True, 64),
        (128256, 8192, STATS, True, A100, 1, False, 256),  # no clusters: read again in every pass
        (4_000_000, 64, STATS, True, H200, 8, False, 256),
    ],
)
def test_plan(v: int, n: int, mode: int, teacher: bool, device: Limits, slices: int, keep: bool, threads: int) -> None:
    call, plan = CRowTerms(), Plan()
    call.n, call.v, call.mode, call.dtype, call.teacher_dtype = n, v, mode, CODES["bf16"], CODES["bf16"]
    call.teacher = int(teacher)  # an address that is not followed
    build.load(build.build()).c_terms_plan(ctypes.byref(call), ctypes.byref(device), ctypes.byref(plan))
    assert (plan.slices, plan.keep, plan.threads) == (slices, keep, threads)
    assert plan.cluster == (mode == STATS and slices > 1) and 0 < plan.rows_per_launch * slices < 2**31


def test_what_it_does_not_take() -> None:
    call, library = CRowTerms(), build.load(build.build())
    for field, number, text in (("v", 2**31, b"V must be below 2^31"), ("k", 8193, b"at most 8192 listed columns")):
        call.v, call.k = 5, 0
        setattr(call, field, number)
        assert text in library.c_terms_run(ctypes.byref(call), ctypes.byref(H200))
    call.v, call.k = 5, 0
    assert library.c_terms_run(ctypes.byref(call), ctypes.byref(H200)) is None  # no rows


@TERMS
def test_truth_is_the_reference(term: int) -> None:
    """What the kernels are held to is what the float64 of the package says, by other formulas."""
    v, k, rng = 23, 3, np.random.default_rng(term)
    z, t, coef = rng.normal(0, 3, v), rng.normal(0, 3, v), rng.normal(0, 1, 10 + k)
    listed, subset = np.array([3, -1, 3]), rng.random(v) < 0.5
    row = Row(z, listed, t, None, subset, 1.7, -100, EVERYTHING, 0.7, 9.0, term, 0.6, 0.3, 0.2)
    logits, temperature = torch.from_numpy(z)[None], torch.tensor([1.7], dtype=torch.float64)
    tail = (
        logits, torch.from_numpy(listed)[None], torch.from_numpy(t)[None], None, torch.from_numpy(subset), temperature, -100,
        EVERYTHING, 0.7, 9.0, term, 0.6, 0.3, 0.2,
    )  # fmt: skip
    stats, argmax = reference_terms.row_terms(*tail)
    # kl and mixture sum to the same in the two forms, with slopes that are those of the contract
    np.testing.assert_allclose(statistics(row)[0], stats[:, 0].numpy(), rtol=1e-10, atol=1e-10)
    dlogits = reference_terms.row_terms_backward(torch.from_numpy(coef)[:, None], stats, argmax, *tail)
    right, _ = gradient(row, coef, stats[:, 0].numpy(), int(argmax[0]))
    np.testing.assert_allclose(right, dlogits[0].numpy(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_small_cases(library: Path, case: Case) -> None:
    run(library, case)


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitized(variant: str) -> None:
    """Out of bounds and races."""
    code, output = build.run_sanitized(variant, build.build(variant), module="terms")
    assert code == 0, output


class Fault(NamedTuple):
    """What is wrong, in which file, and the expression that it stands for."""

    what: str
    file: str
    right: str
    wrong: str


ROW, COLUMNS = "row_terms.cuh", "row_terms_columns.cuh"
SUMS, SLOPES, LAUNCH = "row_terms_statistics.cuh", "row_terms_gradient.cuh", "row_terms.cu"
FAULTS = [
    Fault("tail skipped", COLUMNS, "t >= head + tail", "t >= head"),
    Fault("alignment of the row ignored", COLUMNS, "(kGroup - past) % kGroup", "0"),
    Fault("alignment of the teacher ignored", COLUMNS, "teacher_ + int64_t(first_) * teacher_size()", "nullptr"),
    Fault("the teacher kept over the logits", COLUMNS, "groups_ * (kGroup / kWidth<T>)", "0"),
    Fault("no barrier after the ids", COLUMNS, "__syncthreads_or(bad)", "bad"),
    Fault("an id above V used as an index", SUMS, "id >= p.v", "false"),
    Fault("groups of other blocks", COLUMNS, "rank * each", "0"),
    Fault("a block leaves while its part is read", SUMS, "cluster_wait()", "void()"),
    Fault("the higher of two equal columns", SUMS, "a.at < b.at", "a.at > b.at"),
    Fault("listed columns in the sum of the rest", SUMS, "c.listed >> k & 1 ? 0 : power[k]", "power[k]"),
    Fault("0 * inf", ROW, "weight == 0 ? 0 : weight * x", "weight * x"),
    Fault("an infinity with the factor 0", ROW, "product(p.a, prob - q - qu)", "p.a * (prob - q - qu)"),
    Fault(
        "the teacher without its temperature",
        ROW,
        "share(teacher_gap, warmth, teacher_scale)",
        "share(teacher_gap, kLog2e, teacher_scale)",
    ),
    Fault("exponentials at T in the rest", ROW, "warmth == kLog2e && rest_ref == all_ref", "rest_ref == all_ref"),
    Fault("an ignored row keeps its gradient", SLOPES, "store(out[j], 0)", "void()"),
    Fault("the softcap not differentiated", SLOPES, "c.z[k] / p.softcap", "0"),
    Fault("an id above V unseen", SLOPES, "read_listed(p, row, listed)", "read_listed(p, row, listed) && false"),
    Fault("a later launch starts at row 0", SUMS, "first_row + blockIdx.x / slices", "int64_t(blockIdx.x / slices)"),
]
CASES = [
    Case(131, "bf16", "bf16", rows=HARD, slices=2, threads=32, k=3, temperature=True, offset=3, rows_per_launch=5),
    Case(261, "bf16", "bf16", rows=HARD, term=TOTAL_VARIATION, softcap=15, slices=2, teacher_offset=1),
    Case(99, "bf16", "fp32", numbers=(0.0, 1.0, 0.5), rows=("holes", "teacher holes", "flat")),
]


@pytest.fixture(scope="module")
def faulty() -> Path:
    """All faults in one build, of which `planted_fault` chooses one."""
    dtypes = """p.dtype == kFloat32   ? launch_terms<float>
                           : p.dtype == kFloat16 ? launch_terms<__half>
                                                 : launch_terms<__nv_bfloat16>"""
    patches = [
        (LAUNCH, dtypes, "launch_terms<__nv_bfloat16>"),
        (COLUMNS, "#pragma once", '#pragma once\nextern "C" {\ninline int planted_fault = 0;\n}'),
    ]
    for number, (_, file, right, wrong) in enumerate(FAULTS, 1):
        patches.append((file, right, f"(planted_fault == {number} ? ({wrong}) : ({right}))"))
    return build.build("quick", patches, only="row_terms")


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("number", range(len(FAULTS) + 1), ids=["none", *(f.what for f in FAULTS)])
def test_fault_is_found(faulty: Path, number: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMU_ORDER", order)
    planted = ctypes.c_int.in_dll(build.load(faulty), "planted_fault")
    planted.value, found = number, ""
    try:
        for case in CASES:
            run(faulty, case)
    except (AssertionError, RuntimeError) as error:
        found = str(error)
    finally:
        planted.value = 0
    assert bool(found) == (number > 0), found or "not found"
