"""`row_terms` and its backward: the CPU kernel at every instruction set against the reference in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp, reference_terms
from fastloss.compiled import _C, MISSING
from fastloss.contract import Term, TermCoef, TermStat, Want
from fastloss.reference_terms import RAW
from tolerance import check_close, check_gradient

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))

KERNEL = backend_cpp.terms  # not the registered op, which raises for bad ids before the kernel sees them
OPS = torch.ops.fastloss
INF = float("inf")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
TEACHER = int(Want.TEACHER | Want.TEACHER_MEAN | Want.SCORE_MEAN)
PLAIN = int(Want.ENTROPY | Want.SUM | Want.SUMSQ | Want.ARGMAX)
EVERYTHING = PLAIN | TEACHER | int(Want.TERM | Want.SUBSET)
#: (term, A, B, beta); the first mixture has A q + B p = m, the others not.
TERMS = (
    (Term.KL, 1.0, 0.0, 0.0), (Term.KL, 0.0, 1.0, 0.0), (Term.KL, 0.3, 0.7, 0.0), (Term.MIXTURE, 0.5, 0.5, 0.5),
    (Term.MIXTURE, 1.0, 0.0, 0.1), (Term.MIXTURE, 0.2, 1.3, 0.7), (Term.TOTAL_VARIATION, 0.0, 0.0, 0.0),
    (Term.LOG_COSH, 0.0, 0.0, 0.0), (Term.BCE_LOGITS, 0.0, 0.0, 0.0), (Term.BCE, 0.0, 0.0, 0.0),
)  # fmt: skip


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each level of csrc/cpu/cpu.h in turn, forced."""
    best = _C.best_isa()
    if request.param > best:
        pytest.skip(f"needs {ISAS[request.param]}; the best of this machine is {_C.isa_name(best)}")
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Undoes torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Rows(NamedTuple):
    """What a call is about, in the order of the ops."""

    logits: Tensor
    listed: Tensor | None = None
    teacher: Tensor | None = None
    value: Tensor | None = None
    subset: Tensor | None = None
    temperature: Tensor | None = None
    ignore_index: int = -100
    want: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    term: int = 0
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0

    def cast(self, dtype: torch.dtype) -> Rows:
        return Rows(*(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in self))


