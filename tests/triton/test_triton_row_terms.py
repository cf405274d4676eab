"""row_terms and row_terms_backward of the Triton backend, interpreted, against float64 autograd."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from fastloss.triton_kernels import row_terms as kernels
from torch import Tensor

import fastloss
from triton_reference import check_gradient
from triton_term_reference import (
    ARGMAX,
    BCE,
    BCE_LOGITS,
    ENTROPY,
    INF,
    KL,
    LOG_COSH,
    MIXTURE,
    SCORE_MEAN,
    SUBSET,
    SUM,
    SUMSQ,
    TEACHER,
    TEACHER_MEAN,
    TERM,
    TOTAL_VARIATION,
    Terms,
    check_stats,
    expect,
    expected_gradient,
    gauss,
)

OPS = torch.ops.fastloss
EVERYTHING = ENTROPY | SUM | SUMSQ | ARGMAX | TEACHER | TEACHER_MEAN | SCORE_MEAN | TERM | SUBSET
BACKENDS = ("triton", "cpp", "reference")


def ids(n: int, v: int, k: int) -> Tensor:
    """Listed columns; among them repeated and absent ones, an ignored row, and an id that as int32 would be a column."""
    listed = torch.randint(0, v, (n, k))
    listed[0, -1] = listed[0, 0]
    if n > 2:
        listed[1, 0], listed[2, -1] = -100, (1 << 32) + v // 2
    if k > 3:
        listed[0, 1], listed[0, 2] = -7, -100
    return listed


def problem(
    n: int, v: int, want: int, k: int = 0, term: int = KL, numbers: tuple[float, ...] = (0.7, 0.4, 0.3), **more
) -> Terms:
    a, b, c = numbers
    given = dict(
        listed=ids(n, v, k) if k else None,
        teacher=torch.rand(n, v) if term == BCE else torch.randn(n, v) * 3,
        subset=torch.rand(v) < 0.4,
        temperature=torch.rand(n) + 0.5,
    )
    return Terms(**(given | dict(want=want, term=term, a=a, b=b, c=c) | more))


def check(
    logits: Tensor,
    p: Terms,
    k: types.ModuleType = kernels,
    block: int = 128,
    splits: int | None = 1,
    slack: float = 2.0,
) -> None:
    """Statistics, and the gradient of a random loss of them, made in place."""
    leaf = logits.double().requires_grad_()
    e = expect(leaf, p)
    stats, argmax = k.row_terms(logits, *p, block=block, splits=splits)
    check_stats(stats, argmax, e, p)
    coef, expected = expected_gradient(e, p, leaf)
    buffer = torch.empty(logits.shape[0], logits.shape[1] + 3, dtype=logits.dtype)[:, 2:-1].copy_(logits)
    assert k.row_terms_backward(coef, stats, argmax, buffer, *p, block=block, out=buffer) is buffer
    check_gradient(buffer, expected, logits.dtype, slack)


@pytest.mark.parametrize(
    "term, numbers",
    [(KL, (1, 0, 0)), (KL, (0, 1, 0)), (KL, (0.7, 0.4, 0)), (MIXTURE, (0.5, 0.5, 0.5)), (MIXTURE, (0.9, 0.1, 0.1)),
     (TOTAL_VARIATION, (0, 0, 0)), (LOG_COSH, (0, 0, 0)), (BCE_LOGITS, (0, 0, 0)), (BCE, (0, 0, 0))],
)  # fmt: skip
def test_terms(term: int, numbers: tuple[float, ...]) -> None:
    p, z = problem(2, 75, TERM, term=term, numbers=numbers), torch.randn(2, 75) * 3
    check(z, p)
    check(z, p._replace(temperature=None))


@pytest.mark.parametrize("want", [0, ENTROPY, SUM, SUMSQ, ARGMAX, TEACHER, TEACHER_MEAN, SCORE_MEAN, SUBSET])
def test_each_statistic_alone(want: int) -> None:
    check(torch.randn(2, 75) * 3, problem(2, 75, want, k=1))


@pytest.mark.parametrize("k, softcap, splits", [(0, 3.0, 1), (0, 0.0, 4), (1, 3.0, 4), (4, 0.0, 1), (4, 3.0, 2)])
def test_everything_at_once(k: int, softcap: float, splits: int) -> None:
    p = problem(3, 75, EVERYTHING, k, term=MIXTURE if k else KL, scale=0.7, softcap=softcap)
    check(torch.randn(3, 75) * 3, p, block=32, splits=splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, v, splits", [(1, 1, 1), (2, 33, 1), (1, 129, None)])
def test_shapes_and_dtypes(n: int, v: int, splits: int | None, dtype: torch.dtype) -> None:
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    p = problem(n, v, EVERYTHING & ~SUBSET, 1, teacher=(torch.randn(n, v) * 2).to(other), temperature=None)
    check((torch.randn(n, v) * 3).to(dtype), p, splits=splits)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_teacher_shared_by_all_rows_and_strided_views(splits: int) -> None:
    wide = torch.randn(2, 151)
    z, shared = wide[:, 1:], torch.randn(1, 150)
    check(z, problem(2, 150, TERM | TEACHER_MEAN, 3, teacher=shared), splits=splits)
    check(z, problem(2, 150, SCORE_MEAN, teacher=shared.expand(2, 150)), splits=splits)
    check(z[:1].expand(2, 150), problem(2, 150, TERM, teacher=wide[:, :150]), splits=splits)


def test_no_teacher_is_a_uniform_one() -> None:
    check(torch.randn(1, 40), problem(1, 40, TERM | SCORE_MEAN, teacher=None))


def test_many_listed_columns_and_their_repetitions() -> None:
    z, listed = torch.randn(2, 50), torch.randint(0, 50, (2, 37))
    check(z, Terms(listed=listed))
    listed[0] = torch.arange(37)
    check(z[:, :37], Terms(listed=listed.clamp(max=36), want=ENTROPY))  # nothing is left over in one row


def test_ignore_index_that_is_a_column() -> None:
    listed = torch.tensor([[4, 0, 4], [0, 4, 4], [3, 2, 0]])
    check(torch.randn(3, 20), Terms(listed=listed, ignore_index=0, want=ARGMAX))


@pytest.mark.parametrize("splits", [1, 2])
def test_generated_targets(splits: int) -> None:
    """HL-Gauss, with values on, between and beyond the edges; far tails keep their digits."""
    value = torch.tensor([0.03, -1.0, 9.0])
    p = Terms(value=value, want=SCORE_MEAN | ENTROPY, a=-1.0, b=2 / 64, c=0.09)
    check(torch.randn(3, 64), p, splits=splits)
    check(torch.randn(3, 64), p._replace(c=1.5, temperature=torch.rand(3) + 0.5, listed=ids(3, 64, 1)), splits=splits)
    stats, argmax = kernels.row_terms(torch.randn(3, 64), *p)
    coef = torch.zeros(10, 3)
    coef[4] = 1
    q = kernels.row_terms_backward(coef, stats, argmax, torch.randn(3, 64), *p)
    truth = gauss(p, 64)[0]
    seen = truth > 1e-30
    assert ((q - truth).abs() / truth)[seen].max() < 3e-5 and not q[truth < 1e-36].abs().max() > 1e-30
    stats, _ = kernels.row_terms(torch.randn(1, 64), *p._replace(value=torch.tensor([torch.nan])))
    assert stats[[8, 10], 0].isnan().all()


def hard_logits(n: int = 8, v: int = 100) -> Tensor:
    z = torch.randn(n, v)
    z[0] -= 200
    z[1] += 1e4
    z[2, 7] = 500
    z[3, 10:] = -INF
    z[4] = 0
    z[5, 1:] = -INF
    z[6, :50], z[6, 50:] = 120, -120
    return z


@pytest.mark.parametrize("term", range(1, 7))
def test_hard_rows(term: int) -> None:
    """Of the scores and, in another order, of the teacher: a column that only one of them excludes costs what it must."""
    z = hard_logits()
    teacher = (
        torch.rand(8, 100) if term == BCE else hard_logits()[[0, 1, 6, 3, 2, 5, 4, 7]] * (1 if term < LOG_COSH else 0.1)
    )
    numbers = (1.0, 0.0, 0.0) if term == KL else (0.5, 0.5, 0.5)
    if term >= LOG_COSH:  # of columns of -inf these are infinite
        z, teacher = z.clamp(-200, 80), teacher.clamp(-200, 80)
        z[1] = 0
        teacher[1] = teacher[1].clamp(0, 1)
    listed = torch.tensor([[3], [5], [7], [2], [1], [0], [40], [9]])
    want = TERM | ARGMAX | ENTROPY | (TEACHER_MEAN | SCORE_MEAN) * (term < LOG_COSH)
    p = Terms(
        listed, teacher, temperature=torch.rand(8) + 0.5, want=want, term=term, a=numbers[0], b=numbers[1], c=numbers[2]
    )
    check(z, p._replace(want=want & ~SCORE_MEAN), slack=8.0)


def test_nothing_but_minus_infinity() -> None:
    z = torch.randn(3, 70)
    z[1] = -INF
    stats, argmax = kernels.row_terms(z, *Terms(listed=torch.tensor([[1], [2], [3]])), block=32)
    assert stats[[0, 1, 2, 3, 17], 1].tolist() == [-INF] * 5 and stats[:, [0, 2]].isfinite().all()
    gradient = kernels.row_terms_backward(torch.ones(11, 3), stats, argmax, z, *Terms(), block=32)
    assert (gradient[1] == 0).all()
    stats, _ = kernels.row_terms(z, *Terms(subset=torch.zeros(70, dtype=torch.bool), want=SUBSET), block=32, splits=2)
    assert (stats[[15, 16]] == -INF).all()


def test_nan_and_infinity_stay_in_their_row() -> None:
    z, teacher = torch.randn(5, 70), torch.randn(5, 70)
    z[1, 50], z[2, 3], teacher[3, 9] = torch.nan, INF, torch.nan
    p = Terms(torch.tensor([[1], [2], [5], [4], [4]]), teacher, want=ENTROPY | TERM, term=KL, a=1.0, b=0.5)
    for splits in (1, 2):
        stats, argmax = kernels.row_terms(z, *p, block=64, splits=splits)
        assert stats[:5, 1].isnan().all() and stats[3:5, 2].isnan().all() and stats[7:9, 3].isnan().all()
        assert stats[12, 1:4].isnan().all() and stats[:, [0, 4]].isfinite().all()
        gradient = kernels.row_terms_backward(torch.ones(11, 5), stats, argmax, z, *p)
        assert gradient[1:4].isnan().any(1).all() and gradient[[0, 4]].isfinite().all()
    z[1, 50], z[1, 2] = 0, torch.nan  # the listed column itself: the rest is clean
    stats, _ = kernels.row_terms(z, *p)
    assert stats[:2, 1].isfinite().all() and stats[[2, 3, 4, 17], 1].isnan().all()


def test_ignored_rows_are_not_read() -> None:
    z = torch.full((2, 40), torch.nan)
    z[1] = 1.0
    p = problem(2, 40, EVERYTHING, listed=torch.tensor([[-100, 3], [0, 5]]), teacher=z)
    for splits in (1, 2):
        stats, argmax = kernels.row_terms(z, *p, block=32, splits=splits)
        assert (stats[:, 0] == 0).all() and argmax.tolist() == [-1, 0] and stats.isfinite().all()
    gradient = kernels.row_terms_backward(torch.full((12, 2), torch.nan), stats, argmax, z, *p, block=32)
    assert (gradient[0] == 0).all() and gradient[1].isnan().all()


def test_a_coefficient_of_zero_adds_nothing() -> None:
    z, teacher = torch.randn(1, 40), torch.randn(1, 40)
    z[0, 3] = teacher[0, 5] = -INF
    p = problem(1, 40, EVERYTHING & ~TERM, teacher=teacher)
    stats, argmax = kernels.row_terms(z, *p, block=32)
    assert stats[[5, 9], 0].tolist() == [-INF, -INF] and stats[10, 0] == -INF
    assert (kernels.row_terms_backward(torch.zeros(10, 1), stats, argmax, z, *p, block=32) == 0).all()
    for term in (KL, MIXTURE):
        q = p._replace(want=TERM, term=term, a=0.3, b=0.6, c=0.5)
        stats, argmax = kernels.row_terms(z, *q)
        assert (kernels.row_terms_backward(torch.zeros(10, 1), stats, argmax, z, *q) == 0).all()


@pytest.mark.parametrize("term", [KL, MIXTURE, LOG_COSH])
def test_scores_that_nearly_agree_keep_their_digits(term: int) -> None:
    """A divergence of 1e-7 is a sum of squares: the difference of two logarithms would have no digit of it."""
    teacher = torch.randn(3, 200)
    z = teacher + torch.randn(3, 200) * 1e-3
    p = Terms(teacher=teacher, want=TERM, term=term, a=0.7, b=0.4, c=0.3)
    stats, _ = kernels.row_terms(z, *p)
    torch.testing.assert_close(stats[12].double(), expect(z.double(), p).stats[12], rtol=1e-3, atol=0)


def test_binary_terms_of_sure_columns_keep_their_digits() -> None:
    z = torch.tensor([[20.0, -20.0, 100.0, -100.0]])
    for term, teacher in ((BCE, torch.tensor([[1.0, 0, 1, 0]])), (BCE_LOGITS, z)):
        p = Terms(teacher=teacher, want=TERM, term=term)
        stats, argmax = kernels.row_terms(z, *p)
        coef = torch.zeros(10, 1)
        coef[5] = 1
        gradient = kernels.row_terms_backward(coef, stats, argmax, z, *p)
        e = torch.exp(torch.tensor(-20.0, dtype=torch.float64))
        if term == BCE:
            torch.testing.assert_close(stats[12, 0].double(), 2 * e, rtol=1e-5, atol=0)
            torch.testing.assert_close(gradient[0, :2].double(), torch.stack([-e, e]), rtol=1e-5, atol=0)
        else:
            assert (gradient == 0).all()


@pytest.mark.parametrize("forward, backward", [p for p in itertools.product(BACKENDS, BACKENDS) if "triton" in p])
def test_any_forward_with_any_backward(forward: str, backward: str) -> None:
    if "cpp" in (forward, backward) and "cpp" not in fastloss.registry.backends("row_terms"):
        forward, backward = (b.replace("cpp", "reference") for b in (forward, backward))
    z, p = torch.randn(3, 50) * 3, problem(3, 50, EVERYTHING, 4, scale=0.9, softcap=5.0)
    if "cpp" in (forward, backward):
        p.listed[p.listed >= 50] = 7  # a CPU refuses what is NaN on a GPU
    leaf = z.double().requires_grad_()
    e = expect(leaf, p)
    coef, truth = expected_gradient(e, p, leaf)
    with fastloss.use_backend(forward):
        stats, argmax = OPS.row_terms(z, *p)
    check_stats(stats, argmax, e, p)
    with fastloss.use_backend(backward):
        check_gradient(OPS.row_terms_backward(coef, stats, argmax, z, *p), truth, z.dtype, 4.0)


def test_empty_and_what_is_refused() -> None:
    p = Terms(want=ARGMAX)
    stats, argmax = kernels.row_terms(torch.empty(0, 7), *p)
    assert stats.shape == (17, 0) and argmax.shape == (0,)
    assert kernels.row_terms_backward(torch.empty(10, 0), stats, argmax, torch.empty(0, 7), *p).shape == (0, 7)
    z = torch.randn(3, 7)
    for wrong, message in (
        (Terms(teacher=torch.randn(2, 7)), r"teacher must have shape \[3, 7\] or \[1, 7\], got \(2, 7\)"),
        (Terms(subset=torch.ones(7)), r"subset must be torch.bool of shape \[7\], got torch.float32"),
        (Terms(listed=torch.zeros(3, dtype=torch.int64)), r"listed must be torch.int64 of shape \[3, K\]"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.row_terms(z, *wrong)
    with fastloss.use_backend("triton"), pytest.raises(fastloss.BackendError, match="without a teacher"):
        OPS.row_terms(z, *Terms(value=torch.zeros(3), teacher=z, want=SCORE_MEAN))


FAULTS = {
    "rest keeps a listed column": ("row_terms_scan.py", "rest = tl.where(c == column, NEG_INF, rest)", "rest = rest"),
    "a repetition counts twice": ("row_terms_kernels.py", "tl.sum(earlier.to(tl.int32), 1) > 0", "column < -5"),
    "temperature forgotten in the merge": ("row_terms_scan.py", "merge_pair(part + at + P_TEACHER * n, n, inverse_t)",
                                           "merge_pair(part + at + P_TEACHER * n, n, 1.0)"),
    "a wide id wraps": ("row_terms_scan.py", "tl.where(given & (y < V), y, -1).to(tl.int32)",
                        "tl.where(given, y.to(tl.int32), -1).to(tl.int32)"),
    "last block read twice": ("row_terms_scan.py", "tl.minimum(split * each + each, blocks)", "split * each + each + 1"),
    "padding in a sum": ("row_terms_kernels.py", "total += tl.where(inside, d, 0.0)", "total += d"),
    "the other slope": ("term_functions.py", "1.0 - third, TERM)\n", "third, TERM)\n"),
    "pi of a listed column": ("row_terms_gradient.py", "pi = tl.where(here, 0.0, pi)", "pi = pi"),
    "a bad id passes": ("row_terms_gradient.py", "g = nan_where(beyond, g)", "g = g"),
    "softcap without its slope": ("row_terms_gradient.py", "g *= 1.0 - (z", "g *= 1.0 - 0.0 * (z"),
    "the first of two own coefficients": ("row_terms_gradient.py", "own += tl.where(here", "own = tl.where(here"),
}  # fmt: skip


def patched(folder: Path, file: str, old: str, new: str) -> types.ModuleType:
    """row_terms of a copy of the kernels in which one line is wrong."""
    package = folder / "faulty"
    shutil.copytree(Path(kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (package / file).read_text()
    assert old in text, f"{file} no longer holds {old!r}"
    (package / file).write_text(text.replace(old, new))
    name = f"faulty_{abs(hash((old, new)))}"
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{name}.row_terms")


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_found(fault: str | None, tmp_path: Path) -> None:
    k = kernels if fault is None else patched(tmp_path, *FAULTS[fault])
    z = torch.randn(3, 75) - 3
    p = problem(3, 75, SUM | SCORE_MEAN | TERM, 4, MIXTURE, softcap=5.0)

    def run() -> None:
        torch.manual_seed(1)
        check(z, p, k, block=64, splits=2)

    if fault is None:
        run()
    else:
        with pytest.raises(AssertionError):
            run()
