"""GELU, SiLU, softmax and LayerNorm that save codes: gradients at the decoded numbers, kernels, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss import backend_cpp, quant, registry
from fastloss.compiled import _C, MISSING
from fastloss.quant import ActivationCodec
from saved_bytes import saved_by


def functions(
    own: ActivationCodec,
) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[Tensor], Tensor]]]:
    """name -> (ours, torch's, what ours saves of x)."""
    return {
        "gelu": (lambda x: quant.gelu(x, codec=own), F.gelu, lambda x: x),
        "gelu_tanh": (lambda x: quant.gelu(x, "tanh", own), lambda x: F.gelu(x, approximate="tanh"), lambda x: x),
        "silu": (lambda x: quant.silu(x, own), F.silu, lambda x: x),
        "softmax": (lambda x: quant.softmax(x, 1, own), lambda x: x.softmax(1), lambda x: x.softmax(1).movedim(1, -1)),
    }


@pytest.mark.parametrize("shape", [(3, 5, 40), (700, 500), (0, 4)], ids=str)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "softmax"])
def test_gradients_are_those_at_the_decoded_numbers(name: str, shape: tuple[int, ...]) -> None:
    own = ActivationCodec(8, 64)
    ours, theirs, saved = functions(own)[name]
    x = torch.randn(shape, requires_grad=True)
    y, g = ours(x), torch.randn(shape)
    torch.testing.assert_close(y, theirs(x), rtol=1e-6, atol=1e-6)
    (made,) = torch.autograd.grad(y, x, g)
    decoded = own.encode(saved(x.detach())).decode()
    if name == "softmax":
        decoded = decoded.movedim(-1, 1)
        wanted = decoded * (g - (g * decoded).sum(1, keepdim=True))
    else:
        at = decoded.double().requires_grad_()
        (wanted,) = torch.autograd.grad(theirs(at), at, g.double())
    torch.testing.assert_close(made, wanted.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 9, 3000])
@pytest.mark.parametrize("given", ["weight and bias", "weight", "nothing"])
def test_layer_norm(given: str, rows: int) -> None:
    own = ActivationCodec(8, 64)
    x = torch.randn(rows, 10, 12).mul(3).add(1).requires_grad_()
    weight = torch.randn(10, 12, requires_grad=True) if "weight" in given else None
    bias = torch.randn(10, 12, requires_grad=True) if "bias" in given else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    y, g = quant.layer_norm(x, (10, 12), weight, bias, codec=own), torch.randn(rows, 10, 12)
    torch.testing.assert_close(y, F.layer_norm(x, (10, 12), weight, bias), rtol=1e-5, atol=1e-5)
    made = torch.autograd.grad(y, inputs, g)
    wide = x.detach().double().reshape(rows, 120)
    deviation = (wide.var(1, correction=0, keepdim=True) + 1e-5).sqrt() if rows else wide[:, :1]
    unit = own.encode(((wide - wide.mean(1, keepdim=True)) / deviation).float()).decode().double()
    a = g.double().reshape(rows, 120) * (1 if weight is None else weight.detach().double().reshape(-1))
    dx = (a - a.mean(1, keepdim=True) - unit * (a * unit).mean(1, keepdim=True)) / deviation
    wanted = [dx, (g.double().reshape(rows, 120) * unit).sum(0), g.double().reshape(rows, 120).sum(0)]
    for t, (ours, reference) in zip(inputs, zip(made, wanted, strict=False), strict=True):
        assert ours.shape == t.shape
        if t is x:  # a number next to a tie may have the other code
            assert (ours.double().reshape(rows, 120) - reference).norm() <= 1e-3 * reference.norm()
        else:
            torch.testing.assert_close(ours.double().reshape(-1), reference, rtol=1e-3, atol=2e-2)


