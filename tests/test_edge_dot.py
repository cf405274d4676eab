"""`edge_dot` and `edge_sum` on the CPU: every instruction set, dtype and ragged width against float64; their errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp
from fastloss.compiled import _C, MISSING
from fastloss.pairs.edges import edge_dot, edge_dot_csr
from tolerance import check_close, check_gradient

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
WIDTHS = (1, 7, 16, 63, 64, 65, 130, 257, 1152)
M, N, EDGES = 13, 29, 150
NAN = float("nan")


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


def operands(d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(M, d).to(dtype), torch.randn(N, d).to(dtype)


def edges(count: int = EDGES) -> tuple[Tensor, Tensor]:
    """Row 3 and column 5 have no edge, and many edges come twice."""
    rows, columns = torch.randint(M - 1, (count,)), torch.randint(N - 1, (count,))
    return rows + (rows >= 3), columns + (columns >= 5)


def formula(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q[rows].to(wide) * k[columns].to(wide)).sum(1)


def run(op: str, *args: Tensor) -> Tensor:
    with fastloss.use_backend("cpp"):
        return getattr(torch.ops.fastloss, op)(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
def test_dots(isa: int, dtype: torch.dtype, d: int) -> None:
    q, k = operands(d, dtype)
    rows, columns = edges()
    right = formula(q.double(), k.double(), rows, columns)
    ours = run("edge_dot", q, k, rows, columns)
    assert ours.dtype == torch.float32
    check_close(ours[None], formula(q, k, rows, columns)[None], right[None], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
def test_gradients(isa: int, dtype: torch.dtype, d: int) -> None:
    q, k = operands(d, dtype)
    rows, columns = edges()
    upstream = torch.randn(EDGES)
    found = {}
    for name, function, kind in (
        ("ours", edge_dot, dtype),
        ("torch", formula, dtype),
        ("right", formula, torch.float64),
    ):
        a, b = (x.to(kind, copy=True).requires_grad_() for x in (q, k))
        with fastloss.use_backend("cpp" if name == "ours" else "reference"):
            function(a, b, rows, columns).backward(upstream.to(torch.promote_types(kind, torch.float32)))
        found[name] = (a.grad, b.grad)
    for ours, of_torch, right in zip(found["ours"], found["torch"], found["right"], strict=True):
        assert ours.dtype == dtype
        check_gradient(ours, of_torch, right, dtype)
    assert not found["ours"][0][3].any() and not found["ours"][1][5].any()


def test_rows_apart_and_transposed(isa: int) -> None:
    q, k = operands(40)
    rows, columns = edges()
    right = run("edge_dot", q, k, rows, columns)
    wide = torch.full((M, 50), NAN)
    wide[:, 3:43] = q
    apart = run("edge_dot", wide[:, 3:43], k.t().contiguous().t(), rows, columns)
    assert torch.equal(apart, right)
    x = torch.full((N, 50), NAN)
    x[:, 3:43] = k
    pointer = torch.tensor([0, 2, 2, 90, EDGES])
    weight = torch.randn(EDGES)
    assert torch.equal(
        run("edge_sum", x[:, 3:43], weight, pointer, columns), run("edge_sum", k, weight, pointer, columns)
    )


@pytest.mark.parametrize("d", [1, 24, 300])
def test_infinities_and_nan_stay_with_their_edges(isa: int, d: int) -> None:
    q, k = operands(d)
    q[0, -1], q[1, 0] = NAN, float("inf")
    rows = torch.tensor([0, 1, 2, 1])
    columns = torch.tensor([1, 2, 3, 4])
    dots = run("edge_dot", q, k, rows, columns)
    assert dots[0].isnan() and dots[1].isinf() and dots[2].isfinite() and dots[3].isinf()
    sums = run("edge_sum", q, torch.ones(3), torch.tensor([0, 1, 3]), torch.tensor([0, 2, 3]))
    assert sums[0, -1].isnan() and sums[0, :-1].isfinite().all() and sums[1].isfinite().all()
    # torch's 0 * inf
    assert run("edge_sum", q, torch.zeros(1), torch.tensor([0, 1]), torch.tensor([1]))[0, 0].isnan()


def test_nothing_to_do(isa: int) -> None:
    q, k = operands(8)
    none = torch.zeros(0, dtype=torch.int64)
    assert run("edge_dot", q, k, none, none).shape == (0,)
    assert torch.equal(run("edge_dot", q[:, :0], k[:, :0], *edges(3)), torch.zeros(3))
    assert torch.equal(run("edge_sum", k, torch.zeros(0), torch.zeros(4, dtype=torch.int64), none), torch.zeros(3, 8))
    assert run("edge_sum", k, torch.zeros(0), torch.zeros(1, dtype=torch.int64), none).shape == (0, 8)
    assert run("edge_sum", k[:0], torch.zeros(0), torch.zeros(2, dtype=torch.int64), none).tolist() == [[0.0] * 8]


@pytest.mark.parametrize("bad", [-1, 29, 2**40])
def test_ids_out_of_range(bad: int) -> None:
    """The ops check by themselves: nothing is read where no row is."""
    q, k = operands(8)
    ids, wrong = torch.tensor([0, 1]), torch.tensor([0, bad])
    with pytest.raises(IndexError, match=rf"columns must be in \[0, 29\), got {bad} at 1"):
        run("edge_dot", q, k, ids, wrong)
    with pytest.raises(IndexError, match=rf"rows must be in \[0, 13\), got {bad} at 1"):
        run("edge_dot", q, k, wrong, ids)
    with pytest.raises(IndexError, match=rf"source must be in \[0, 29\), got {bad} at 1"):
        run("edge_sum", k, torch.ones(2), torch.tensor([0, 2]), wrong)
    with pytest.raises(IndexError, match="columns must be in"):
        edge_dot(q, k, ids, wrong)


@pytest.mark.parametrize("pointer", [[1, 2], [0, 3], [0, 3, 1, 2], [-1, 2], [0]])
def test_pointers_out_of_range(pointer: list[int]) -> None:
    with pytest.raises(IndexError, match="pointer must"):
        run("edge_sum", operands(8)[1], torch.ones(2), torch.tensor(pointer), torch.tensor([0, 1]))


def test_wrong_shapes() -> None:
    q, k = operands(8)
    ids = torch.tensor([0, 1])
    for args in ((q, k[:, :7], ids, ids), (q, k.half(), ids, ids), (q, k, ids, ids[:1]), (q, k, ids, ids.int())):
        with pytest.raises(ValueError, match="must"):
            run("edge_dot", *args)
    for args in ((k, torch.ones(3), ids, ids), (k, torch.ones(2), ids[:0], ids), (k[0], torch.ones(2), ids, ids)):
        with pytest.raises(ValueError, match="must"):
            run("edge_sum", *args)
    with pytest.raises(fastloss.BackendError, match="float64"):
        run("edge_dot", q.double(), k.double(), ids, ids)


def test_threads_do_not_matter(threads: None) -> None:
    q, k = operands(96, torch.bfloat16)
    rows, columns = edges(3000)
    upstream = torch.randn(3000)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
        with fastloss.use_backend("cpp"):
            dots = edge_dot(a, b, rows, columns)
            dots.backward(upstream)
        results.append((dots, a.grad, b.grad))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_csr_list() -> None:
    q, k = operands(20)
    pointer = torch.tensor([0, 2, 2, *range(3, 14)])
    columns = torch.randint(N, (13,))
    rows = torch.repeat_interleave(torch.arange(M), pointer.diff())
    dots = edge_dot_csr(q, k, pointer, columns.int())
    check_close(dots, formula(q, k, rows, columns), formula(q.double(), k.double(), rows, columns), torch.float32, 16)


def test_saves_nothing_of_edges_by_columns() -> None:
    q, k = (x.requires_grad_() for x in operands(64))
    rows, columns = edges(200)
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with fastloss.use_backend("cpp"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        edge_dot(q, k, rows, columns)
    assert saved and max(saved) <= max(q.numel(), k.numel())
