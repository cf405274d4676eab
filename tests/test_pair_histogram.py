"""`pair_histogram` and its backward: every instruction set, dtype and way to name pairs against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp
from fastloss.compiled import _C, MISSING
from fastloss.pairs import autograd
from fastloss.pairs.pairing import Pairing
from pair_cases import CASES, DTYPES, ISAS, SHAPES, double, pairing
from tolerance import check_close, check_gradient

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))
BINS = (17, -2.0, 0.25)  # bins, first, step: some scores lie beyond
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each level of csrc/cpu/cpu.h in turn, forced."""
    best = _C.best_isa()
    if request.param > best:
        pytest.skip(f"needs {ISAS[request.param]}; the best of this machine is {_C.isa_name(best)}")
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return request.param


def table(backend: str, p: Pairing, bins: int, first: float, step: float) -> Tensor:
    with fastloss.use_backend(backend):
        return torch.ops.fastloss.pair_histogram(*p, bins, first, step)


def gradients(backend: str, grad: Tensor, p: Pairing, *args: object) -> tuple[Tensor, ...]:
    with fastloss.use_backend(backend):
        return torch.ops.fastloss.pair_histogram_backward(grad, *p, *args)


def exact(m: int, n: int, d: int = 8, dtype: torch.dtype = torch.float32) -> Pairing:
    """Scores that are multiples of 1/8 in every dtype, so that no pair is on one side of a bin's edge here and on the
    other there. They are in [-d/4, d/4]."""
    q, k = (torch.randint(-1, 2, (count, d)).to(dtype) / 2 for count in (m, n))
    return Pairing(q, k, torch.full((m,), 0.5))


def check(p: Pairing, bins: tuple[int, float, float] = BINS, smooth: bool = False) -> None:
    """Table and gradients of `cpp` are as accurate as the reference of the same dtype.

    The gradient of a bin jumps at its edges. `smooth`: one gradient for all of them, so that scores may lie anywhere.
    """
    ours, of_torch, right = table("cpp", p, *bins), table("reference", p, *bins), table("reference", double(p), *bins)
    assert ours.dtype == torch.float32
    check_close(ours, of_torch, right, torch.float32, k=8)
    grad = torch.arange(bins[0]).expand(2, -1) * torch.tensor([[0.5], [-0.25]]) if smooth else torch.randn(2, bins[0])
    found = gradients("cpp", grad, p, *bins, 15)
    of_torch, right = (gradients("reference", g, x, *bins, 15) for g, x in ((grad, p), (grad.double(), double(p))))
    for name, a, b, r in zip(("dq", "dk", "da", "db"), found, of_torch, right, strict=True):
        dtype = p.q.dtype if name in ("dq", "dk") else torch.float32
        assert a.dtype == dtype and a.shape == r.shape, name
        if a.numel():
            check_gradient(*(x if x.dim() == 2 else x[None] for x in (a, b, r)), dtype, k=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(isa: int, dtype: torch.dtype) -> None:
    for m, n, _ in SHAPES:
        check(exact(m, n, dtype=dtype)._replace(positive_diagonals=(0,)), (17, -1.0, 0.15))


@pytest.mark.parametrize("case", CASES)
def test_classes(case: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(pairing(case, dtype=dtype), (9, -40.0, 10.0), smooth=True)


@pytest.mark.parametrize("bins", [2, 3, 100, 5000])
def test_bins(isa: int, bins: int) -> None:
    check(exact(40, 60)._replace(positive_diagonals=(0, 1)), (bins, -0.99, 1.9 / bins))


@pytest.mark.parametrize("case", CASES)
def test_totals_are_counts(case: str) -> None:
    """Every pair that counts is counted once, whether inside the range or beyond."""
    p = pairing(case, (90, 170, 16))
    with fastloss.use_backend("reference"):
        counts = torch.ops.fastloss.pair_map(*p)[6:].sum(1)
    torch.testing.assert_close(table("cpp", p, *BINS).sum(1), counts, rtol=1e-6, atol=0)


def test_whole_numbers_stay_whole(isa: int) -> None:
    """Scores on the bins: a bin's number is a count, exact beyond what float32 lanes could add up one by one."""
    p = Pairing(torch.ones(600, 1), torch.arange(700.0)[:, None] % 7, torch.ones(600))
    assert table("cpp", p, 7, 0.0, 1.0).tolist() == [[60000.0] * 7, [0.0] * 7]


def test_beyond_the_range(isa: int) -> None:
    """Clamped: the outer bins take all of it, without a gradient; on the edge there is one."""
    p = Pairing(torch.tensor([[1.0]]), torch.tensor([[-9.0], [0.0], [4.0], [9.0], [INF], [-INF]]), torch.ones(1))
    assert table("cpp", p, 5, 0.0, 1.0).tolist() == [[3.0, 0.0, 0.0, 0.0, 3.0], [0.0] * 5]
    grad = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [0.0] * 5])
    p = p._replace(k=p.k[:4])
    assert gradients("cpp", grad, p, 5, 0.0, 1.0, 15)[1].tolist() == [[0.0], [1.0], [8.0], [0.0]]


