"""BinaryLinear against its dense formula, its saved bytes, its packed form, and what it refuses."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastloss.quant import surrogates
from fastloss.quant.layers import BinaryLinear, ReCU
from surrogate_functions import FUNCTIONS, saved_bytes, signed

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"scale": None},
    "mean": {"scale": "mean", "center": True},
    "row": {"center": True, "detach": False},
    "learned": {"scale": "learned", "center": True, "input_shift": True},
    "xnor": {"center": True, "input_scale": True},
    "bireal": {"input_surrogate": "approx", "weight_surrogate": "clip"},
}


def dense(layer: BinaryLinear, x: Tensor, input_surrogate: str = "clip", weight_surrogate: str = "clip") -> Tensor:
    """The documented formula with PyTorch's operations."""
    w = layer.weight
    whole = layer.scaling == "mean"
    constant = (lambda t: t.detach()) if layer.detach else (lambda t: t)
    c = constant(w.mean() if whole else w.mean(1, keepdim=True)) if layer.center else torch.zeros(())
    mean = (w - c).abs().mean() if whole else (w - c).abs().mean(1)
    scale = {"row": constant(mean), "mean": constant(mean), None: 1.0, "learned": layer.scale}[layer.scaling]
    u = x if layer.input_shift is None else x - layer.input_shift
    y = signed(u, input_surrogate) @ signed(w - c, weight_surrogate).T * scale
    if layer.input_scale:
        y = y * x.detach().abs().mean(-1, keepdim=True)
    return y if layer.bias is None else y + layer.bias


def double(layer: BinaryLinear) -> BinaryLinear:
    layer = layer.double()
    if layer.input_shift is not None:
        nn.init.normal_(layer.input_shift, std=0.3)
    nn.init.normal_(layer.weight, std=0.7)
    return layer


