"""pair_nll: the dense way of small matrices says what the kernels say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastloss import Diagonal, SameId, pair_nll, pair_stats
from fastloss.pairs import small

CASES = {
    "clip": {"columns": True},
    "normalize": {"columns": True, "normalize": True},
    "offset": {"positive": Diagonal(-3), "columns": False},  # some rows have no positive: the kernels' way
    "excluded": {"excluded": Diagonal(1, -1), "columns": True},
    "ids": {"positive": SameId(torch.arange(48) // 2), "columns": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_statistics(case, dtype):
    torch.manual_seed(0)
    q, k = (torch.randn(48, 24).to(dtype).requires_grad_() for _ in range(2))
    scale = torch.tensor(3.0, requires_grad=True)
    stats = pair_stats(q, k, scale=scale, **CASES[case])
    right = [stats.nll, stats.columns.nll] if CASES[case].get("columns") else [stats.nll]
    found = pair_nll(q, k, scale=scale, **CASES[case])
    cotangents = [torch.randn_like(r) for r in right]
    inputs, eps = (q, k, scale), torch.finfo(dtype).eps
    gradients = [torch.autograd.grad(x[: len(right)], inputs, cotangents) for x in (tuple(found), tuple(right))]
    for mine, other in zip(found, right, strict=False):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for mine, other in zip(*gradients, strict=True):
        error = (mine.double() - other.double()).norm() / other.double().norm()
        assert error < 4 * max(eps, 1e-6), (case, float(error))


def test_two_views_and_what_is_far_out():
    x = torch.randn(16, 8, requires_grad=True)
    for scale in (1.0, 1e3):
        mine = pair_nll(x, scale=scale, positive=Diagonal(8, -8), normalize=True)[0]
        right = pair_stats(x, scale=scale, positive=Diagonal(8, -8), normalize=True, columns=False).nll
        torch.testing.assert_close(mine, right, rtol=2e-5, atol=1e-4)
    nan = torch.randn(4, 8)
    nan[1, 2] = float("nan")
    rows, columns = pair_nll(nan, torch.randn(4, 8), columns=True)
    assert rows.isnan().tolist() == [False, True, False, False] and columns.isnan().all()


def test_small_ones_alone_are_dense(monkeypatch):
    def refuse(*_):
        raise AssertionError("dense")

    monkeypatch.setattr(small.DenseNll, "__init__", refuse)
    pair_nll(torch.randn(300, 8), torch.randn(300, 8))
    with pytest.raises(AssertionError, match="dense"):
        pair_nll(torch.randn(30, 8), torch.randn(30, 8))


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.tensor(-1.0)])
def test_errors_are_those_of_pair_stats(scale):
    with pytest.raises(ValueError, match="scale must be"):
        pair_nll(torch.randn(3, 4), torch.randn(3, 4), scale=scale)
    with pytest.raises(ValueError, match="one dimension D"):
        pair_nll(torch.randn(3, 4), torch.randn(3, 5))


def test_second_derivatives():
    q, k = (torch.randn(5, 3, dtype=torch.float32, requires_grad=True) for _ in range(2))
    (first,) = torch.autograd.grad(pair_nll(q, k)[0].sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q)
    (right,) = torch.autograd.grad(F.cross_entropy(q @ k.t(), torch.arange(5), reduction="sum"), q, create_graph=True)
    (right,) = torch.autograd.grad(right.square().sum(), q)
    torch.testing.assert_close(second, right, rtol=1e-4, atol=1e-5)
