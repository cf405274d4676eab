"""`ternary_linear` against `ternarize` and a dense product, and its formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss.quant import ternarize, ternary_linear
from fastloss.quant.lowbit_matmul import quantize_rows
from tolerance import check_close

M, N, K = 9, 13, 70


def ternary(w: Tensor, method: str, dim: int | None, clip: bool, center: bool, detach: bool) -> Tensor:
    """scale t with the declared gradient, in plain operations."""
    flat = w if dim == 0 else w.reshape(1, -1)
    middle = flat.mean(1, keepdim=True).detach() if center else 0.0
    u = flat - middle
    mean = u.abs().mean(1, keepdim=True)
    threshold = (0.7 if method == "twn" else 2 / 3 if method == "mean43" else 0.5) * mean.detach()
    t = (u.detach().abs() > threshold) * u.detach().sign()
    if method == "twn":
        scale = (u.abs() * t.abs()).sum(1, keepdim=True) / t.abs().sum(1, keepdim=True)
    else:
        scale = mean * (4 / 3 if method == "mean43" else 1)
    scale = scale.detach() if detach else scale
    through = torch.where(u.detach().abs() <= scale.detach(), flat, flat.detach()) if clip else flat
    return (scale * t + through - through.detach()).reshape(w.shape)


def straight_through(x: Tensor) -> Tensor:
    codes, scale = quantize_rows(x.detach())
    return x + (codes * scale[:, None] - x).detach()


@pytest.mark.parametrize("method", ["absmean", "twn", "mean43"])
@pytest.mark.parametrize("dim", [None, 0])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("act_quant", [None, "int8row"])
def test_gradients_in_float64(method: str, dim: int | None, clip: bool, act_quant: str | None) -> None:
    for center in (False, True):
        for detach in (False, True):
            x, w = torch.randn(M, K, dtype=torch.float64), torch.randn(N, K, dtype=torch.float64)
            bias, g = torch.randn(N, dtype=torch.float64), torch.randn(M, N, dtype=torch.float64)
            inputs = [t.requires_grad_() for t in (x, w, bias)]
            y = ternary_linear(
                x, w, bias, method=method, dim=dim, surrogate="clip" if clip else "identity", center=center,
                act_quant=act_quant, detach=detach,
            )  # fmt: skip
            right = (straight_through(x) if act_quant else x) @ ternary(w, method, dim, clip, center, detach).T + bias
            torch.testing.assert_close(y, right, rtol=1e-10, atol=1e-10)
            for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(right, inputs, g), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels(dtype: torch.dtype) -> None:
    x, w, g = torch.randn(3, 3, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(3, 3, N).to(dtype)
    x.requires_grad_(), w.requires_grad_()
    y = ternary_linear(x, w, dim=0, method="twn")
    ours = (y, *torch.autograd.grad(y, (x, w), g))
    results = []
    for of in (torch.float32, torch.float64):
        t = ternarize(w.detach().float(), "twn", dim=0).to(of).requires_grad_()
        z = x.detach().to(of).requires_grad_()
        found = z @ t.T
        results.append((found, *torch.autograd.grad(found, (z, t), g.to(of))))
    for a, b, c in zip(ours, *results, strict=True):
        assert a.dtype == dtype
        check_close(a, b.to(dtype), c, dtype)


def test_what_is_saved() -> None:
    """Two bits an element of W, and one byte an element of x with int8 rows."""
    x, w = torch.randn(256, 1024, requires_grad=True), torch.randn(512, 1024, requires_grad=True)
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ternary_linear(x, w, act_quant="int8row")
    assert sum(sizes.values()) <= w.numel() / 4 + x.numel() + 8 * len(x)


def test_compiled_and_transformed() -> None:
    x, w = torch.randn(M, K), torch.randn(N, K)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return ternary_linear(x, w, act_quant="int8row", detach=False).square().sum()

    right = torch.func.grad(loss, argnums=(0, 1))(x, w)
    x.requires_grad_(), w.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        for a, b in zip(torch.autograd.grad(function(x, w), (x, w)), right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast_and_refusals() -> None:
    x, w = torch.randn(2, 3, K, requires_grad=True), torch.randn(N, K, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ternary_linear(x, w)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, N)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32 and w.grad is not None
    assert ternary_linear(x[:, :0], w).shape == (2, 0, N)
    for error, call in (
        (TypeError, lambda: ternary_linear(x.int(), w)),
        (ValueError, lambda: ternary_linear(x, w[:, 1:])),
        (ValueError, lambda: ternary_linear(x, w, method="mean")),
        (ValueError, lambda: ternary_linear(x, w, dim=1)),
        (ValueError, lambda: ternary_linear(x, w, surrogate="reste")),
        (ValueError, lambda: ternary_linear(x, w, act_quant="int4")),
    ):
        with pytest.raises(error):
            call()


@pytest.mark.parametrize("act_quant", [None, "int8row"])
def test_forward_mode(act_quant: str | None) -> None:
    x, w = torch.randn(3, 40, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    dx, dw = torch.randn_like(x), torch.randn_like(w)

    def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ternary_linear(x, w, act_quant=act_quant)

    y, moved = torch.func.jvp(layer, (x, w), (dx, dw))
    assert torch.allclose(y, layer(x, w), atol=1e-6)
    cotangent, (a, b) = torch.randn_like(y), (x.clone().requires_grad_(), w.clone().requires_grad_())
    gx, gw = torch.autograd.grad(layer(a, b), (a, b), cotangent)
    assert torch.allclose((moved * cotangent).sum(), (gx * dx).sum() + (gw * dw).sum(), rtol=1e-6)
