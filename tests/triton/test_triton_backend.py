"""The `triton` backend as the package calls it: public functions, any forward with any backward, conditional updates."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastloss
from fastloss.contract import NUM_COEFS, Want

OPS = torch.ops.fastloss
BACKENDS = ("triton", "cpp", "reference")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_public_functions(linear: bool, reduction: str, smoothing: float) -> None:
    x, w, y = torch.randn(5, 16), torch.randn(70, 16), torch.tensor([3, -100, 69, 0, 41])
    results = []
    for dtype in (torch.float32, torch.float64):
        a, b = (t.to(dtype).requires_grad_() for t in (x, w))
        if dtype == torch.float64:
            loss = F.cross_entropy(a @ b.T, y, reduction=reduction, label_smoothing=smoothing)
            grads = torch.autograd.grad(loss.square().sum(), (a, b))
        else:
            with fastloss.use_backend("triton"):
                args = dict(reduction=reduction, label_smoothing=smoothing)
                loss = (
                    fastloss.linear_cross_entropy(a, b, y, **args)
                    if linear
                    else fastloss.cross_entropy(a @ b.T, y, **args)
                )
                grads = torch.autograd.grad(loss.square().sum(), (a, b))
        results.append((loss.detach(), *grads))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("forward, backward", [p for p in itertools.product(BACKENDS, BACKENDS) if "triton" in p])
def test_any_forward_with_any_backward(forward: str, backward: str) -> None:
    z, y = torch.randn(3, 50) * 3, torch.tensor([4, 49, -100])
    args = (y, None, torch.rand(50), torch.rand(3) + 0.5, -100, 31, 0.9, 5.0)
    coef = torch.randn(NUM_COEFS, 3)
    with fastloss.use_backend(forward):
        stats, argmax = OPS.row_stats(z, *args)
    with fastloss.use_backend(backward):
        dz = OPS.row_stats_backward(coef, stats, argmax, z, *args)
    with fastloss.use_backend("reference"):
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
        truth = OPS.row_stats_backward(coef.double(), stats.double(), argmax, z.double(), *wide)
    torch.testing.assert_close(dz.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_nothing_is_done_where_upstream_is_one(backend: str) -> None:
    z, y = torch.randn(3, 50), torch.tensor([4, 49, 0])
    stats, argmax = OPS.row_stats(z, y)
    coef = torch.randn(NUM_COEFS, 3)
    want = OPS.row_stats_backward(coef, stats, argmax, z, y)
    with fastloss.use_backend(backend):
        for upstream, expected in ((1.0, torch.full_like(z, 7.0)), (0.5, want)):
            out = torch.full_like(z, 7.0)
            OPS.row_stats_backward_unless_one_(out, torch.tensor(upstream), coef, stats, argmax, z, y)
            torch.testing.assert_close(out, expected)
            x = torch.randn(5000)
            scaled = x * upstream
            OPS.scale_unless_one_(x, torch.tensor(upstream))
            torch.testing.assert_close(x, scaled)


def test_what_the_tiled_kernels_do_not_take_is_said() -> None:
    x, w, q = torch.randn(3, 8), torch.randn(20, 8), torch.rand(3, 20)
    assert "probabilities" in fastloss.explain("linear_row_stats", x, w, None, None, q)
    with fastloss.use_backend("triton"), pytest.raises(fastloss.BackendError, match="probabilities"):
        OPS.linear_row_stats(x, w, None, None, q, want=int(Want.NOTHING))
