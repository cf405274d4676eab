"""`pair_map` and its backward: every instruction set, dtype, function and way to name pairs against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp
from fastloss.compiled import _C, MISSING
from fastloss.contract import PairFunction, PairMapStat
from fastloss.pairs import autograd
from fastloss.pairs.pairing import PAIRING_LENGTH, Pairing
from pair_cases import CASES, DTYPES, ISAS, SHAPES, double, pairing
from tolerance import check_close, check_gradient

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))
FUNCTIONS = tuple(PairFunction)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each level of csrc/cpu/cpu.h in turn, forced."""
    best = _C.best_isa()
    if request.param > best:
        pytest.skip(f"needs {ISAS[request.param]}; the best of this machine is {_C.isa_name(best)}")
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return request.param


def table(backend: str, p: Pairing, *args: object) -> Tensor:
    with fastloss.use_backend(backend):
        return torch.ops.fastloss.pair_map(*p, *args)


def gradients(backend: str, grad: Tensor, p: Pairing, *args: object) -> tuple[Tensor, ...]:
    with fastloss.use_backend(backend):
        return torch.ops.fastloss.pair_map_backward(grad, *p, *args)


def check(p: Pairing, function: int, thresholds: tuple[Tensor | None, Tensor | None] = (None, None)) -> None:
    """Table and gradients of `cpp` are as accurate as the reference of the same dtype.

    The scalar level rounds products before it adds them, and sigmoid's slope multiplies an error of the score by it.
    """
    k = 200 if backend_cpp.ISA == 0 else 8
    exact = double(p), *(None if t is None else t.double() for t in thresholds), int(function)
    args = *thresholds, int(function)
    ours, of_torch, right = table("cpp", p, *args), table("reference", p, *args), table("reference", *exact)
    check_close(ours, of_torch, right, torch.float32, k=k)
    assert torch.equal(ours[PairMapStat.NEG_ACTIVE :].double(), right[PairMapStat.NEG_ACTIVE :])
    grad = torch.randn(8, p.shape[0])
    found = gradients("cpp", grad, p, *args, 15)
    of_torch, right = gradients("reference", grad, p, *args, 15), gradients("reference", grad.double(), *exact, 15)
    for name, a, b, r in zip(("dq", "dk", "da", "db"), found, of_torch, right, strict=True):
        dtype = p.q.dtype if name in ("dq", "dk") else torch.float32
        assert a.dtype == dtype and a.shape == r.shape, name
        if a.numel():
            check_gradient(
                a if a.dim() == 2 else a[None], b if b.dim() == 2 else b[None], r.reshape(-1, r.shape[-1]), dtype, k=k
            )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(isa: int, dtype: torch.dtype, function: PairFunction) -> None:
    for shape in SHAPES:
        m = shape[0]
        check(pairing("diagonals", shape, dtype), function, (torch.randn(m), torch.randn(m)))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_classes(case: str, function: PairFunction) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(pairing(case, dtype=dtype), function, (torch.randn(70), None))


@pytest.mark.parametrize("case", CASES)
def test_classes_at_every_level(isa: int, case: str) -> None:
    check(pairing(case, (35, 77, 20)), PairFunction.SQUARED_HINGE, (None, torch.randn(35)))


@pytest.mark.parametrize("scale", [40.0, 1e4])
@pytest.mark.parametrize("function", FUNCTIONS[:-1])
def test_far_scores(isa: int, function: PairFunction, scale: float) -> None:
    """softplus is linear on one side and e^x on the other. (Sigmoid's slopes are below 2^-149 here: see the tails.)"""
    check(pairing("ids", (33, 70, 16), scale=scale), function)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_tails_are_relatively_exact(isa: int, function: PairFunction) -> None:
    """One pair a row: nothing hides a small number behind a large one."""
    x = torch.linspace(-80, 80, 161)
    for positive in ((), (0,)):
        p = Pairing(x[:, None].contiguous(), torch.ones(1, 1), torch.ones(161), positive_columns=None)
        if positive:
            ids = {"positive_rows": torch.zeros(161).int(), "positive_columns": torch.zeros(1).int()}
            p = p._replace(**ids)
        ours, right = (
            table("cpp", p, None, None, int(function)),
            table("reference", double(p), None, None, int(function)),
        )
        torch.testing.assert_close(ours.double(), right, rtol=1e-6, atol=1e-37)


