"""pair_map, row_topk, edge_dot and edge_sum of the Triton backend, interpreted, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from fastloss.triton_kernels import edge_dot as edge_kernels
from fastloss.triton_kernels import pair_map as map_kernels
from fastloss.triton_kernels import row_topk as topk_kernels
from fastloss.triton_kernels.linear_row_stats import Tile

import fastloss
from fastloss.contract import PairFunction
from fastloss.pairs import edges, reference_edges
from triton_pair_problem import close, close_gradients, double, features, map_truth, operands

SMALL = Tile(16, 32, 16, 4, 2)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("function", list(PairFunction))
@pytest.mark.parametrize("kind", ["two diagonals", "ids and all else"])
def test_functions(kind: str, function: PairFunction) -> None:
    p = operands(35, 50, 20, **features(kind, 35, 50))
    thresholds = (torch.randn(35), torch.randn(35)) if kind == "ids and all else" else (None, torch.randn(35))
    grad = torch.randn(8, 35)
    table, gradients = map_truth(p, thresholds, function, grad)
    close(map_kernels.pair_map(p, *thresholds, function, tile=SMALL, splits=2), table, 1e-5)
    ours = map_kernels.pair_map_backward(grad, p, *thresholds, function, 15, tile=SMALL, chunk=32)
    close_gradients(ours, gradients, torch.float32)


@pytest.mark.parametrize("kind", ["queue", "excluded bits", "guide"])
def test_features(kind: str) -> None:
    p = operands(20, 40, 16, torch.float16, **features(kind, 20, 40))
    grad = torch.randn(8, 20)
    table, gradients = map_truth(p, (None, None), PairFunction.SQUARED_HINGE, grad)
    close(map_kernels.pair_map(p, None, None, PairFunction.SQUARED_HINGE, tile=SMALL), table, 1e-5)
    ours = map_kernels.pair_map_backward(grad, p, None, None, PairFunction.SQUARED_HINGE, 15, tile=SMALL)
    close_gradients(ours, gradients, torch.float16)


def test_tails() -> None:
    """SigLIP's logits: a softplus of -20 is e^-20 and not log(1 + e^-20) = 0; large ones are linear; NaN stays."""
    p = operands(3, 40, 16, scale=60.0)
    thresholds = torch.tensor([80.0, -80.0, 0.0]), None
    p.q[2] = torch.nan
    for function in PairFunction:
        table, gradients = map_truth(p, thresholds, function, torch.ones(8, 3))
        ours = map_kernels.pair_map(p, *thresholds, function, tile=SMALL)
        close(ours, table, 1e-5)
        assert ours[0, 2].isnan()
        small = table[0, 0]
        assert abs(ours[0, 0] - small) <= 1e-4 * small
        dq = map_kernels.pair_map_backward(torch.ones(8, 3), p, *thresholds, function, 1, tile=SMALL)[0]
        assert (dq[:2] - gradients[0][:2]).norm() <= 1e-5 * gradients[0][:2].norm()


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["two diagonals", "ids and all else", "nothing"])
def test_topk(kind: str, classes: int) -> None:
    p = operands(20, 70, 16, **features(kind, 20, 70))
    for count, splits in ((1, 2), (7, 3)):
        values, columns = topk_kernels.row_topk(p, count, classes, tile=SMALL, splits=splits)
        expected, where = reference_edges.row_topk(*map(double, p), count, classes)
        close(values, expected, 1e-5)
        assert torch.equal(columns, where)


def test_topk_of_equal_scores_and_nan() -> None:
    """The lowest column first; 0 and -0 are equal; NaN leads, as in torch's sort."""
    p = operands(4, 70, 8)
    p.q[0], p.q[1], p.q[2, :] = 0.0, 1.0, 0.5
    p.k[:, :] = torch.randint(-1, 2, (70, 8)).float()
    p.k[40] = torch.nan
    values, columns = topk_kernels.row_topk(p, 64, 1, tile=SMALL, splits=3)
    expected, where = reference_edges.row_topk(*p, 64, 1)
    assert torch.equal(columns[:3], where[:3]) and values[:, 0].isnan().all()
    close(values, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 77])
def test_edges(count: int, dtype: torch.dtype) -> None:
    q, k = torch.randn(20, 70, dtype=dtype), torch.randn(30, 70, dtype=dtype)
    rows, columns = torch.randint(0, 20, (count,)), torch.randint(0, 30, (count,))
    leaves = [t.double().requires_grad_() for t in (q, k)]
    expected = (leaves[0][rows] * leaves[1][columns]).sum(1)
    upstream = torch.randn(count)
    expected.backward(upstream.double())
    ours = [t.clone().requires_grad_() for t in (q, k)]
    with fastloss.use_backend("triton"):
        dots = edges.edge_dot(*ours, rows, columns)
        dots.backward(upstream)
    close(dots.detach(), expected.detach(), 1e-5)
    empty = (torch.empty(0), torch.empty(0))
    close_gradients((ours[0].grad, ours[1].grad, *empty), (leaves[0].grad, leaves[1].grad, *empty), dtype)


def test_an_edge_out_of_range_is_nan() -> None:
    q, k = torch.randn(4, 8), torch.randn(5, 8)
    dots = edge_kernels.edge_dot(q, k, torch.tensor([0, 4, 1, -1]), torch.tensor([4, 0, 5, 0]))
    assert dots.isnan().tolist() == [False, True, True, True]
    sums = edge_kernels.edge_sum(k, torch.ones(3), torch.tensor([0, 1, 3]), torch.tensor([2, 0, 5]))
    torch.testing.assert_close(sums[0], k[2])
    assert sums[1].isnan().all()


def test_through_the_ops() -> None:
    p = operands(20, 40, 16, **features("ids", 20, 40))
    grad = torch.randn(8, 20)
    table, gradients = map_truth(p, (None, None), PairFunction.SOFTPLUS, grad)
    with fastloss.use_backend("triton"):
        close(torch.ops.fastloss.pair_map(*p), table, 1e-5)
        close_gradients(torch.ops.fastloss.pair_map_backward(grad, *p), gradients, torch.float32)
        columns = torch.ops.fastloss.row_topk(*p, 3, 2)[1]
    assert torch.equal(columns, torch.ops.fastloss.row_topk(*p, 3, 2)[1])
