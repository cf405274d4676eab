"""row_stats.cu on the host, in several thread orders, against float64: every mode, dtype, feature and shape of launch."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from cuda_host import build
from cuda_host.reference import ARGMAX, ENTROPY, SUM, SUMSQ, TEMPERED, Row, gradient, statistics
from cuda_host.rows import (
    BOTH,
    CODES,
    EVERYTHING,
    GRADIENT,
    HARD,
    STATS,
    Case,
    CRowStats,
    Limits,
    Plan,
    run,
    small_cases,
)

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")
MODES = pytest.mark.parametrize("mode", [STATS, GRADIENT, BOTH], ids=["stats", "gradient", "both"])
DTYPES = pytest.mark.parametrize("dtype", list(CODES))
H200 = Limits(132, 8, 227 << 10, 228 << 10)
A100 = Limits(108, 1, 163 << 10, 164 << 10)


@pytest.fixture(params=["asc", "desc", "7"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain build, with threads in one of three orders."""
    monkeypatch.setenv("EMU_ORDER", request.param)
    return build.build()


@MODES
@DTYPES
@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_hard_target(library: Path, mode: int, dtype: str, slices: int) -> None:
    for v, keep in [(1, True), (2, False), (37, True), (1000, False), (2051, True)]:
        run(library, Case(v, mode, dtype, HARD, slices=slices, keep=keep))


@DTYPES
@pytest.mark.parametrize("want", [0, SUM])
def test_margin_form(library: Path, dtype: str, want: int) -> None:
    """Plain cross entropy where p_y is 0.9, 0.9999 and all but 1: the gradient of the target keeps all its digits."""
    for v in (2, 1, 257):
        run(library, Case(v, BOTH, dtype, ("sure", "surer", "certain", "offset", "huge"), want=want, nll_only=True))


MARGIN_LOSSES = {
    "comp_sum": (1, 0.5, 80.0),
    "comp_sum_steep": (1, 2.5, 80.0),
    "truncated": (2, 0.7, 0.1),
    "focal": (3, 2.0, 0.0),
    "unlikelihood": (4, 0.0, 0.0),
    "symmetric": (5, 0.3, 4.0),
    "asymmetric_unhinged": (6, 1.5, 0.7),
    "asymmetric_general": (7, 0.5, 0.3),
    "shifted": (8, 1.5, 0.5),
    "pass_at_n": (9, 16.0, 0.0),
}


@pytest.mark.parametrize("loss", list(MARGIN_LOSSES))
@pytest.mark.parametrize("want", [0, SUM], ids=["lean", "general"])
def test_margin_losses(loss: str, want: int) -> None:
    """Other losses of the margin in the place of the nll, by their slopes."""
    rows = ("plain", "sure", "surer", "certain", "offset", "ignored", "above", "nothing", "alone", "nan", "flat")
    for v, dtype in itertools.product((1, 2, 257), CODES):
        run(build.build(), Case(v, BOTH, dtype, rows, want=want, margin=MARGIN_LOSSES[loss], slices=1 + v % 2))
    run(build.build(), Case(120, BOTH, "fp32", ("lost", "huge", "inf"), want=want, margin=MARGIN_LOSSES[loss]))
    run(build.build(), Case(120, BOTH, "bf16", rows, want=want, margin=MARGIN_LOSSES[loss], scale=0.5, softcap=20))


@MODES
@DTYPES
def test_every_statistic(library: Path, mode: int, dtype: str) -> None:
    for v, slices in [(1, 2), (3, 1), (530, 2), (1003, 1)]:
        run(library, Case(v, mode, dtype, HARD, want=EVERYTHING, weight=True, slices=slices, keep=slices == 2))


@MODES
@pytest.mark.parametrize("want", [ENTROPY, SUM, SUMSQ, TEMPERED, ARGMAX])
def test_one_statistic(library: Path, mode: int, want: int) -> None:
    run(library, Case(261, mode, "bf16", HARD, want=want))


@MODES
@DTYPES
def test_target_probabilities(library: Path, mode: int, dtype: str) -> None:
    for prob_dtype in ("fp32", dtype):
        run(library, Case(531, mode, dtype, HARD, "prob", prob_dtype, want=SUM, slices=2))
        run(library, Case(264, mode, dtype, HARD, "prob", prob_dtype, weight=True, in_place=True))


@MODES
@DTYPES
def test_scale_and_softcap(library: Path, mode: int, dtype: str) -> None:
    for scale, softcap in [(0.3, 0.0), (-1.0, 0.0), (1.0, 15.0), (1.7, 30.0)]:
        run(library, Case(291, mode, dtype, HARD, want=EVERYTHING, scale=scale, softcap=softcap))