def ids(n: int, v: int, k: int) -> Tensor | None:
    """Listed columns: one row ignored, one id absent, one listed twice, the first and the last column."""
    if k == 0:
        return None
    listed = torch.randint(0, v, (n, k))
    listed[0, 0], listed[1, 0], listed[2, 0] = 0, v - 1, -100
    listed[3, k - 1] = -7
    if k > 1:
        listed[4, 1] = listed[4, 0]
        listed[1, 1] = -100  # absent, and the row is not ignored
    return listed


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check(rows: Rows, k: float = 8.0, coef: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Statistics, a gradient from them, and the gradient in place; returns (statistics, gradient)."""
    n, dtype = rows.logits.shape[0], rows.logits.dtype
    stats, argmax = KERNEL.row_terms(*rows)
    narrow, wide = rows.cast(torch.float32), rows.cast(torch.float64)
    torch_stats, _ = reference_terms.row_terms(*narrow)
    truth, top = reference_terms.row_terms(*wide)
    for i in range(len(truth)):
        what = TermStat(i).name if i < TermStat.LISTED else f"listed {i - TermStat.LISTED}"
        allowed = torch.full_like(truth[i], rows.softcap * 4e-7)  # z itself, which tanh has rounded
        allowed *= {TermStat.SUM: rows.logits.shape[1], TermStat.SUMSQ: 40 * rows.logits.shape[1]}.get(i, 1)
        if i in (TermStat.LOGSUM, TermStat.REST_LOGSUM, TermStat.TEACHER_LOGSUM, TermStat.SUBSET_LOGSUM):
            allowed += 2e-7  # the log of a float32 sum that may be near 1
        if i in (TermStat.SLOPE, TermStat.TEACHER_SLOPE):  # sums of parts of size A and B that cancel
            allowed += 5e-7 * (1 + abs(rows.a) + abs(rows.b))
        near = (stats[i].double() - truth[i]).abs() <= allowed
        try:
            check_close(
                torch.where(near, truth[i], stats[i])[None], torch_stats[i][None], truth[i][None], torch.float32, k
            )
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None
    if rows.want & Want.ARGMAX and not rows.softcap:  # tanh in float32 makes ties
        assert torch.equal(argmax, top)

    listed = 0 if rows.listed is None else rows.listed.shape[1]
    if coef is None:
        coef = torch.randn(TermCoef.LISTED + listed, n)
        coef[TermCoef.LINEAR] *= 1e-2
    dlogits = KERNEL.row_terms_backward(coef, stats, argmax, *rows)
    torch_dlogits = reference_terms.row_terms_backward(coef, torch_stats, argmax, *narrow).to(dtype)
    expected = reference_terms.row_terms_backward(coef.double(), truth, top, *wide)
    cancelled = (dlogits.double() - expected).abs() <= 2e-7 * coef.abs().amax()  # parts of the size of the coefficients
    check_gradient(
        torch.where(cancelled, expected, dlogits.double()),
        torch_dlogits,
        expected,
        dtype,
        16.0 if dtype == torch.float32 else 2.0,
    )
    copy = rows.logits.clone()
    assert KERNEL.row_terms_backward_in_place(coef, stats, argmax, copy, *rows[1:]) is copy
    assert same_bits(copy, dlogits)
    return stats, dlogits


def rows_of(
    n: int, v: int, k: int, dtype: torch.dtype, teacher_dtype: torch.dtype, *, shared: bool = False,
    warm: bool = False, capped: bool = False, term: tuple[Any, ...] = (0, 0.0, 0.0, 0.0), want: int | None = None,
) -> Rows:  # fmt: skip
    teacher = torch.randn(1 if shared else n, v) * 3
    if term[0] == Term.BCE:
        teacher = teacher.sigmoid()
    if want is None:
        want = EVERYTHING if term[0] else EVERYTHING & ~Want.TERM
    return Rows(
        (torch.randn(n, v) * 3).to(dtype), ids(n, v, k), teacher.to(teacher_dtype), None, torch.rand(v) < 0.4,
        torch.rand(n) * 2 + 0.5 if warm else None, -100, want, 0.75 if capped else 1.0, 5.0 if capped else 0.0,
        *term,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("term", TERMS, ids=lambda t: f"{t[0].name.lower()} {t[1:]}")
def test_every_option_of_every_term(term: tuple[Any, ...], dtype: torch.dtype) -> None:
    for i, (k, warm, capped, shared) in enumerate(itertools.product((0, 1, 3), *[(False, True)] * 3)):
        check(rows_of(6, 37, k, dtype, DTYPES[i % 3], shared=shared, warm=warm, capped=capped, term=term))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa: int, dtype: torch.dtype) -> None:
    for i, term in enumerate(TERMS):
        for v in (1, 5, 37, 2051):
            k = 0 if v == 1 else i % 3
            options = dict(shared=i % 2 == 0, warm=i % 4 < 2, capped=i % 3 == 1)
            check(rows_of(6, v, k, dtype, DTYPES[(i + v) % 3], term=term, **options), 16.0)


@pytest.mark.parametrize("want", [0, *(int(w) for w in Want if int(w) and w not in (Want.TEMPERED, Want.TERM))])
def test_only_what_is_wanted(want: int) -> None:
    """Each flag alone: its numbers are right, and all others are 0."""
    for k in (0, 1):
        check(rows_of(6, 37, k, torch.float32, torch.float32, want=want))
        check(rows_of(6, 37, k, torch.float32, torch.float32, want=want, warm=True))


@pytest.mark.parametrize("term", TERMS, ids=lambda t: f"{t[0].name.lower()} {t[1:]}")
def test_a_term_alone(isa: int, term: tuple[Any, ...]) -> None:
    """The loops for distillation and nothing else: at any temperature and scale, near and far, with an offset."""
    for i, (k, warm, dtype) in enumerate(itertools.product((0, 1, 2), (False, True), DTYPES)):
        rows = rows_of(6, 2051, k, dtype, DTYPES[i % 3], want=int(Want.TERM), term=term, warm=warm, shared=i % 4 == 3)
        rows = rows._replace(scale=0.7 if i % 2 else 1.0)
        if i % 5 == 4 and term[0] not in RAW:
            rows = rows._replace(logits=rows.logits + 200.0, teacher=rows.teacher - 400.0)
        check(rows, 16.0)
        if k == 0 and not warm:
            near = rows.logits[:1] if rows.teacher.shape[0] == 1 else rows.logits
            near = (near.float() + 0.1 * torch.randn(near.shape)).to(rows.teacher.dtype)
            check(rows._replace(teacher=near, scale=1.0), 16.0)


@pytest.mark.parametrize("sigma", [0.75, 0.1, 3.0])
def test_generated_probabilities(isa: int, sigma: float) -> None:
    """HL-Gauss: far bins have q down to 1e-38 and below; values beyond the ends are clamped."""
    n, v = 6, 101
    value = torch.tensor([0.0, -10.0, 10.0, 99.0, -99.0, 3.3])
    for dtype in (torch.float32, torch.bfloat16):
        want = int(Want.SCORE_MEAN | Want.TEACHER | Want.ENTROPY)
        width, deviation = torch.tensor([20.0 / v, 20.0 / v * sigma]).tolist()  # float32, as the kernel takes them
        tail = (-100, want, 1.0, 0.0, 0, -10.0, width, deviation)
        rows = Rows((torch.randn(n, v) * 3).to(dtype), ids(n, v, 1), None, value, None, None, *tail)
        check(rows)
    coef = torch.zeros(TermCoef.LISTED, n)
    coef[TermCoef.TEACHER] = 1.0
    rows = rows.cast(torch.float32)._replace(listed=None)
    q = KERNEL.row_terms_backward(coef, *KERNEL.row_terms(*rows), *rows).double()
    wide = rows.cast(torch.float64)
    truth, _ = reference_terms.gauss_probabilities(wide.value, v, *wide[-3:])
    torch.testing.assert_close(q, truth, rtol=1e-6, atol=1e-37)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of rows of logits, in float64."""
    a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return torch.where(a == -INF, 0.0, a.exp() * (a - b)).sum(-1)


@pytest.mark.parametrize("term", TERMS[:7], ids=lambda t: f"{t[0].name.lower()} {t[1:]}")
@pytest.mark.parametrize("warm", [False, True])
def test_equal_distributions_are_at_distance_nought(isa: int, term: tuple[Any, ...], warm: bool) -> None:
    for dtype in DTYPES:
        rows = rows_of(6, 1030, 0, dtype, dtype, warm=warm, term=term, want=int(Want.TERM))
        rows = rows._replace(teacher=rows.logits)
        assert not KERNEL.row_terms(*rows)[0][TermStat.TERM].any()


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
def test_divergences_are_never_negative_and_keep_their_digits(isa: int, size: float) -> None:
    """Near-equal distributions: the sum of terms of order 1 that torch forms loses all digits of a KL of 1e-9."""
    logits = torch.randn(8, 517) * 2
    teacher = logits + torch.randn(8, 517) * size
    for a, b in ((1.0, 0.0), (0.0, 1.0)):
        rows = Rows(logits, teacher=teacher, want=int(Want.TERM), term=Term.KL, a=a, b=b)
        got, truth = (
            KERNEL.row_terms(*rows)[0][TermStat.TERM],
            divergence(*((teacher, logits) if a else (logits, teacher))),
        )
        assert (got >= 0).all()
        torch.testing.assert_close(got.double(), truth, rtol=4e-6 + 4e-7 / size, atol=0)


@pytest.mark.parametrize("term", TERMS[:7], ids=lambda t: f"{t[0].name.lower()} {t[1:]}")
def test_distributions_120_apart(isa: int, term: tuple[Any, ...]) -> None:
    """p or q underflows where the other is all there is."""
    for gap in (40.0, 90.0, 120.0):
        logits = torch.randn(6, 70)
        teacher = torch.randn(6, 70)
        logits[:, 3] += gap
        teacher[:, 9] += gap
        teacher[4:, 9] -= 2 * gap
        rows = Rows(logits, ids(6, 70, 1), teacher, want=int(Want.TERM), term=term[0], a=term[1], b=term[2], c=term[3])
        check(rows)


@pytest.mark.parametrize("term", TERMS, ids=lambda t: f"{t[0].name.lower()} {t[1:]}")
def test_hard_rows(isa: int, term: tuple[Any, ...]) -> None:
    """Offsets, one huge logit, -inf on the student's side, the teacher's, both; everything but the sums wanted."""
    want = int(Want.TERM | Want.ENTROPY | Want.ARGMAX | Want.TEACHER | Want.SUBSET)
    for dtype in (torch.float32, torch.bfloat16):
        rows = rows_of(8, 259, 1, dtype, torch.float32, term=term, want=want)
        logits, teacher = rows.logits.clone(), rows.teacher.clone()
        if term[0] not in RAW:  # raw terms have no room for an offset of one side
            logits[0] += 512.0
            teacher[1] += 1e4
        logits[3, 7] = 90.0
        logits[4, ::3], logits[5, 1:4] = -INF, -INF
        teacher[4, ::3], teacher[6, ::5] = -INF, -INF
        rows.listed[4, 0], rows.listed[5, 0] = 4, 2
        if term[0] == Term.BCE:
            teacher[:] = rows.teacher
        with_holes = rows._replace(logits=logits.to(dtype), teacher=teacher)
        coef = torch.randn(TermCoef.LISTED + 1, 8)
        # where the term is infinite, so are its slopes: coefficients of 0 leave the rest of the gradient
        coef[:, 4:7] = torch.where(torch.arange(11)[:, None] == TermCoef.TERM, 0.0, coef[:, 4:7])
        check(with_holes, 16.0, coef)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(isa: int, dtype: torch.dtype) -> None:
    for v in (5, 1500):
        rows = rows_of(6, v, 1, dtype, dtype, term=TERMS[2])
        rows.listed[2] = 1
        rows.logits[0, v // 2], rows.logits[1, 3], rows.teacher[3, 1] = torch.nan, INF, torch.nan
        stats, argmax = KERNEL.row_terms(*rows)
        assert stats[TermStat.LOGSUM, :2].isnan().all() and stats[TermStat.MAX, 0].isnan()
        assert stats[TermStat.TERM, [0, 1, 3]].isnan().all() and stats[TermStat.TERM, [2, 4, 5]].isfinite().all()
        assert stats[TermStat.TEACHER_MAX, 3].isnan() and argmax[:2].tolist() == [v // 2, 3]
        dlogits = KERNEL.row_terms_backward(torch.rand(TermCoef.LISTED + 1, 6) + 1, stats, argmax, *rows)
        assert dlogits[[0, 1, 3]].isnan().all() and dlogits[[2, 4, 5]].isfinite().all()


def test_listed_columns(isa: int) -> None:
    """Twice counts once in the rest, gradients add; all columns listed leaves no rest; far above and below the rest."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(7, 5) * 2).to(dtype)
        listed = torch.tensor([[0, 1, 2, 3, 4], [1, 1, 1, -1, 1], [-100, 1, 2, 3, 4], [-1, -1, -1, -1, -1],
                               [4, -100, 3, 3, -5], [0, 1, 2, 3, 3], [2, 2, 2, 2, 2]])  # fmt: skip
        logits[4, 3], logits[5, 4], logits[6, 2] = 100.0, -100.0, 6.0
        stats, _ = check(Rows(logits, listed, want=PLAIN))
        assert stats[TermStat.REST_LOGSUM, 0] == -INF and not stats[:, 2].any()
        check(Rows(torch.randn(7, 3000).to(dtype), listed * 600, want=PLAIN, ignore_index=-60000))


def test_bad_ids(isa: int) -> None:
    """The kernel never uses one as an index; the registered op says which it is."""
    rows = rows_of(6, 37, 3, torch.float32, torch.float32, term=TERMS[0])
    listed = torch.tensor([[1, 2, 3], [37, 1, 2], [1, 2**40, 3], [-100, 99, 1], [3, -1, -(2**63)], [36, 1, 0]])
    stats, dlogits = check(rows._replace(listed=listed))
    assert stats[TermStat.LISTED :].isnan().any(0).tolist() == [False, True, True, False, False, False]
    assert dlogits.isnan().all(1).tolist() == [False, True, True, False, False, False]
    with fastloss.use_backend("cpp"), pytest.raises(IndexError, match=r"37 at \[1, 0\] .* 0\.\.36"):
        OPS.row_terms(*rows._replace(listed=listed))


@pytest.mark.parametrize("ignored", [-100, 3, 2**40])
def test_ignored_rows_are_not_read(isa: int, ignored: int) -> None:
    rows = rows_of(6, 37, 2, torch.float32, torch.float32, term=TERMS[2])
    rows.listed[:, 0] = torch.tensor([1, ignored, 2, ignored, 5, 6])
    rows.logits[1] = rows.teacher[3] = torch.nan
    rows = rows._replace(ignore_index=ignored)
    stats, argmax = KERNEL.row_terms(*rows)
    assert not stats[:, [1, 3]].any() and argmax[[1, 3]].tolist() == [-1, -1]
    dlogits = KERNEL.row_terms_backward(torch.randn(TermCoef.LISTED + 2, 6), stats, argmax, *rows)
    assert not dlogits[[1, 3]].any() and dlogits.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_nothing_beyond_the_row(isa: int, dtype: torch.dtype) -> None:
    n, v = 6, 1037
    dense = rows_of(n, v, 1, dtype, dtype, term=TERMS[3])
    coef = torch.randn(TermCoef.LISTED + 1, n)
    stats, argmax = KERNEL.row_terms(*dense)
    expected = KERNEL.row_terms_backward(coef, stats, argmax, *dense)
    inside, other = (torch.full((n, v + 5), torch.nan, dtype=dtype) for _ in range(2))
    outside = torch.full((n, v + 7), 5.0, dtype=dtype)
    view, teacher, out = inside[:, 1 : v + 1], other[:, 3 : v + 3], outside[:, 3 : v + 3]
    view.copy_(dense.logits), teacher.copy_(dense.teacher)
    apart = dense._replace(logits=view, teacher=teacher)
    again, argmax = KERNEL.row_terms(*apart)
    assert same_bits(again, stats)
    KERNEL.row_terms_backward(coef, stats, argmax, *apart, out=out)
    assert same_bits(out, expected)
    assert (outside[:, :3] == 5).all() and (outside[:, v + 3 :] == 5).all()


def test_thread_count_does_not_change_a_bit(threads: None) -> None:
    rows = rows_of(31, 1009, 1, torch.bfloat16, torch.float32, term=TERMS[4], warm=True)
    coef, results = torch.randn(TermCoef.LISTED + 1, 31), []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        stats, argmax = KERNEL.row_terms(*rows)
        results.append((stats, argmax, KERNEL.row_terms_backward(coef, stats, argmax, *rows)))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("forward, backward", list(itertools.product(("cpp", "reference"), repeat=2)))
def test_any_forward_with_any_backward(forward: str, backward: str) -> None:
    for term in TERMS:
        rows = rows_of(6, 37, 2, torch.float32, torch.float32, term=term, warm=True, capped=True)
        coef = torch.randn(TermCoef.LISTED + 2, 6)
        with fastloss.use_backend(forward):
            stats, argmax = OPS.row_terms(*rows)
        with fastloss.use_backend(backward):
            dz = OPS.row_terms_backward(coef, stats, argmax, *rows)
        truth = reference_terms.row_terms_backward(coef.double(), stats.double(), argmax, *rows.cast(torch.float64))
        torch.testing.assert_close(dz.double(), truth, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    for k in (0, 2):
        rows = rows_of(6, 37, k, dtype, dtype, term=TERMS[2], warm=True)
        torch.library.opcheck(OPS.row_terms.default, tuple(rows))
        stats, argmax = OPS.row_terms(*rows)
        coef = torch.randn(TermCoef.LISTED + k, 6).to(stats.dtype)
        torch.library.opcheck(OPS.row_terms_backward.default, (coef, stats, argmax, *rows))


def test_what_is_refused() -> None:
    rows = rows_of(6, 37, 1, torch.float32, torch.float32, term=TERMS[0])
    assert fastloss.registry.choose("row_terms", *rows) == "cpp"
    for other, reason in (
        (rows._replace(logits=rows.logits.double()), "float64"),
        (rows._replace(teacher=rows.teacher.double()), "a float32, float16 or bfloat16 teacher, got torch.float64"),
        (rows._replace(logits=rows.logits.T.contiguous().T), "last dimension"),
    ):
        assert reason in fastloss.explain("row_terms", *other)
        assert fastloss.registry.choose("row_terms", *other) == "reference"
    with fastloss.use_backend("cpp"):
        for change, message in (
            (dict(teacher=rows.teacher[:3]), "teacher must have shape"), (dict(teacher=None), "got neither"),
            (dict(subset=None), "one bool a column"), (dict(temperature=torch.ones(2)), "temperature must have"),
            (dict(listed=torch.zeros(6, dtype=torch.int64)), "listed must have"), (dict(term=9), "unknown term 9"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                OPS.row_terms(*rows._replace(**change))
        with pytest.raises(ValueError, match=r"coef must have shape \[11"):
            OPS.row_terms_backward(torch.zeros(10, 6), *OPS.row_terms(*rows), *rows)


def test_no_rows(isa: int) -> None:
    rows = Rows(torch.empty(0, 7), teacher=torch.empty(0, 7), want=int(Want.TERM | Want.ARGMAX), term=Term.KL, a=1.0)
    stats, argmax = KERNEL.row_terms(*rows)
    assert stats.shape == (TermStat.LISTED, 0) and argmax.shape == (0,)
    assert KERNEL.row_terms_backward(torch.empty(TermCoef.LISTED, 0), stats, argmax, *rows).shape == (0, 7)
