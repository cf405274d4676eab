"""What reviewers found in the pairs engine, each once."""

from __future__ import annotations

import pytest
import torch

import fastloss
from fastloss import Diagonal, PairMask, SameId, backend_cpp, pair_stats
from fastloss.pairs.pairing import Pairing


def test_a_large_second_scale_is_finite():
    q, k = torch.randn(8, 6, requires_grad=True), torch.randn(9, 6)
    stats = pair_stats(q, k, scale=3.0, second_scale=800.0, positive=None)
    z = 3.0 * q.double() @ k.double().t()
    torch.testing.assert_close(stats.second_neg_lse.double(), (800 * z).logsumexp(1), rtol=1e-5, atol=1e-3)
    assert torch.autograd.grad(stats.second_neg_lse.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("bias", [torch.randn(4), [5.0, 5.0]])
def test_a_bias_is_one_number(bias):
    with pytest.raises((ValueError, TypeError), match=r"bias must be one number|expected a number or a tensor"):
        pair_stats(torch.randn(4, 3), torch.randn(4, 3), bias=bias)


def test_autocast_makes_one_dtype_of_two():
    q, k = torch.randn(4, 8), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in ((q.bfloat16(), k), (q, k.bfloat16()), (q, k)):
            assert pair_stats(a, b, positive=None).neg_lse.isfinite().all()
    with pytest.raises(TypeError, match="one dtype"):
        pair_stats(q.bfloat16(), k)


@pytest.mark.parametrize("name", ["boost", "margin"])
def test_ops_read_nothing_beyond_a_short_vector(name):
    q, k = torch.randn(64, 8), torch.randn(5, 8)
    vectors = {"boost": None, "margin": None, name: torch.ones(1)}
    with fastloss.use_backend("cpp"), pytest.raises(ValueError, match=rf"{name} must have shape \[64\]"):
        torch.ops.fastloss.pair_stats(*Pairing(q, k, torch.ones(64)), *vectors.values(), 0, 1.0, 0)


def test_the_backward_op_reads_nothing_beyond_short_tables():
    q, k = torch.randn(64, 8), torch.randn(5, 8)
    short, pairing = torch.ones(9, 1), Pairing(q, k, torch.ones(64))
    with fastloss.use_backend("cpp"), pytest.raises(ValueError, match="rows must have shape"):
        torch.ops.fastloss.pair_stats_backward(
            torch.ones(9, 64),
            torch.ones(7, 0),
            short,
            torch.ones(7, 0),
            torch.ones(0),
            *pairing,
            None,
            None,
            0,
            1.0,
            0,
            15,
        )


def test_what_is_shared_by_the_samples_of_a_batch():
    b, m, n = 3, 5, 6
    q, k, ids, mask = torch.randn(b, m, 4), torch.randn(b, n, 4), torch.arange(m), torch.rand(m, n) < 0.2
    shared = pair_stats(q, k, scale=torch.tensor([2.0]), positive=SameId(ids, torch.arange(n)), excluded=PairMask(mask))
    one = pair_stats(q[1], k[1], scale=2.0, positive=SameId(ids, torch.arange(n)), excluded=PairMask(mask))
    torch.testing.assert_close(shared.neg_lse[1], one.neg_lse)
    with pytest.raises(ValueError, match=r"scale must be a number or have the 3 samples in front"):
        pair_stats(q, k, scale=torch.ones(2))


@pytest.mark.parametrize("features", [{}, {"mean": True, "second_scale": 2.0, "columns": False}, {"normalize": True}])
def test_small_samples_together(features):
    q, k = (torch.randn(3, 6, 4, requires_grad=True) for _ in range(2))
    scale = torch.tensor(2.0, requires_grad=True)
    whole = pair_stats(q, k, scale=scale, positive=Diagonal(1), **features)
    each = [pair_stats(q[i], k[i], scale=scale, positive=Diagonal(1), **features) for i in range(3)]
    inputs = (q, k, scale)
    mine = torch.autograd.grad((whole.nll + whole.neg_lse).sum(), inputs)
    right = torch.autograd.grad(sum((s.nll + s.neg_lse).sum() for s in each), inputs)
    for x, y in zip(mine, right, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"positive": torch.eye(4).bool()}, "wrap it in PairMask"),
        ({"positive": "diag"}, "got 'diag'"),
        ({"window": 0.5}, r"window must be \(low, high\)"),
        ({"scale": None}, "scale must be a number"),
    ],
)
def test_messages(given, said):
    with pytest.raises(TypeError, match=said):
        pair_stats(torch.randn(4, 3), torch.randn(4, 3), **given)


def test_a_diagonal_too_far_away():
    with pytest.raises(ValueError, match="below 2\\^62"):
        Diagonal(2**63)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_what_runs_by_default(dtype):
    x, scale = torch.randn(300, 64).to(dtype), torch.ones(300)
    pairing, ids = Pairing(x, x, scale), torch.zeros(3, dtype=torch.int64)
    calls = {
        "pair_stats": (*pairing, None, None, 0, 1.0, 0),
        "pair_map": (*pairing, None, None, 0),
        "pair_histogram": (*pairing, 8, 0.0, 1.0),
        "row_topk": (*pairing, 3, 1),
        "edge_dot": (x, x, ids, ids),
    }
    best = "cpp" if backend_cpp._missing(x) is None else "reference"
    assert {op: fastloss.registry.choose(op, *args) for op, args in calls.items()} == dict.fromkeys(calls, best)
