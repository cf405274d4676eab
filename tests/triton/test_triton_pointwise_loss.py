"""The Triton kernel of the pointwise losses in the interpreter: every kind, dtype, weight and result against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss.contract import Pointwise

OPS = torch.ops.fastloss
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = list(Pointwise)


def operands(kind: Pointwise, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, t = torch.randn(n) * 5, torch.rand(n)
    t[::3] = t[::3].round()
    t = (t + 1e-6).log() if kind == Pointwise.KL_DIV_LOG_TARGET else t
    return x.to(dtype), t.to(dtype)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def check(kind: Pointwise, dtype: torch.dtype, given: tuple[Tensor | None, ...]) -> None:
    """Loss, values, gradient with either upstream, and both in one call; against the reference in float64."""
    n, eps = given[0].numel(), torch.finfo(dtype).eps
    close = lambda a, b: torch.testing.assert_close(a.double(), b, rtol=eps + 2e-6, atol=eps * 1e-2 + 2e-6)  # noqa: E731
    with fastloss.use_backend("triton"):
        loss, dinput = OPS.pointwise_loss(*given, kind, 0.5, True, True)
        values, _ = OPS.pointwise_loss(*given, kind, 1.0, False, False)
        one, each = torch.tensor(0.5), torch.randn(n).to(dtype)
        scaled, weighted = (OPS.pointwise_loss_backward(g, *given, kind, 3.0) for g in (one, each))
    with fastloss.use_backend("reference"):
        loss64, dinput64 = OPS.pointwise_loss(*wide(*given), kind, 0.5, True, True)
        values64, slopes64 = OPS.pointwise_loss(*wide(*given), kind, 1.0, False, True)
    torch.testing.assert_close(loss.double(), loss64, rtol=2e-6, atol=1e-6 * n**0.5)
    close(dinput, dinput64)
    close(values, values64)
    close(scaled, slopes64 * 1.5)
    close(weighted, slopes64 * each.double() * 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_result(kind: Pointwise, dtype: torch.dtype) -> None:
    for n in (1, 37, 9001):
        check(kind, dtype, (*operands(kind, n, dtype), None, None))


@pytest.mark.parametrize("weight, pos_weight", [(1, None), (None, 1), (7, 30), (210, 5)])
def test_weights(weight: int | None, pos_weight: int | None) -> None:
    w, p = (None if k is None else torch.rand(k) + 0.5 for k in (weight, pos_weight))
    for dtype in DTYPES:
        check(Pointwise.BCE_WITH_LOGITS, dtype, (*operands(Pointwise.BCE_WITH_LOGITS, 210, dtype), w, p))


def test_weights_longer_than_a_block() -> None:
    w, p = torch.rand(4500) + 0.5, torch.rand(9000) + 0.5
    check(Pointwise.BCE_WITH_LOGITS, torch.float32, (*operands(Pointwise.BCE_WITH_LOGITS, 9000, torch.float32), w, p))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_labels_of_16_bits(kind: Pointwise) -> None:
    x, t = operands(kind, 300, torch.float32)
    for dtype in DTYPES[1:]:
        with fastloss.use_backend("triton"):
            assert OPS.pointwise_loss(x.to(dtype), t, None, None, kind, 1.0, False, False)[0].dtype == torch.float32
        check(kind, dtype, (x.to(dtype), t, None, None))


def test_hard_values() -> None:
    """Logits that overflow an exponential, infinities and NaN: as torch has them, and margins keep their digits."""
    x = torch.tensor([-1e4, -120, -20, 0, 20, 80, 120, 1e4, float("inf"), float("-inf"), float("nan")])
    for t in (0.0, 0.5, 1.0):
        labels = torch.full_like(x, t)
        with fastloss.use_backend("triton"):
            values, slopes = OPS.pointwise_loss(x, labels, None, None, 0, 1.0, False, True)
        with fastloss.use_backend("reference"):
            values64, slopes64 = OPS.pointwise_loss(*wide(x, labels, None, None), 0, 1.0, False, True)
        torch.testing.assert_close(values.double(), values64, rtol=3e-6, atol=1e-37, equal_nan=True)
        torch.testing.assert_close(slopes.double(), slopes64, rtol=3e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
def test_public_functions(reduction: str) -> None:
    x, t = torch.randn(3, 70), torch.rand(3, 70).softmax(-1)
    for name in ("binary_cross_entropy_with_logits", "kl_div")[reduction == "batchmean" :]:
        results = []
        for function, kind in itertools.product((fastloss.functional, torch.nn.functional), (x.dtype,)):
            a = x.to(kind).log_softmax(-1).detach().requires_grad_()
            with fastloss.use_backend("triton"):
                loss = getattr(function, name)(a, t.to(kind), reduction=reduction)
                results.append((loss, *torch.autograd.grad(loss.square().sum(), a)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_nothing_is_done_where_upstream_is_one() -> None:
    x, t = operands(Pointwise.KL_DIV, 50, torch.float32)
    for backend, upstream in itertools.product(("triton", "reference"), (1.0, 0.5)):
        out = torch.full_like(x, 7.0)
        with fastloss.use_backend(backend):
            OPS.pointwise_loss_backward_unless_one_(out, torch.tensor(upstream), x, t, None, None, 1, 2.0)
        torch.testing.assert_close(out, torch.full_like(x, 7.0) if upstream == 1 else -t)