def check(layer: BinaryLinear, x: Tensor, *names: str) -> None:
    gradient = torch.randn(*x.shape[:-1], layer.out_features, dtype=x.dtype)
    inputs = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x), inputs, gradient)
    y = dense(layer, x, *names)
    assert torch.allclose(layer(x), y, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, torch.autograd.grad(y, inputs, gradient), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_formula_and_gradients(name: str, bias: bool) -> None:
    layer = double(BinaryLinear(70, 9, bias, **OPTIONS[name]))
    x = torch.randn(2, 5, 70, dtype=torch.float64, requires_grad=True)
    # A slope made of x itself: "auto" takes levels of |u|, which have an error of their own (test_levels).
    layer.save = "exact"
    check(layer, x, OPTIONS[name].get("input_surrogate", "clip"), OPTIONS[name].get("weight_surrogate", "clip"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_surrogate(name: str) -> None:
    layer = double(BinaryLinear(33, 4, input_surrogate=name, weight_surrogate=name, save="exact"))
    check(layer, torch.randn(6, 33, dtype=torch.float64, requires_grad=True), name, name)


def test_levels_of_the_slope() -> None:
    """save="auto" takes |u| in 255 levels: the slope of approx is off by at most half a level."""
    x = torch.randn(4, 40, dtype=torch.float64, requires_grad=True)
    layer = double(BinaryLinear(40, 3, scale=None, input_surrogate="approx"))
    gradient = torch.randn(4, 3, dtype=torch.float64)
    (ours,), (exact,) = (torch.autograd.grad(f(x), x, gradient) for f in (layer, lambda t: dense(layer, t, "approx")))
    worst = gradient.abs().sum(1, keepdim=True) * 2 * 0.5 / 254
    assert ((ours - exact).abs() <= worst + 1e-12).all() and not torch.equal(ours, exact)


def test_saves_an_eighth_at_most() -> None:
    """Two bits an input with clip; torch.nn.Linear keeps the input."""
    x = torch.randn(256, 512, requires_grad=True)
    binary, full = BinaryLinear(512, 512), nn.Linear(512, 512)
    ours = saved_bytes(lambda: binary(x * 1.0), x, *binary.parameters())
    theirs = saved_bytes(lambda: full(x * 1.0), x, *full.parameters())
    assert theirs >= x.nbytes
    bits = 2 * (x.numel() + binary.weight.numel()) // 8
    assert bits <= ours <= bits + 64 * 512 and 4 * ours <= theirs  # of a square weight, half is its own bits
    batch = torch.randn(2048, 512, requires_grad=True)
    ours = saved_bytes(lambda: binary(batch * 1.0), batch, *binary.parameters())
    theirs = saved_bytes(lambda: full(batch * 1.0), batch, *full.parameters())
    assert 8 * ours <= theirs, (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_is_equal(name: str, dtype: torch.dtype) -> None:
    layer = BinaryLinear(130, 7, dtype=dtype, **OPTIONS[name])
    if layer.input_shift is not None:
        nn.init.normal_(layer.input_shift)
        nn.init.normal_(layer.scale)  # type: ignore[arg-type]
    x = torch.randn(3, 4, 130).to(dtype)
    packed = layer.pack()
    assert torch.equal(packed(x), layer(x)) and packed(x).dtype == dtype
    assert not list(packed.parameters()) and not packed(x.requires_grad_()).requires_grad
    again = copy.deepcopy(layer)
    nn.init.normal_(again.weight)
    again = again.pack()
    assert not torch.equal(again(x), layer(x))
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(x), layer(x))


def test_packed_bytes_and_saving() -> None:
    layer = BinaryLinear(1024, 256)
    packed = layer.pack()
    assert packed.nbytes == 256 * 128 + 256 * 4 + 2 * 256 * 4  # bits, popcounts, scale and bias
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    x = torch.randn(3, 1024)
    assert torch.equal(torch.load(file, weights_only=False)(x), layer(x))
    halves = packed.half()
    assert halves.scale is not None and halves.scale.dtype == torch.float32
    assert torch.allclose(halves(x.half()).float(), layer(x), rtol=2e-3, atol=2e-2)


def test_state_dict_and_from_float() -> None:
    full = nn.Linear(20, 6)
    layer = BinaryLinear.from_float(full, scale="learned", input_shift=True)
    assert torch.equal(layer.weight, full.weight) and torch.equal(layer.bias, full.bias)
    assert layer.scale is not None and torch.allclose(layer.scale, full.weight.abs().mean(1))
    other = BinaryLinear(20, 6, scale="learned", input_shift=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 20)
    assert torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {"weight", "bias", "scale", "input_shift"}
    assert "in_features=20, out_features=6" in repr(layer) and "input_shift" in repr(layer)


def test_two_stages_of_biper() -> None:
    """First y = sign(x) sin(w W)ᵀ scale, then the sign of the sine, with the same slope."""
    layer = double(BinaryLinear(30, 5, weight_surrogate=surrogates.biper(3.0), scale="learned"))
    layer.real_weight = True
    x = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    wanted = signed(x, "clip") @ torch.sin(3.0 * layer.weight).T * layer.scale + layer.bias
    inputs = [x, *layer.parameters()]
    assert torch.allclose(layer(x), wanted, atol=1e-12)
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (layer(x), wanted))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match="real_weight"):
        layer.pack()
    layer.real_weight = False
    signs = torch.where(torch.sin(3.0 * layer.weight) >= 0, 1.0, -1.0).double()
    wanted = signed(x, "clip") @ signs.T * layer.scale + layer.bias
    assert torch.allclose(layer(x), wanted, atol=1e-12)
    other = BinaryLinear(3, 2)
    other.real_weight = True
    with pytest.raises(ValueError, match="biper, got clip"):
        other(torch.randn(1, 3))


def test_recu_as_a_parametrization() -> None:
    layer = BinaryLinear(50, 4, weight_surrogate="identity").double()
    nn.utils.parametrize.register_parametrization(layer, "weight", ReCU(0.9))
    x = torch.randn(3, 50, dtype=torch.float64)
    layer(x).square().sum().backward()
    latent = layer.parametrizations.weight.original  # type: ignore[union-attr]
    assert latent.grad.abs().sum() > 0
    assert torch.allclose(layer.pack()(x.float()).double(), layer(x), atol=1e-5)


@pytest.mark.parametrize("name", ["default", "learned", "xnor", "bireal"])
def test_compiles_whole(name: str) -> None:
    torch._dynamo.reset()
    layer = BinaryLinear(24, 5, **OPTIONS[name])
    x = torch.randn(6, 24, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(f(x).square().sum(), inputs) for f in (layer, compiled)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    packed = layer.pack()
    assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_autocast() -> None:
    layer, x = BinaryLinear(24, 5), torch.randn(6, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, packed = layer(x), layer.pack()(x)
    assert y.dtype == packed.dtype == torch.bfloat16 and torch.equal(y, packed)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32 and layer.weight.grad.dtype == torch.float32  # type: ignore[union-attr]


def test_empty_and_strided() -> None:
    layer = BinaryLinear(24, 5)
    assert layer(torch.randn(0, 24)).shape == (0, 5) and layer.pack()(torch.randn(0, 24)).shape == (0, 5)
    x = torch.randn(24, 6).T
    assert torch.equal(layer(x), layer(x.contiguous())) and torch.equal(layer.pack()(x), layer(x))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="scale must be one of"):
        BinaryLinear(3, 2, scale="rows")
    with pytest.raises(ValueError, match="save must be one of"):
        BinaryLinear(3, 2, save="u8")
    with pytest.raises(ValueError, match="surrogate must be one of"):
        BinaryLinear(3, 2, input_surrogate="tanh")
    layer = BinaryLinear(3, 2)
    for module in (layer, layer.pack()):
        with pytest.raises(ValueError, match=r"x must be \[\.\.\., 3\]"):
            module(torch.randn(4, 5))
        with pytest.raises(TypeError, match="floating"):
            module(torch.ones(4, 3, dtype=torch.int64))