def test_nan_is_counted_nowhere(isa: int) -> None:
    p = exact(20, 30)._replace(positive_diagonals=(0,))
    p.q[3, 2] = NAN
    made = table("cpp", p, *BINS)
    assert made.sum().item() == pytest.approx(19 * 30)
    assert torch.equal(made, table("cpp", p._replace(row_valid=(torch.arange(20) != 3).to(torch.uint8)), *BINS))
    found, right = (gradients(b, torch.randn(2, 17), p, *BINS, 15) for b in ("cpp", "reference"))
    for a, b in zip(found, right, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_differentiable_like_a_dense_histogram() -> None:
    p = pairing("ids", (30, 40, 6))
    found = []
    for kind, backend in ((torch.float32, "cpp"), (torch.float64, "reference")):
        q, k = (x.to(kind, copy=True).requires_grad_() for x in (p.q, p.k))
        own = (p if kind == torch.float32 else double(p))._replace(q=q, k=k)
        with fastloss.use_backend(backend):
            made = autograd.pair_histogram(own, 5, -20.0, 10.0)
            (made * torch.arange(10, dtype=kind).reshape(2, 5)).sum().backward()
        found.append((q.grad, k.grad))
    for a, r in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), r, rtol=1e-4, atol=1e-4)


def test_empty(isa: int) -> None:
    for m, n in ((0, 5), (5, 0)):
        p = Pairing(torch.randn(m, 4), torch.randn(n, 4), torch.ones(m))
        assert not table("cpp", p, *BINS).any()
        dq, dk, da, _ = gradients("cpp", torch.ones(2, 17), p, *BINS, 15)
        assert dq.shape == (m, 4) and dk.shape == (n, 4) and not dq.any() and not dk.any() and not da.any()


def test_errors() -> None:
    p = pairing("plain")
    for bins, step in ((1, 1.0), (4, 0.0), (4, -1.0), (4, NAN)):
        with pytest.raises(ValueError, match="at least 2 bins and a positive step"):
            table("cpp", p, bins, 0.0, step)
    with pytest.raises(ValueError, match="grad"):
        gradients("cpp", torch.ones(2, 5), p, *BINS, 15)


def test_threads() -> None:
    """The table does not depend on their number, and nothing on which of them is first."""
    p, before = pairing("ids", (300, 200, 32)), torch.get_num_threads()
    grad, tables = torch.randn(2, 17), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            tables.append(table("cpp", p, *BINS))
            again = zip(*(gradients("cpp", grad, p, *BINS, 15) for _ in range(2)), strict=True)
            assert all(torch.equal(a, b) for a, b in again)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(tables[0], other) for other in tables)
