"""The pointwise losses on a GPU: every backend against fp64, paired with every other, and the upstream gradient of 1."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss.contract import Pointwise
from test_gpu import BACKENDS, DTYPES, available

pytestmark = pytest.mark.gpu
OPS = torch.ops.fastloss


def operands(kind: Pointwise, n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, t = torch.randn(n, device="cuda") * 5, torch.rand(n, device="cuda")
    t[::3] = t[::3].round()
    t = (t + 1e-6).log() if kind == Pointwise.KL_DIV_LOG_TARGET else t
    return x.to(dtype), t.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(Pointwise))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_result(backend: str, kind: Pointwise, dtype: torch.dtype) -> None:
    available(backend)
    eps = torch.finfo(dtype).eps
    for n, weights in ((1, (1, 1)), (999, (37, 999)), (1 << 20, (4096, 8192)), (3 << 20, (0, 0))):
        w, p = (torch.rand(k, device="cuda") + 0.5 if k and kind == 0 else None for k in weights)
        given = (*operands(kind, n, dtype), w, p, int(kind))
        wide = [t.double() if isinstance(t, Tensor) else t for t in given]
        upstream = torch.randn(n, device="cuda").to(dtype)
        with fastloss.use_backend(backend):
            loss, dinput = OPS.pointwise_loss(*given, 1.0, True, True)
            values, _ = OPS.pointwise_loss(*given, 1.0, False, False)
            again = OPS.pointwise_loss(*given, 1.0, True, True)
            each = OPS.pointwise_loss_backward(upstream, *given, 1.0)
        with fastloss.use_backend("reference"):
            loss64, dinput64 = OPS.pointwise_loss(*wide, 1.0, True, True)
            values64, _ = OPS.pointwise_loss(*wide, 1.0, False, False)
        assert torch.equal(loss, again[0]) and torch.equal(dinput, again[1]), "two runs differ"
        torch.testing.assert_close(loss.double(), loss64, rtol=3e-6, atol=3e-6 * n**0.5)
        pairs = ((dinput, dinput64), (values, values64), (each, dinput64 * upstream.double()))
        for a, b in pairs:
            torch.testing.assert_close(a.double(), b, rtol=eps + 3e-6, atol=eps * 1e-2 + 3e-6)


@pytest.mark.parametrize("forward, backward", list(itertools.product(BACKENDS, BACKENDS)))
def test_upstream_that_is_and_is_not_one(forward: str, backward: str) -> None:
    """No host sync either way; a gradient that stands already is left alone."""
    available(forward), available(backward)
    x, t = operands(Pointwise.BCE_WITH_LOGITS, 70_001, torch.bfloat16)
    x.requires_grad_()
    f = fastloss.functional.binary_cross_entropy_with_logits
    for scale in (1.0, 65536.0):
        with fastloss.use_backend(forward):
            loss = f(x, t) * torch.tensor(scale, device="cuda")
        with fastloss.use_backend(backward):
            (grad,) = torch.autograd.grad(loss, x)
        truth = (x.detach().double().sigmoid() - t.double()) * scale / x.numel()
        assert ((grad.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-6 * scale / x.numel()).all()
