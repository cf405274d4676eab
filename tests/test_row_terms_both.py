"""A row's gradient made right after its statistics: the same as by two launches, at every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp, losses, reference_terms, registry
from fastloss.compiled import _C, MISSING
from fastloss.contract import Term, TermCoef, TermStat, Want
from fastloss.losses import catalogue
from fastloss.terms import TeacherHead
from test_row_terms import DTYPES, INF, ISAS, KERNEL, TERMS, Rows, ids, rows_of, same_bits
from tolerance import check_close, check_gradient

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))

#: The terms whose powers are kept; the others run both halves one after the other.
KEPT = (TERMS[0], TERMS[1], TERMS[3], (Term.MIXTURE, 0.1, 0.9, 0.1))
TERM = int(Want.TERM)


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each level of csrc/cpu/cpu.h in turn, forced."""
    if request.param > _C.best_isa():
        pytest.skip(f"needs {ISAS[request.param]}; the best of this machine is {_C.isa_name(_C.best_isa())}")
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Undoes torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def both(rows: Rows, shares: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """(stats, gradient)."""
    logits = rows.logits.clone()
    stats = KERNEL.row_terms_both_in_place(logits, *rows[1:], nll_share=shares[0], term_share=shares[1])
    return stats, logits


def coefficients(stats: Tensor, rows: Rows, shares: tuple[float, float]) -> Tensor:
    """Those of the loss shares[0] (-log p_y) + shares[1] term, by the contract."""
    coef = torch.zeros(TermCoef.LISTED + stats.shape[0] - TermStat.LISTED, stats.shape[1], dtype=stats.dtype)
    warm = 1.0 if rows.temperature is None else rows.temperature.to(stats.dtype)
    coef[TermCoef.TERM] = shares[1] / warm
    if rows.term < Term.LOG_COSH:
        coef[TermCoef.ALL] = -coef[TermCoef.TERM] * stats[TermStat.SLOPE]
    if shares[0]:
        margin = stats[TermStat.LISTED] - stats[TermStat.REST_MAX] - stats[TermStat.REST_LOGSUM]
        coef[TermCoef.REST] = shares[0] * torch.sigmoid(-margin)
        coef[TermCoef.LISTED] = -coef[TermCoef.REST]
    return coef


def nll(stats: Tensor) -> Tensor:
    """-log p of the listed column, from stats."""
    stats = stats.double()
    return torch.nn.functional.softplus(
        stats[TermStat.REST_MAX] + stats[TermStat.REST_LOGSUM] - stats[TermStat.LISTED], threshold=1e9
    )


def check(rows: Rows, shares: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Against the reference in float64, and as near to it as float32 torch or two launches of the kernel."""
    stats, got = both(rows, shares)
    narrow, wide = rows.cast(torch.float32), rows.cast(torch.float64)
    truth, top = reference_terms.row_terms(*wide)
    torch_stats, _ = reference_terms.row_terms(*narrow)
    allowed = torch.full_like(truth[0], 2e-7)
    near = (stats[TermStat.TERM].double() - truth[TermStat.TERM]).abs() <= allowed * 0.1
    check_close(
        torch.where(near, truth[TermStat.TERM], stats[TermStat.TERM])[None], torch_stats[TermStat.TERM][None],
        truth[TermStat.TERM][None], torch.float32, 16.0,
    )  # fmt: skip
    if shares[0]:
        torch.testing.assert_close(nll(stats), nll(truth), rtol=4e-6, atol=1e-6)
    expected = reference_terms.row_terms_backward(coefficients(truth, rows, shares), truth, top, *wide)
    plain = reference_terms.row_terms_backward(coefficients(torch_stats, rows, shares), torch_stats, top, *narrow)
    parts = max(map(abs, shares)) * (1 + truth[TermStat.TERM].abs().nan_to_num(0.0, 0.0, 0.0))  # the size of f_a
    cancelled = (got.double() - expected).abs() <= 4e-7 * parts[:, None]
    check_gradient(
        torch.where(cancelled, expected, got.double()), plain.to(got.dtype), expected, got.dtype,
        16.0 if got.dtype == torch.float32 else 2.0,
    )  # fmt: skip
    return stats, got


@pytest.mark.parametrize("term", (*KEPT, *TERMS), ids=lambda t: f"{t[0].name.lower()} {t[1:]}")
def test_every_term(isa: int, term: tuple[Any, ...]) -> None:
    """Lengths around blocks and vectors, with and without a target, at temperatures, scales and offsets."""
    case = 0
    for v in (1, 5, 37, 1030, 2051):
        for k, shares in ((0, (0.0, 0.3)), (1, (0.0, -0.5)), (1, (0.7, 0.3)), (1, (0.7, 0.0))):
            dtype, warm, case = DTYPES[case % 3], case % 4 == 1, case + 1
            if v == 1 and k:
                continue
            rows = rows_of(6, v, k, dtype, DTYPES[case % 3 - 1], want=TERM, term=term, warm=warm, shared=case % 5 == 3)
            rows = rows._replace(scale=0.7 if case % 2 else 1.0)
            if case % 5 == 4 and term[0] < Term.LOG_COSH:
                rows = rows._replace(logits=rows.logits + 200.0, teacher=rows.teacher - 400.0)
            if case % 3 == 2 and rows.teacher.shape[0] > 1 and term[0] < Term.LOG_COSH:  # near the student
                near = rows.scale * rows.logits.float() + 0.1 * torch.randn(rows.logits.shape)
                rows = rows._replace(teacher=near.to(rows.teacher.dtype))
            check(rows, shares)


@pytest.mark.parametrize("term", KEPT, ids=lambda t: f"{t[0].name.lower()} {t[1:]}")
def test_scores_that_rise(isa: int, term: tuple[Any, ...]) -> None:
    """Every block has larger scores than the one before it, of the student, the teacher or both; some beyond all range."""
    v = 5000
    for slope, teacher_slope in ((30.0, 0.0), (0.0, 30.0), (40.0, 40.0), (-30.0, 25.0), (4000.0, 4000.0)):
        ramp = torch.linspace(0, 1, v)
        logits, teacher = torch.randn(4, v) + slope * ramp, torch.randn(4, v) + teacher_slope * ramp
        if slope == 4000.0:
            logits[:, ::7] -= 3000.0
        for dtype in (torch.float32, torch.bfloat16):
            rows = Rows(logits.to(dtype), ids(4, v, 1), teacher, None, None, None, -100, TERM, 1.0, 0.0, *term)
            for shares in ((0.0, 1.0), (0.5, 0.5)):
                check(rows, shares)


@pytest.mark.parametrize("term", (*KEPT, TERMS[2]), ids=lambda t: f"{t[0].name.lower()} {t[1:]}")
def test_hard_rows(isa: int, term: tuple[Any, ...]) -> None:
    """Offsets, one huge logit (the target or not), -inf on the student's side, the teacher's, both; gaps of 120."""
    for dtype in (torch.float32, torch.bfloat16):
        rows = rows_of(12, 1100, 1, dtype, torch.float32, term=term, want=TERM)
        logits, teacher = rows.logits.clone(), rows.teacher.clone()
        logits[0] += 512.0
        teacher[1] += 1e4
        logits[3, 7], logits[4, rows.listed[4, 0]] = 90.0, 60.0
        logits[5, ::3], teacher[5, ::3], teacher[6, ::5] = -INF, -INF, -INF
        logits[7, :1050], teacher[7, :1050] = -INF, -INF
        rows.listed[5:8, 0] = torch.tensor([4, 1, 1070])
        logits[8, 3], teacher[8, 9] = 120.0, 120.0
        logits[9, 3], teacher[9, 3] = 120.0, -120.0
        for shares in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
            check(rows._replace(logits=logits.to(dtype), teacher=teacher), shares)


@pytest.mark.parametrize("term", TERMS[:7], ids=lambda t: f"{t[0].name.lower()} {t[1:]}")
def test_equal_distributions(isa: int, term: tuple[Any, ...]) -> None:
    """Value and gradient are 0, not small."""
    for dtype in DTYPES:
        for warm in (False, True):
            rows = rows_of(6, 2051, 1, dtype, dtype, warm=warm, term=term, want=TERM)
            stats, gradient = both(rows._replace(teacher=rows.logits), (0.0, 1.0))
            assert not stats[TermStat.TERM].any()
            if term in KEPT:
                assert not gradient.any()


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
def test_divergences_are_never_negative(isa: int, size: float) -> None:
    logits = torch.randn(8, 1517) * 2
    rows = Rows(logits, teacher=logits + torch.randn(8, 1517) * size, want=TERM)
    for term, a, b, c in KEPT:
        one = rows._replace(term=term, a=a, b=b, c=c)
        stats, _ = both(one, (0.0, 1.0))
        truth = reference_terms.row_terms(*one.cast(torch.float64))[0][TermStat.TERM]
        assert (stats[TermStat.TERM] >= 0).all()
        torch.testing.assert_close(stats[TermStat.TERM].double(), truth, rtol=4e-6 + 4e-7 / size, atol=0)


def test_ignored_and_bad_rows(isa: int) -> None:
    for term in KEPT:
        rows = rows_of(6, 1037, 1, torch.float32, torch.float32, want=TERM, term=term)
        rows.listed[:, 0] = torch.tensor([1, -100, 2000, -100, 5, 6])
        rows.logits[1] = rows.teacher[3] = torch.nan
        rows.logits[4, 9], rows.teacher[5, 9] = torch.nan, INF
        stats, gradient = both(rows, (0.5, 0.5))
        assert not stats[:, [1, 3]].any() and not gradient[[1, 3]].any()
        assert stats[TermStat.TERM, 4:].isnan().all() and gradient[[2, 4, 5]].isnan().all()
        assert stats[TermStat.TERM, 0].isfinite() and gradient[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_nothing_beyond_the_row(isa: int, dtype: torch.dtype) -> None:
    for term in KEPT:
        dense = rows_of(6, 1037, 1, dtype, dtype, term=term, want=TERM)
        stats, expected = both(dense, (0.5, 0.5))
        inside = torch.full((6, 1044), 5.0, dtype=dtype)
        view = inside[:, 3:1040]
        view.copy_(dense.logits)
        again = KERNEL.row_terms_both_in_place(view, *dense[1:], nll_share=0.5, term_share=0.5)
        assert same_bits(again, stats) and same_bits(view, expected)
        assert (inside[:, :3] == 5).all() and (inside[:, 1040:] == 5).all()


def test_thread_count_does_not_change_a_bit(threads: None) -> None:
    for term in KEPT:
        rows, results = rows_of(31, 1009, 1, torch.bfloat16, torch.float32, term=term, want=TERM), []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(both(rows, (0.5, 0.5)))
        assert all(same_bits(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_more_statistics_than_the_term(isa: int) -> None:
    """What the gradient has no part in is made all the same, by the general loops."""
    want = TERM | int(Want.ENTROPY | Want.TEACHER | Want.SCORE_MEAN)
    rows = rows_of(6, 1037, 1, torch.bfloat16, torch.float32, term=TERMS[0], want=want)
    stats, _ = check(rows, (0.5, 0.5))
    assert same_bits(stats, KERNEL.row_terms(*rows)[0])


def test_what_is_refused() -> None:
    rows = rows_of(6, 37, 2, torch.float32, torch.float32, term=TERMS[0], want=TERM)
    with pytest.raises(ValueError, match="one listed column a row, the target; got 2"):
        both(rows, (0.5, 0.5))
    with pytest.raises(IndexError, match="37 at"):
        bad = torch.full((6, 1), 37)
        registry.run("row_terms_both_", rows.logits, bad, *rows[2:], 0.0, 1.0)


def test_combinations_are_their_losses() -> None:
    """Every loss of the catalogue that says it is a combination is that one, by its own function."""
    found = [entry for entry in catalogue.entries() if entry.combination is not None]
    assert {losses.forward_kl, losses.jensen_shannon} <= {entry.function for entry in found}
    for entry in found:
        given: dict[str, Any] = {"alpha": 0.3} if "alpha" in entry.defaults else {}
        if "temperature" in entry.defaults:
            given["temperature"] = 1.7
        _, engine = catalogue.split_arguments(entry.function, given)
        z, target = torch.randn(5, 9).double(), torch.tensor([1, 2, 0, 8, 3])
        s = fastloss.row_stats(z, target, teacher=torch.randn(5, 9).double(), **engine)
        first, second = catalogue.combination(entry.function, given)
        torch.testing.assert_close(entry.function(s, **given), first * -s.logp + second * s.term)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_head_by_one_launch_and_by_two(dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every such loss of a head is the same without the shortcut; ignored rows, chunks, an upstream gradient."""
    n, d, v = 23, 8, 130
    x, w = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
    teacher = TeacherHead(torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype))
    target = torch.randint(0, v, (n,))
    target[3] = target[17] = -100
    launches = []
    run = registry.run
    monkeypatch.setattr(registry, "run", lambda op, *args: (launches.append(op), run(op, *args))[1])
    for entry in (entry for entry in catalogue.entries() if entry.combination is not None):
        results = []
        for combination in (entry.combination, None):
            monkeypatch.setitem(entry.__dict__, "combination", combination)
            launches.clear()
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
            loss = fastloss.linear_row_loss(
                *leaves, target, entry.function, teacher=teacher, reduction=reduction, max_extra_bytes=20 * v * 4
            )
            assert ("row_terms_both_" in launches) == (combination is not None) != ("row_terms" in launches)
            results.append((loss.detach(), *torch.autograd.grad(loss * 0.5, leaves)))
        eps = torch.finfo(dtype).eps
        for a, b in zip(*results, strict=True):
            assert (a.double() - b.double()).abs().max() <= 4 * max(eps, 1e-6) * b.double().abs().max(), entry.name