@MODES
def test_no_target(library: Path, mode: int) -> None:
    run(library, Case(277, mode, "fp16", HARD, "none"))
    run(library, Case(277, mode, "fp16", HARD, "none", want=EVERYTHING, slices=2))


@MODES
@DTYPES
def test_unaligned(library: Path, mode: int, dtype: str) -> None:
    """Views that start anywhere, rows that end anywhere, a gradient aligned otherwise than its logits."""
    for v, offset, want in itertools.product([5, 16, 171], [0, 1, 3], [0, SUM]):
        run(library, Case(v, mode, dtype, want=want, offset=offset, out_offset=2 * offset % 5, pad=offset, slices=2))


@DTYPES
@pytest.mark.parametrize("want", [0, SUM])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "read again"])
def test_in_place(library: Path, dtype: str, want: int, keep: bool) -> None:
    for mode, offset in [(BOTH, 0), (BOTH, 3), (GRADIENT, 1)]:
        run(library, Case(1203, mode, dtype, HARD, want=want, keep=keep, offset=offset, slices=2, in_place=True))


@MODES
def test_one_row_for_all(library: Path, mode: int) -> None:
    run(library, Case(333, mode, rows=("plain",) * 3, expanded=True))


def test_more_rows_than_a_grid_has_blocks(library: Path) -> None:
    for mode, want in itertools.product([STATS, GRADIENT, BOTH], [0, SUM]):
        run(library, Case(40, mode, rows=HARD, want=want, rows_per_launch=4))


@pytest.mark.parametrize("threads", [64, 128, 256, 512])
def test_block_sizes(library: Path, threads: int) -> None:
    run(library, Case(9001, BOTH, "bf16", threads=threads, slices=2))
    run(library, Case(9001, BOTH, "bf16", threads=threads, want=EVERYTHING))


def test_a_row_of_a_large_vocabulary(library: Path) -> None:
    run(library, Case(128256, BOTH, "bf16", ("plain",), threads=256, slices=4))


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("v", [1000, 50257, 128256])
def test_as_launched(device: Limits, v: int) -> None:
    """By way of row_stats_cuda and its plan, as the package calls it."""
    for mode, want in itertools.product([STATS, GRADIENT, BOTH], [0, EVERYTHING]):
        run(build.build(), Case(v, mode, "bf16", want=want), limits=device)


def plan(case: Case, n: int, device: Limits) -> Plan:
    """What row_stats_plan says for n rows of the case."""
    call, result = CRowStats(), Plan()
    call.n, call.v, call.dtype, call.mode = n, case.v, CODES[case.dtype], case.mode
    call.want, call.scale = case.want, 1.0
    call.target = 1  # an address that is not followed
    build.load(build.build()).c_plan(ctypes.byref(call), ctypes.byref(device), ctypes.byref(result))
    return result


@pytest.mark.parametrize(
    ("v", "n", "mode", "device", "slices", "keep", "threads"),
    [
        (128256, 8192, BOTH, H200, 4, True, 256),  # three blocks of 63 KiB on a multiprocessor
        (128256, 1, BOTH, H200, 8, True, 256),  # one row: all the blocks that can share it
        (128256, 1, STATS, H200, 8, False, 256),
        (1000, 8192, BOTH, H200, 1, True, 64),
        (1000, 1, BOTH, H200, 1, True, 64),  # too short to share
        (2_000_000, 64, BOTH, H200, 8, False, 256),  # does not fit eight multiprocessors: read again
        (800_000, 64, BOTH, H200, 8, True, 512),  # one block on a multiprocessor
        (128256, 8192, STATS, H200, 1, False, 256),
        (128256, 8192, GRADIENT, H200, 8, False, 256),  # blocks that do not talk to each other
        (50257, 8192, BOTH, A100, 1, True, 512),
        (128256, 8192, BOTH, A100, 1, False, 256),
    ],
)
def test_plan(v: int, n: int, mode: int, device: Limits, slices: int, keep: bool, threads: int) -> None:
    got = plan(Case(v, mode, "bf16"), n, device)
    assert (got.slices, got.keep, got.threads, got.cluster) == (slices, keep, threads, mode != GRADIENT and slices > 1)
    assert 0 < got.rows_per_launch * slices < 2**31


def test_what_it_does_not_take() -> None:
    call = CRowStats()
    why_not = build.load(build.build()).c_why_not
    call.v, call.dtype, call.prob_dtype, call.prob = 2**31 - 1, CODES["bf16"], CODES["fp32"], 1
    assert why_not(ctypes.byref(call)) is None
    call.prob_dtype = CODES["fp16"]
    assert b"dtype of the logits" in why_not(ctypes.byref(call))
    call.v = 2**31
    assert b"V must be below 2^31" in why_not(ctypes.byref(call))


