"""What the pair functions take and refuse: any layout, empty matrices, NaN, and errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dense_pairs import equal
from fastloss import Diagonal, Guide, PairMask, SameId, edge_dot, edge_dot_csr, pair_histogram, pair_map, pair_stats
from fastloss import row_topk as top

INF, NAN = float("inf"), float("nan")
CALLS: dict[str, Callable[..., Any]] = {
    "pair_stats": pair_stats,
    "pair_map": pair_map,
    "pair_histogram": lambda q, k=None, **given: pair_histogram(q, k, bins=5, low=-2.0, high=2.0, **given),
    "row_topk": lambda q, k=None, **given: top(q, k, 2, **given),
}


# ---------------------------------------------------------------------------------------------- layouts


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The numbers of x [M, D] in memory of other shapes."""
    m, d = x.shape
    wide = torch.full((m, 2 * d + 1), NAN, dtype=x.dtype)
    wide[:, 1::2] = x
    shifted = torch.zeros(m * d + 1, dtype=x.dtype)
    shifted[1:] = x.flatten()
    padded = torch.cat((x, torch.full((m, 3), NAN, dtype=x.dtype)), 1)
    return {
        "transposed": x.t().contiguous().t(), "strided": wide[:, 1::2], "unaligned": shifted[1:].view(m, d),
        "padded rows": padded[:, :d], "reversed twice": x.flip(0).contiguous().flip(0),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_any_layout_of_the_operands(call: str, dtype: torch.dtype) -> None:
    def run(q: Tensor, k: Tensor) -> list[Tensor]:
        out = CALLS[call](q, k, scale=2.0, excluded=Diagonal(1))
        tables = [out.table, out.columns.table] if call == "pair_stats" else list(out)
        if not q.requires_grad or call == "row_topk":
            return tables
        numbers = torch.cat([x.nan_to_num(0.0, 0.0, 0.0).flatten() for x in tables if x.requires_grad])
        return tables + list(torch.autograd.grad(numbers.square().sum(), (q, k)))

    q, k = torch.randn(35, 17).to(dtype).requires_grad_(), torch.randn(40, 17).to(dtype).requires_grad_()
    right = run(q, k)
    for name in layouts(q):
        leaves = [layouts(x.detach())[name].requires_grad_() for x in (q, k)]
        for a, b in zip(run(*leaves), right, strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_expanded_operands_and_vectors() -> None:
    """Stride 0: one row for all, one scale for all."""
    q, k = torch.randn(1, 8), torch.randn(9, 8)
    scale = torch.tensor(2.0)
    for a, b in ((q.expand(6, 8), q.repeat(6, 1)), (k[:, :1].expand(9, 8), k[:, :1].repeat(1, 8))):
        one = pair_stats(a, k, scale=scale.expand(len(a)), row_valid=torch.tensor(True).expand(len(a)))
        two = pair_stats(b, k, scale=scale.repeat(len(a)))
        equal(one.table, two.table, 1e-6)
        ids = torch.tensor(3).expand(len(a))
        equal(pair_stats(a, k, positive=SameId(ids, torch.arange(9))).pos_count, torch.ones(len(a)))


@pytest.mark.parametrize("m, n", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_empty_matrices(m: int, n: int) -> None:
    q, k = torch.randn(m, 4, requires_grad=True), torch.randn(n, 4, requires_grad=True)
    stats = pair_stats(q, k)
    assert stats.neg_lse.shape == (m,) and stats.columns.neg_lse.shape == (n,)
    assert (stats.neg_lse == -INF).all() and (stats.columns.neg_lse == -INF).all()
    total = stats.nll.sum() + stats.columns.nll.sum() + sum(x.sum() for x in pair_map(q, k)[:2])
    for x in torch.autograd.grad(total, (q, k)):
        assert x.isfinite().all()
    assert top(q, k, 3).columns.shape == (m, 3)
    assert pair_histogram(q, k, bins=4, low=0.0, high=1.0).neg.sum() == m * n - min(m, n)


# ---------------------------------------------------------------------------------------------- bad input

GOOD = {"q": torch.zeros(4, 3), "k": torch.zeros(5, 3)}
_G = torch.zeros
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "dimensions differ": (ValueError, r"one dimension D, got \[4, 3\] and \[5, 2\]", {"k": _G(5, 2)}),
    "vectors": (ValueError, r"must be \[M, D\] and \[N, D\]", {"q": _G(4)}),
    "dtypes differ": (TypeError, "one dtype, got torch.float32 and torch.float16", {"k": _G(5, 3).half()}),
    "integers": (TypeError, "must be floating, got torch.int64", {"q": _G(4, 3).long(), "k": _G(5, 3).long()}),
    "devices differ": (ValueError, "one device, got cpu and meta", {"k": _G(5, 3, device="meta")}),
    "zero temperature": (ValueError, "scale must be finite and > 0, got 0.0", {"scale": 0.0}),
    "negative temperature": (ValueError, "scale must be finite and > 0, got -1.0", {"scale": -1.0}),
    "infinite temperature": (ValueError, "scale must be finite and > 0, got inf", {"scale": INF}),
    "NaN temperature": (ValueError, "scale must be finite and > 0, got nan", {"scale": NAN}),
    "zero temperatures": (ValueError, "scale must be > 0, got 0.0", {"scale": torch.tensor([1.0, 0.0, 1.0, 1.0])}),
    "negative temperatures": (ValueError, "scale must be > 0, got -2.0", {"scale": torch.tensor(-2.0)}),
    "integer temperatures": (TypeError, "scale must be floating, got torch.int64", {"scale": torch.ones(4).long()}),
    "length of temperatures": (ValueError, r"scale must be a number, or a tensor \[\] or \[4\]", {"scale": torch.ones(5)}),
    "zero column scale": (ValueError, "column_scale must be > 0", {"column_scale": _G(5)}),
    "length of column scale": (ValueError, r"column_scale must .*\[5\]; got \[4\]", {"column_scale": torch.ones(4)}),
    "window and column scale": (
        ValueError, "take no column_scale", {"column_scale": torch.ones(5), "window": (0.0, 1.0)}
    ),
    "row ids": (
        ValueError, r"positive row ids must have shape \[4\], got \[5\]", {"positive": SameId(_G(5).int(), _G(5).int())}
    ),
    "column ids": (ValueError, r"positive column ids must have shape \[5\], got \[4\]", {"positive": SameId(_G(4).long())}),
    "ids of floats": (TypeError, "positive ids must be integers, got torch.float32", {"positive": SameId(_G(4), _G(5))}),
    "ids elsewhere": (
        ValueError, "excluded is on meta", {"excluded": SameId(*(_G(i, device="meta").int() for i in (4, 5)))}
    ),
    "mask": (ValueError, r"excluded mask must have shape \[4, 5\], got \[5, 4\]", {"excluded": PairMask(_G(5, 4).bool())}),
    "bits": (ValueError, r"positive bits must have shape \[4, 1\], got \[4, 5\]", {"positive": PairMask(_G(4, 5).int())}),
    "mask of floats": (TypeError, "must be torch.bool, or packed torch.int32", {"positive": PairMask(_G(4, 5))}),
    "no class": (TypeError, "positive must be Diagonal, SameId or PairMask", {"positive": [_G(4)]}),
    "two masks": (
        ValueError, "one SameId or one PairMask", {"positive": (PairMask(_G(4, 5).bool()), PairMask(_G(4, 5).bool()))}
    ),
    "three diagonals": (ValueError, r"two diagonals at most .*, got \(0, 1, 2\)", {"positive": Diagonal(0, 1, 2)}),
    "length of row_valid": (ValueError, r"row_valid must have shape \[4\], got \[5\]", {"row_valid": _G(5).bool()}),
    "dtype of column_valid": (TypeError, "column_valid must be torch.bool", {"column_valid": _G(5)}),
    "length of the window": (ValueError, r"window low must .*\[4\]; got \[3\]", {"window": (_G(3), None)}),
    "guide": (ValueError, r"guides must be \[4, E\] and \[5, E\]", {"guide": Guide(_G(4, 2), _G(4, 2), 0.0)}),
    "guide dtypes": (TypeError, "guides must have one dtype", {"guide": Guide(_G(4, 2), _G(5, 2).double(), 0.0)}),
    "column_valid without k": (ValueError, "pass row_valid", {"k": None, "column_valid": _G(4).bool()}),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_is_wrong(name: str, call: str) -> None:
    error, message, arguments = BAD[name]
    with pytest.raises(error, match=message):
        CALLS[call](**{**GOOD, **arguments})


def test_bad_options() -> None:
    q, k = GOOD["q"], GOOD["k"]
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("second_scale must be finite and > 0, got 0", lambda: pair_stats(q, k, second_scale=0)),
        ("second_scale must be finite and > 0, got nan", lambda: pair_stats(q, k, second_scale=NAN)),
        ("hardness must be finite, got inf", lambda: pair_stats(q, k, hardness=INF)),
        ("margin must be a number", lambda: pair_stats(q, k, margin=torch.zeros(5))),
        ("max_kept_bytes must be >= 0", lambda: pair_stats(q, k, max_kept_bytes=-1)),
        ("pass columns=True", lambda: pair_stats(q, k, columns=False).columns),
        ("pass mean=True", lambda: pair_stats(q, k).neg_mean),
        ("pass second_scale", lambda: pair_stats(q, k).second_neg_lse),
        ("unknown pair function 'relu': one of softplus, hinge", lambda: pair_map(q, k, "relu")),
        ("neg_threshold must be a number", lambda: pair_map(q, k, neg_threshold=torch.zeros(3))),
        ("bins must be an integer >= 2, got 1", lambda: pair_histogram(q, k, bins=1, low=0.0, high=1.0)),
        ("low must be below high", lambda: pair_histogram(q, k, bins=3, low=1.0, high=1.0)),
        ("low must be below high", lambda: pair_histogram(q, k, bins=3, low=NAN, high=1.0)),
        ("count must be an integer >= 1, got 0", lambda: top(q, k, 0)),
        ("among must be one of negative, positive, both", lambda: top(q, k, 1, among="all")),
        (r"rows and columns must be \[E\] both", lambda: edge_dot(q, k, torch.zeros(2).long(), torch.zeros(3).long())),
        (r"pointer must have shape \[5\]", lambda: edge_dot_csr(q, k, torch.zeros(4).long(), torch.zeros(0).long())),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    for bad in (torch.tensor([4]), torch.tensor([-1])):
        with pytest.raises(IndexError, match=r"rows must be in \[0, 4\)"):
            edge_dot(q, k, bad, torch.tensor([0]))
    with pytest.raises(TypeError, match="must be int64 or int32 ids"):
        edge_dot(q, k, torch.tensor([0.0]), torch.tensor([0]))
    with pytest.raises(TypeError, match=r"Diagonal takes integers, got 0\.5"):
        Diagonal(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("pointer", [[0, 1, 2, 3, 2], [1, 1, 2, 3, 3], [0, 1, 1, 2, 2]])
def test_a_pointer_that_is_none_is_an_error(pointer: list[int]) -> None:
    with pytest.raises(ValueError, match="pointer must"):
        edge_dot_csr(torch.ones(4, 2), torch.ones(5, 2), torch.tensor(pointer), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nan_propagates_as_in_torch(dtype: torch.dtype) -> None:
    """Where the dense matrix has a NaN, the row's and the column's statistics have it; nobody else's."""
    q, k = torch.randn(6, 4).to(dtype), torch.randn(40, 4).to(dtype)
    q[2, 1] = NAN
    q.requires_grad_()
    stats = pair_stats(q, k, excluded=PairMask(torch.arange(6)[:, None].expand(6, 40) == torch.arange(40) - 30))
    bad = torch.arange(6) == 2
    for x in (stats.neg_lse, stats.pos_lse, stats.pos_sum, stats.nll):
        assert torch.equal(x.isnan(), bad)
    own = torch.arange(40) == 2
    assert torch.equal(stats.columns.pos_lse.isnan(), own)
    assert torch.equal(stats.columns.neg_lse.isnan(), (torch.arange(40) != 32) & ~own)
    (dq,) = torch.autograd.grad(pair_stats(q, k, columns=False).nll.sum(), q)
    assert torch.equal(dq.isnan().any(1), bad)
    table = pair_map(q, k)
    assert torch.equal(table.neg.isnan(), bad) and torch.equal(table.pos.isnan(), bad)
    assert pair_stats(q, k, scale=torch.tensor(NAN)).nll.isnan().all()