def test_thresholds_have_gradients() -> None:
    p = pairing("ids")
    for function in FUNCTIONS:
        found = []
        for kind, backend in ((torch.float32, "cpp"), (torch.float64, "reference")):
            low, high = (t.to(kind).requires_grad_() for t in (torch.linspace(-1, 1, 70), torch.linspace(1, -1, 70)))
            own = p if kind == torch.float32 else double(p)
            with fastloss.use_backend(backend):
                made = autograd.pair_map(own, low, high, function)
                (made[:2] * torch.linspace(1, 2, 140, dtype=kind).reshape(2, 70)).sum().backward()
            found.append((low.grad, high.grad))
        for a, r in zip(*found, strict=True):
            torch.testing.assert_close(a.double(), r, rtol=1e-5, atol=1e-4)


def test_ties_with_the_threshold_are_active(isa: int) -> None:
    """x = 0 counts as active, its hinge has no slope."""
    p = Pairing(torch.ones(3, 4), torch.ones(50, 4), torch.ones(3), positive_diagonals=(0,))
    made = table("cpp", p, torch.full((3,), 4.0), torch.full((3,), 4.0), int(PairFunction.HINGE))
    assert made[PairMapStat.NEG_ACTIVE].tolist() == [49.0] * 3 and made[PairMapStat.POS_ACTIVE].tolist() == [1.0] * 3
    assert not made[: PairMapStat.NEG_ACTIVE].any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_and_infinities(isa: int, function: PairFunction) -> None:
    p = pairing("diagonals", (20, 40, 9))
    p.q[3, 2], p.k[7, 1], p.q[11, 0] = NAN, NAN, INF
    p = p._replace(column_valid=(torch.arange(40) != 7).to(torch.uint8))
    made, right = (table(b, p, None, None, int(function)) for b in ("cpp", "reference"))
    assert torch.equal(made.isnan(), right.isnan()) and torch.equal(made.isinf(), right.isinf())
    grad = torch.ones(8, 20)
    for a, b in zip(*(gradients(b, grad, p, None, None, int(function), 15) for b in ("cpp", "reference")), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.parametrize("needs", range(16))
def test_needs(needs: int) -> None:
    p = pairing("column_scale", (20, 33, 8))
    args, grad = (None, None, int(PairFunction.SOFTPLUS)), torch.randn(8, 20)
    every = gradients("cpp", grad, p, *args, 15)
    for bit, a, whole in zip((1, 2, 4, 8), gradients("cpp", grad, p, *args, needs), every, strict=True):
        assert torch.equal(a, whole) if needs & bit else a.numel() == 0


def test_empty(isa: int) -> None:
    for m, n in ((0, 5), (5, 0), (0, 0)):
        p = Pairing(torch.randn(m, 4), torch.randn(n, 4), torch.ones(m))
        assert torch.equal(table("cpp", p, None, None, 0), torch.zeros(8, m))
        dq, dk, da, _ = gradients("cpp", torch.ones(8, m), p, None, None, 0, 15)
        assert dq.shape == (m, 4) and dk.shape == (n, 4) and not dq.any() and not dk.any() and not da.any()


def test_errors() -> None:
    p = pairing("plain")
    with pytest.raises(ValueError, match="function"):
        table("cpp", p, None, None, 7)
    with pytest.raises(ValueError, match="neg_threshold"):
        table("cpp", p, torch.zeros(3), None, 0)
    with pytest.raises(ValueError, match="row_scale"):
        table("cpp", p._replace(row_scale=torch.ones(3)), None, None, 0)
    with pytest.raises(ValueError, match="grad"):
        gradients("cpp", torch.ones(2, 70), p, None, None, 0, 15)
    assert len(p) == PAIRING_LENGTH


def test_threads() -> None:
    """The table does not depend on their number, and nothing on which of them is first."""
    p, before = pairing("ids", (300, 200, 32)), torch.get_num_threads()
    args, grad, tables = (torch.randn(300), None, int(PairFunction.SOFTPLUS)), torch.randn(8, 300), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            tables.append(table("cpp", p, *args))
            again = zip(*(gradients("cpp", grad, p, *args, 15) for _ in range(2)), strict=True)
            assert all(torch.equal(a, b) for a, b in again)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(tables[0], other) for other in tables)