@DTYPES
@pytest.mark.parametrize("want", [0, SUM], ids=["lean", "general"])
def test_gradient_that_stands_already(dtype: str, want: int) -> None:
    """An upstream gradient of 1, on the device, leaves dlogits as it is; any other makes it anew."""
    v, number = 301, {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[dtype]
    z, row, stats = np.zeros((2, v), number), np.ones((7, 2), np.float32), np.zeros((8, 2), np.float32)
    target = np.array([3, 300], np.int64)
    call, library = CRowStats(), build.load(build.build())
    call.logits, call.row, call.stats, call.target = (a.ctypes.data for a in (z, row, stats, target))
    call.n, call.v, call.ld, call.ld_out, call.ignore_index = 2, v, v, v, -100
    call.dtype, call.mode, call.want, call.scale = CODES[dtype], GRADIENT, want, 1.0
    for value in (1.0, 0.5):
        out, upstream = np.full((2, v), 7, number), np.array([value], np.float32)
        call.dlogits, call.upstream = out.ctypes.data, upstream.ctypes.data
        assert library.c_run(ctypes.byref(call), ctypes.byref(H200)) is None
        assert (out == 7).all() if value == 1 else (out != 7).all()


@DTYPES
@pytest.mark.parametrize("n, offset", [(1, 0), (37, 0), (5000, 0), (301, 1)])
def test_scale(dtype: str, n: int, offset: int) -> None:
    """x *= factor, vectors, tail and unaligned; nothing is written where the factor is 1."""
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    library = build.load(build.build())
    for factor in (1.0, 0.3):
        x = torch.randn(n + offset + 8).to(kind)
        want = x.clone()
        want[offset : offset + n] = (want[offset : offset + n].float() * factor).to(kind)
        number = torch.tensor([factor])
        address = ctypes.c_void_p(x.data_ptr() + offset * x.element_size())
        error = library.c_scale(
            address, CODES[dtype], ctypes.c_int64(n), ctypes.c_void_p(number.data_ptr()), ctypes.byref(H200)
        )
        assert error is None
        assert torch.equal(x, want)


def test_no_rows() -> None:
    """A launch of no blocks would be an error here and on a GPU."""
    call, library = CRowStats(), build.load(build.build())
    call.v = 5
    assert library.c_run(ctypes.byref(call), ctypes.byref(H200)) is None


@pytest.mark.parametrize("kind", ["hard", "prob"])
def test_reference_is_the_derivative(kind: str) -> None:
    """What the kernels are held to is what autograd makes of the statistics, their reference point held fixed."""
    rng = torch.Generator().manual_seed(3)
    v, y, scale, softcap, temperature = 23, 4, 0.7, 9.0, 1.7
    logits = torch.randn(v, generator=rng, dtype=torch.float64).mul(3).requires_grad_()
    weight, coef = (torch.rand(k, generator=rng, dtype=torch.float64) for k in (v, 7))
    prob = torch.rand(v, generator=rng, dtype=torch.float64).softmax(0) if kind == "prob" else None
    z = softcap * torch.tanh(scale * logits / softcap)
    rest = torch.ones(v, dtype=torch.bool) if prob is not None else torch.arange(v) != y
    ref = z[rest].max().detach()
    x = z - ref
    picked = z[y] if prob is None else (prob * weight * x).sum()
    tempered = (x[rest] / temperature).logsumexp(0) * temperature
    terms = [picked, x[rest].logsumexp(0), None, (weight * x).sum(), (x * x).sum() / 2, tempered]
    arg = z[z.argmax()]
    sum(c * t for c, t in zip(coef, [*terms, arg], strict=True) if t is not None).backward()

    y_or_q = (None, prob.numpy()) if prob is not None else (y, None)
    row = Row(logits.detach().numpy(), *y_or_q, weight.numpy(), temperature, EVERYTHING - ENTROPY, scale, softcap)
    stats, _ = statistics(row)
    got, _ = gradient(row, coef.numpy(), stats, int(z.argmax()))
    torch.testing.assert_close(torch.from_numpy(got), logits.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", range(len(small_cases())))
def test_small_cases(library: Path, number: int) -> None:
    run(library, small_cases()[number])


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitized(variant: str) -> None:
    """Out of bounds and races: these cases are small, with rows that end where their memory ends."""
    code, output = build.run_sanitized(variant, build.build(variant))
    assert code == 0, output
