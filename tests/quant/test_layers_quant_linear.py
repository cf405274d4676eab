"""TernaryLinear, BitLinear, QuantLinear and ElasticLinear against dense formulas, and their packed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastloss.quant import unpack_bits
from fastloss.quant.fake_quant import lsq_levels
from fastloss.quant.layers import BitLinear, ElasticLinear, PackedLinear, QuantLinear, TernaryLinear


def unpacked(packed: PackedLinear) -> Tensor:
    """The weight that the bits hold."""
    w = sum(unpack_bits(part.bits) for part in packed.parts)  # type: ignore[union-attr]
    assert isinstance(w, Tensor)
    return w if packed.offset is None else w + packed.offset[:, None]


def through(x: Tensor, q: Tensor) -> Tensor:
    """q with the gradient of x."""
    return x + (q - x).detach()


def compare(layer: nn.Module, x: Tensor, y: Tensor) -> None:
    gradient, inputs = torch.randn_like(y), [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x), inputs, gradient)
    assert torch.allclose(layer(x), y, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, torch.autograd.grad(y, inputs, gradient), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def ternary_formula(layer: TernaryLinear, x: Tensor) -> Tensor:
    w = layer.weight
    rows = w if layer.per_row else w.reshape(1, -1)
    c = rows.mean(1, keepdim=True).detach() if layer.center else torch.zeros(1, 1, dtype=w.dtype)
    size = (rows - c).abs()
    mean = size.mean(1, keepdim=True)
    threshold = 0.7 * mean if layer.method == "twn" else mean * (2 / 3 if layer.method == "mean43" else 0.5)
    if layer.method == "twn":
        scale = (size * (size > threshold)).sum(1, keepdim=True) / (size > threshold).sum(1, keepdim=True)
    else:
        scale = 2 * threshold
    if layer.detach:
        scale = scale.detach()
    t = torch.sign(w - c) * ((w - c).abs() > threshold)
    f = (w - c) / scale.detach()
    f = f.clamp(-1, 1) if layer.surrogate == "clip" else f
    return x @ ((f + (t - f).detach()) * scale).T + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize(
    "surrogate, center, detach", [("identity", False, True), ("clip", True, True), ("clip", False, False)]
)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("method", ["twn", "mean43", "absmean"])
def test_ternary_formula(method: str, per_row: bool, surrogate: str, center: bool, detach: bool) -> None:
    layer = TernaryLinear(
        40, 6, dtype=torch.float64, method=method, per_row=per_row, surrogate=surrogate, center=center, detach=detach
    )
    nn.init.normal_(layer.weight, 0.1)
    x = torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True)
    compare(layer, x, ternary_formula(layer, x))


@pytest.mark.parametrize("norm", [False, True])
def test_bit_linear_formula(norm: bool) -> None:
    layer = BitLinear(40, 6, dtype=torch.float64, norm=norm)
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    z = x if layer.norm is None else x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    size = z.detach().abs().amax(-1, keepdim=True) / 127
    gamma = layer.weight.detach().abs().mean()
    w = through(layer.weight, (layer.weight / gamma).round().clamp(-1, 1) * gamma)
    y = through(z, (z / size).round() * size) @ w.T
    gradient, inputs = torch.randn_like(y), [x, *layer.parameters()]
    assert torch.allclose(layer(x), y, rtol=1e-6, atol=1e-6)  # scales are float32 in a product of integers
    for a, b in zip(*(torch.autograd.grad(t, inputs, gradient) for t in (layer(x), y)), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def learned(v: Tensor, scale: Tensor, low: float, high: float, steps: float, shift: float, factor: float) -> Tensor:
    """q scale: identity inside for x, dscale = factor sum g (q - v), or q outside."""
    s = scale * factor + (scale - scale * factor).detach()
    u = (v / s).clamp(low, high)
    q = ((u * steps - shift).round() + shift) / steps
    # Outside the level is a constant, so that dscale = sum g q.
    inside = (v / s >= low) & (v / s <= high)
    return torch.where(inside, through(u, q), q.detach()) * s


def quant_formula(layer: QuantLinear, x: Tensor, bits: float, mode: str, input_signed: bool) -> Tensor:
    """y with the gradients of learned steps, at the scales of now."""
    assert layer.inputs is not None
    high = 7 if input_signed else 15
    xq = learned(x, layer.inputs.scale, -8 if input_signed else 0, high, 1, 0, 1 / math.sqrt(x.numel() * high))
    w, scale = layer.weight, layer.scale[:, None]
    if bits == 1:
        s = scale / math.sqrt(30) + (scale - scale / math.sqrt(30)).detach()
        inside = (w.abs() <= scale).double()
        wq = torch.where(w >= 0, 1.0, -1.0) * s + w * inside - (w * inside).detach()
    elif mode == "lsq":
        most = 2 ** (bits - 1) - 1
        wq = learned(w, scale, -(2 ** (bits - 1)), most, 1, 0, 1 / math.sqrt(30 * most))
    else:
        steps, shift = (1.5, 0.0) if bits == 1.58 else (2.0 ** (bits - 1), 0.5)
        largest = 1 if bits == 1.58 else steps - 1
        wq = learned(w, scale, -0.99, 0.99, steps, shift, 1 / math.sqrt(30 * largest))
    return nn.functional.linear(xq, wq, layer.bias)


@pytest.mark.parametrize("input_signed", [True, False])
@pytest.mark.parametrize(
    "bits, mode", [(1, "lsq"), (2, "lsq"), (4, "lsq"), (8, "lsq"), (1.58, "seq"), (2, "seq"), (4, "seq"), (7, "seq")]
)
def test_quant_formula(bits: float, mode: str, input_signed: bool) -> None:
    """Values and gradients of learned steps, written out."""
    layer = QuantLinear(
        30, 5, weight_bits=bits, mode=mode, input_bits=4, input_signed=input_signed, dtype=torch.float64
    )
    nn.init.normal_(layer.weight)
    layer.reset_scale()
    x = torch.randn(7, 30, dtype=torch.float64, requires_grad=True)
    layer(x)
    assert layer.inputs is not None
    high = 7 if input_signed else 15
    assert torch.allclose(layer.inputs.scale, 2 * x.abs().mean() / math.sqrt(high))
    size = layer.weight.abs()
    most = lsq_levels(int(bits)).high
    start = size.mean(1) if bits == 1 else size.amax(1) if mode == "seq" else 2 * size.mean(1) / math.sqrt(most)
    assert torch.allclose(layer.scale, start)
    with torch.no_grad():
        layer.scale.mul_(0.6)  # some weights lie outside
    compare(layer, x, quant_formula(layer, x, bits, mode, input_signed))


LAYERS: dict[str, Any] = {
    "ternary": lambda: TernaryLinear(130, 7),
    "ternary int8": lambda: TernaryLinear(130, 7, method="mean43", act_quant="int8row", center=True),
    "bit": lambda: BitLinear(130, 7, norm=True),
    "1": lambda: QuantLinear(130, 7, weight_bits=1, input_bits=1),
    "1.58": lambda: QuantLinear(130, 7, weight_bits=1.58, mode="seq", input_bits=1, input_signed=False),
    "4": lambda: QuantLinear(130, 7, weight_bits=4, input_bits=4),
    "elastic": lambda: ElasticLinear(130, 7, bits=(2, 4, 8)),
    **{f"lsq {b}": lambda b=b: QuantLinear(130, 7, weight_bits=b, input_bits=None) for b in range(1, 9)},
    **{f"seq {b}": lambda b=b: QuantLinear(130, 7, weight_bits=b, mode="seq", input_bits=None) for b in range(2, 9)},
}


@pytest.mark.parametrize("name", LAYERS)
def test_packed(name: str) -> None:
    """The bits hold the weight of training; the product differs by rounding alone; and a state_dict comes back."""
    layer = LAYERS[name]()
    x = torch.randn(3, 4, 130)
    y = layer(x)
    packed = layer.pack()
    if hasattr(layer, "quantized_weight"):
        w = layer.quantized_weight()
        exact = name not in ("elastic", *(f"{m} {b}" for m in ("lsq", "seq") for b in range(5, 9)))
        assert torch.equal(unpacked(packed), w) if exact else torch.allclose(unpacked(packed), w, rtol=0, atol=1e-7)
    assert torch.allclose(packed(x), y, rtol=1e-5, atol=1e-5) and not list(packed.parameters())
    assert packed.nbytes < 130 * 7 * 4 * 1.5 and not packed(x.requires_grad_()).requires_grad
    other = LAYERS[name]()
    other(torch.randn(3, 130))
    again = other.pack()
    assert not torch.equal(again(x), packed(x))
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(x), packed(x))
    loaded = LAYERS[name]()
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(2 * x), layer(2 * x))  # the steps are those that were saved, not made again


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_elastic(bits: int, granularity: str, symmetric: bool) -> None:
    """The weight at any setting, its packed form, and gradients for the parameters of that setting alone."""
    layer = ElasticLinear(24, 5, bits=(2, 4, 7, 8))
    with torch.no_grad():
        layer.weight.add_(0.05)
    layer.reset_scale()
    layer.set_bits(bits, 8, symmetric=symmetric, granularity=granularity)
    x = torch.randn(6, 24)
    y = layer(x)
    levels = (2**bits - 1) if not symmetric else 2**bits
    assert all(len(row.unique()) <= levels + 1 for row in layer.quantized_weight())
    assert torch.allclose(unpacked(layer.pack()), layer.quantized_weight(), atol=1e-6)
    assert torch.allclose(layer.pack()(x), y, atol=1e-5)
    y.square().sum().backward()
    key = f"{granularity}_{'symmetric' if symmetric else 'asymmetric'}_{bits}"
    assert {name for name, p in layer.steps.scales.items() if p.grad is not None} == {key}
    assert layer.inputs is not None
    assert [name for name, p in layer.inputs.steps.scales.items() if p.grad is not None] == [
        f"tensor_{'symmetric' if symmetric else 'asymmetric'}_8"
    ]
    with pytest.raises(ValueError, match="no setting"):
        layer.set_bits(3)


def test_more_bits_are_closer() -> None:
    full = nn.Linear(64, 16)
    x = torch.randn(100, 64)
    made = [QuantLinear.from_float(full, weight_bits=b, input_bits=None) for b in (2, 4, 6, 8)]
    errors = [(m(x) - full(x)).norm().item() for m in made]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 10
    for made_of in (TernaryLinear, BitLinear, ElasticLinear):
        layer = made_of.from_float(full)  # type: ignore[attr-defined]
        assert torch.equal(layer.weight, full.weight) and torch.equal(layer.bias, full.bias)


@pytest.mark.parametrize("name", ["ternary", "bit", "4", "1.58", "elastic"])
def test_compiles_whole(name: str) -> None:
    torch._dynamo.reset()
    layer = LAYERS[name]()
    x = torch.randn(4, 130, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)  # the first batch sets the steps
    inputs = [x, *layer.parameters()]
    for a, b in zip(
        *(torch.autograd.grad(f(x).square().sum(), inputs, allow_unused=True) for f in (layer, compiled)), strict=True
    ):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-5)
    packed = layer.pack()
    assert torch.allclose(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x))


@pytest.mark.parametrize("name", ["ternary", "bit", "4"])
def test_autocast(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(4, 130, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, packed = layer(x), layer.pack()(x)
    assert y.dtype == packed.dtype == torch.bfloat16 and torch.allclose(y, packed, rtol=0.02, atol=0.02)
    y.float().sum().backward()
    assert x.grad is not None and layer.weight.grad.dtype == torch.float32


def test_refusals() -> None:
    for make, message in (
        (lambda: TernaryLinear(3, 2, method="mean"), "method must be one of"),
        (lambda: TernaryLinear(3, 2, surrogate="approx"), "surrogate must be"),
        (lambda: TernaryLinear(3, 2, act_quant="int8"), "act_quant must be"),
        (lambda: QuantLinear(3, 2, weight_bits=9), "weight_bits must be"),
        (lambda: QuantLinear(3, 2, weight_bits=1.58), 'mode="seq"'),
        (lambda: QuantLinear(3, 2, mode="affine"), "mode must be one of"),
        (lambda: QuantLinear(3, 2, input_bits=9), "bits must be 2 to 8"),
        (lambda: ElasticLinear(3, 2, bits=(1, 2)), "bits must be choices"),
        (lambda: PackedLinear([], None), "parts must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for name in ("ternary", "elastic"):
        with pytest.raises(ValueError, match=r"x must be \[\.\.\., 130\]"):
            LAYERS[name]().pack()(torch.randn(2, 5))