@pytest.mark.skipif(_C is None, reason=str(MISSING))
@pytest.mark.parametrize("level", range(4), ids=("scalar", "avx2", "avx512", "avx512bf16"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_pass_gradients(level: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of csrc/cpu/saved_gradient.cpp against float64, at ranges that no exponential overflows, and at NaN."""
    best = _C.best_isa()  # type: ignore[union-attr]
    if level > best:
        pytest.skip(f"the best of this machine is {_C.isa_name(best)}")  # type: ignore[union-attr]
    monkeypatch.setattr(backend_cpp, "ISA", level)
    for rows, columns, group, bits in ((1, 1, 2, 8), (7, 33, 10, 4), (50, 700, 256, 8), (3, 2100, 3000, 4)):
        x = torch.randn(rows, columns) * torch.logspace(-2, 3, rows)[:, None]
        encoded = ActivationCodec(bits, group).encode(x)
        g = torch.randn(rows, columns).to(dtype)
        for name, function in {"none": F.gelu, "tanh": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu}.items():
            at = encoded.decode().double().requires_grad_()
            (slope,) = torch.autograd.grad(function(at).sum(), at)
            with fastloss.use_backend("cpp"):
                made = registry.run("saved_gradient", g, *encoded[:3], group, bits, name, columns)
            assert (
                (made.double() - slope * g.double()).abs() <= (5e-7 + torch.finfo(dtype).eps) * 1.2 * g.abs()
            ).all(), name
        encoded = ActivationCodec(bits, group).encode(x.softmax(1))
        y, wide = encoded.decode().double(), g.double()
        wanted = y * (wide - (wide * y).sum(1, keepdim=True))
        with fastloss.use_backend("cpp"):
            made = registry.run("saved_gradient", g, *encoded[:3], group, bits, "softmax", columns)
        assert (made - wanted).abs().max() <= (2e-6 + 2 * torch.finfo(dtype).eps) * wanted.abs().amax().clamp(1)
    x[1, 5] = math.nan
    encoded = ActivationCodec(8, 10).encode(x)
    with fastloss.use_backend("cpp"):
        for name in ("none", "tanh", "silu", "softmax"):
            made = registry.run("saved_gradient", g, *encoded[:3], 10, 8, name, columns)
            assert made.isnan().reshape(-1)[2100:2110].all() and (name == "softmax" or made.isnan().sum() == 10)


@pytest.mark.parametrize("name", ["gelu", "softmax"])
def test_without_a_kernel_the_pieces_are_torchs(name: str) -> None:
    own = ActivationCodec(4, 64)
    ours, _, _ = functions(own)[name]
    x, g = torch.randn(1100, 1000, requires_grad=True), torch.randn(1100, 1000)
    (wanted,) = torch.autograd.grad(ours(x), x, g)
    with fastloss.use_backend("reference"):
        (made,) = torch.autograd.grad(ours(x), x, g)
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    own = ActivationCodec(8, 32)
    x = torch.randn(30, 64).to(dtype).requires_grad_()
    for name, (ours, theirs, _) in functions(own).items():
        y = ours(x)
        assert y.dtype == dtype, name
        (made,) = torch.autograd.grad(y, x, torch.ones_like(y) * torch.linspace(-1, 1, 64).to(dtype))
        (wanted,) = torch.autograd.grad(theirs(x), x, torch.ones_like(y) * torch.linspace(-1, 1, 64).to(dtype))
        assert made.dtype == dtype and (made - wanted).float().norm() < 0.04 * wanted.float().norm(), name
    weight = torch.ones(64, requires_grad=True)
    y = quant.layer_norm(x, 64, weight)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_what_the_functions_save() -> None:
    """8 bits and the ranges instead of 32: softmax nothing of x, LayerNorm the inverse deviations besides."""
    own, x = ActivationCodec(8, 256), torch.randn(64, 512, requires_grad=True)
    for name, (ours, _, _) in functions(own).items():
        y, size = saved_by(None, lambda ours=ours: ours(x))
        assert y.grad_fn is not None and size == x.numel() * (1 + 8 / 256), name
    _, size = saved_by(None, lambda: quant.layer_norm(x, 512, codec=own))
    assert size == x.numel() * (1 + 8 / 256) + 64 * 4


def test_functions_compile_and_refuse() -> None:
    own, x = ActivationCodec(4, 32), torch.randn(20, 64, requires_grad=True)
    run = torch.compile(
        lambda t: quant.softmax(quant.gelu(t, codec=own), -1, own).square().sum(), fullgraph=True, backend="aot_eager"
    )
    (made,) = torch.autograd.grad(run(x), x)
    (wanted,) = torch.autograd.grad(quant.softmax(quant.gelu(x, codec=own), -1, own).square().sum(), x)
    torch.testing.assert_close(made, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert quant.gelu(x @ x.t(), codec=own).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="approximate"):
        quant.gelu(x, "erf")
    with pytest.raises(ValueError, match="dim must be"):
        quant.softmax(x, 2)
    with pytest.raises(ValueError, match="last dimensions"):
        quant.layer_norm(x, 32)
    with pytest.raises(ValueError, match="weight must have"):
        quant.layer_norm(x, 64, torch.ones(32))
    with pytest.raises(TypeError, match="codec must be"):
        quant.silu(x, 8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="floating"):
        quant.gelu(torch.ones(3, dtype=torch.int32))
