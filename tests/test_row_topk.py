"""`row_topk`: every instruction set, dtype and class against torch's sort of the dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp
from fastloss.compiled import _C, MISSING
from fastloss.contract import PairClasses
from fastloss.pairs.pairing import Pairing
from pair_cases import CASES, DTYPES, ISAS, double, pairing

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each level of csrc/cpu/cpu.h in turn, forced."""
    best = _C.best_isa()
    if request.param > best:
        pytest.skip(f"needs {ISAS[request.param]}; the best of this machine is {_C.isa_name(best)}")
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return request.param


def topk(backend: str, p: Pairing, count: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    with fastloss.use_backend(backend):
        return torch.ops.fastloss.row_topk(*p, count, int(classes))


def whole(m: int, n: int, d: int, dtype: torch.dtype = torch.float32, limit: int = 9) -> Pairing:
    """Small integers: every sum is exact, and there are many ties."""
    q, k = (torch.randint(-limit, limit + 1, (count, d)).to(dtype) for count in (m, n))
    return Pairing(q, k, torch.ones(m))


def check(p: Pairing, count: int, classes: int = 3) -> None:
    values, columns = topk("cpp", p, count, classes)
    right, where = topk("reference", p, count, classes)
    assert values.dtype == torch.float32 and columns.dtype == torch.int64
    assert torch.equal(columns, where)
    assert torch.equal(values.nan_to_num(7e30), right.nan_to_num(7e30))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_scores_with_ties(isa: int, dtype: torch.dtype) -> None:
    for m, n, d in ((1, 1, 1), (3, 65, 16), (70, 333, 33), (130, 31, 8)):
        for count in (1, 2, 10, 40, 400):
            check(whole(m, n, d, dtype), count)


@pytest.mark.parametrize("count", [1, 7, 64, 2000])
def test_the_dense_matrix(isa: int, count: int) -> None:
    p = pairing("plain", (40, 1500, 48))
    z = double(p).row_scale[:, None] * (p.q.double() @ p.k.double().t())
    values, columns = topk("cpp", p, count)
    right = z.topk(min(count, 1500)).values
    torch.testing.assert_close(values[:, : right.shape[1]].double(), right, rtol=1e-5, atol=1e-5)
    assert (columns[:, 1500:] == -1).all() and (values[:, 1500:] == -INF).all()
    columns = columns[:, :1500]
    torch.testing.assert_close(z.gather(1, columns), right, rtol=1e-5, atol=1e-5)
    assert all(len(set(row.tolist())) == columns.shape[1] for row in columns)


@pytest.mark.parametrize("classes", tuple(PairClasses))
@pytest.mark.parametrize("case", CASES)
def test_classes(case: str, classes: PairClasses) -> None:
    """Whole dot products and scales that are powers of two: the same order as in float64, ties too."""
    for shape in ((70, 65, 24), (33, 200, 5)):
        p = pairing(case, shape)
        b = None if p.column_scale is None else 2.0 ** torch.randint(-1, 2, (shape[1],))
        p = p._replace(q=(p.q * 3).round(), k=(p.k * 3).round(), column_scale=b)
        for count in (1, 5, 300):
            values, columns = topk("cpp", p, count, classes)
            right, where = topk("reference", double(p), count, classes)
            assert torch.equal(columns, where)
            torch.testing.assert_close(values.double(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", tuple(PairClasses))
def test_classes_at_every_level(isa: int, classes: PairClasses) -> None:
    p = whole(50, 90, 16)
    ids = {"positive_rows": (torch.arange(50) % 3).int(), "positive_columns": (torch.arange(90) % 3).int()}
    check(p._replace(**ids, excluded_diagonals=(0, 3)), 12, classes)


def test_rising_and_falling_scores(isa: int) -> None:
    """The worst order for a threshold, and the best."""
    ramp = torch.arange(1000.0)[:, None]
    for k in (ramp, -ramp, torch.zeros(1000, 1)):
        check(Pairing(torch.ones(3, 1), k, torch.ones(3)), 9)


def test_nan_ranks_first_and_lower_columns_before_higher(isa: int) -> None:
    p = whole(9, 120, 4)
    p.k[[5, 40, 70, 111], 0] = NAN
    p.q[2] = NAN
    p.k[90] = 100.0
    for count in (1, 3, 4, 6, 130):
        check(p, count)
    assert topk("cpp", p, 6)[1][0].tolist()[:4] == [5, 40, 70, 111]
    assert topk("cpp", p, 3)[1][2].tolist() == [0, 1, 2]


def test_infinities(isa: int) -> None:
    """A member at -inf is still a member."""
    k = torch.tensor([[1.0], [-INF], [INF], [3.0], [-INF]])
    values, columns = topk("cpp", Pairing(torch.ones(1, 1), k, torch.ones(1)), 6)
    assert columns.tolist() == [[2, 3, 0, 1, 4, -1]]
    assert values.tolist() == [[INF, 3.0, 1.0, -INF, -INF, -INF]]


def test_nothing_to_rank(isa: int) -> None:
    for m, n, count in ((3, 0, 2), (0, 3, 2), (3, 4, 0)):
        values, columns = topk("cpp", Pairing(torch.ones(m, 2), torch.ones(n, 2), torch.ones(m)), count)
        assert values.shape == columns.shape == (m, count)
        assert (values == -INF).all() and (columns == -1).all()


def test_errors() -> None:
    p = pairing("plain")
    with pytest.raises(ValueError, match="count"):
        topk("cpp", p, -1)
    for classes in (0, 4):
        with pytest.raises(ValueError, match="classes"):
            topk("cpp", p, 1, classes)


def test_threads_do_not_matter() -> None:
    p, before, results = whole(300, 400, 16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(topk("cpp", p, 20))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
