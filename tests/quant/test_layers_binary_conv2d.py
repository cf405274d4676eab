"""binary_conv2d and BinaryConv2d against torch.nn.functional.conv2d of the signs: exactly, and their gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from fastloss.quant import binary_conv2d
from fastloss.quant.layers import BinaryConv2d
from surrogate_functions import FUNCTIONS, saved_bytes, signed

MODES = ("zeros", "ones", "reflect", "replicate", "circular")


def padded(x: Tensor, padding: tuple[int, int], mode: str) -> Tensor:
    around = (padding[1], padding[1], padding[0], padding[0])
    if mode in ("zeros", "ones"):
        return pad(x, around, value=float(mode == "ones"))
    return pad(x, around, mode=mode)


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels, groups, outputs", [(1, 1, 3), (5, 2, 4), (8, 3, 6), (70, 1, 2), (64, 2, 2)])
def test_equals_conv2d_of_signs(mode: str, channels: int, groups: int, outputs: int) -> None:
    """Integers: every stride, padding, dilation and kernel, without and with whole bytes and words of channels."""
    x, count = torch.randn(2, channels * groups, 7, 6), 0
    x[0, 0, 0, :3] = torch.tensor([0.0, -0.0, float("nan")])
    every = itertools.product([(1, 1), (3, 2)], [1, (2, 1)], [1, (2, 1)], [(0, 0), (1, 2), (2, 0)])
    for kernel, stride, dilation, padding in every:
        weight = torch.randn(outputs, channels, *kernel)
        y = binary_conv2d(x, weight, None, stride, padding, dilation, groups, padding_mode=mode, scale=None)
        wanted = conv2d(padded(sign(x), padding, mode), sign(weight), None, stride, 0, dilation, groups)
        assert torch.equal(y, wanted), (kernel, stride, dilation, padding)
        count += 1
    assert count == 24


@pytest.mark.parametrize("kernel, dilation", [((3, 3), 1), ((4, 2), (1, 3)), ((1, 5), 2)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_same_and_valid(padding: str, kernel: tuple[int, int], dilation: Any) -> None:
    x, weight = torch.randn(2, 9, 9, 11), torch.randn(4, 9, *kernel)
    y = binary_conv2d(x, weight, None, 1, padding, dilation, scale=None)
    assert torch.equal(y, conv2d(sign(x), sign(weight), None, 1, padding, dilation))


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"scale": None, "bias": False},
    "learned": {"scale": "learned", "center": True, "input_shift": True},
    "mean": {"scale": "mean", "detach": False, "center": True},
    "xnor": {"input_scale": True},
}


def dense(layer: BinaryConv2d, x: Tensor, *names: str) -> Tensor:
    """The documented formula with PyTorch's operations."""
    w, whole = layer.weight, layer.scaling == "mean"
    constant = (lambda t: t.detach()) if layer.detach else (lambda t: t)
    c = constant(w.mean() if whole else w.mean((1, 2, 3), keepdim=True)) if layer.center else torch.zeros(())
    mean = (w - c).abs().mean() if whole else (w - c).abs().mean((1, 2, 3))
    scale = {"row": constant(mean), "mean": constant(mean), None: torch.ones(()), "learned": layer.scale}[layer.scaling]
    u = x if layer.input_shift is None else x - layer.input_shift[:, None, None]
    names = names or ("clip", "clip")
    signs = padded(signed(u, names[0]), layer.padding, layer.padding_mode)  # type: ignore[arg-type]
    y = conv2d(signs, signed(w - c, names[1]), None, layer.stride, 0, layer.dilation, layer.groups)
    y = y * (scale[:, None, None] if scale.dim() else scale)
    if layer.input_scale:
        y = y * x.detach().abs().mean((1, 2, 3), keepdim=True)
    return y if layer.bias is None else y + layer.bias[:, None, None]


def check(layer: BinaryConv2d, x: Tensor, *names: str) -> None:
    if layer.input_shift is not None:
        nn.init.normal_(layer.input_shift, std=0.3)
    nn.init.normal_(layer.weight, std=0.7)
    y = dense(layer, x, *names)
    gradient, inputs = torch.randn_like(y), [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x), inputs, gradient)
    assert torch.allclose(layer(x), y, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, torch.autograd.grad(y, inputs, gradient), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIONS)
def test_formula_and_gradients(name: str, mode: str) -> None:
    layer = BinaryConv2d(
        6, 4, (3, 2), (2, 1), (2, 1), (1, 2), 2, padding_mode=mode, dtype=torch.float64, **OPTIONS[name]
    )
    check(layer, torch.randn(2, 6, 6, 5, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_surrogate(name: str) -> None:
    layer = BinaryConv2d(
        3, 4, 3, padding=(1, 1), dtype=torch.float64, input_surrogate=name, weight_surrogate=name, save="exact"
    )
    check(layer, torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True), name, name)


def test_saved_bytes() -> None:
    """Two bits an input and the bits of the weight, its mask: an eighth of torch.nn.Conv2d's at most."""
    x = torch.randn(8, 64, 16, 16, requires_grad=True)
    binary, full = BinaryConv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    ours = saved_bytes(lambda: binary(x * 1.0), x, *binary.parameters())
    theirs = saved_bytes(lambda: full(x * 1.0), x, *full.parameters())
    assert theirs >= x.nbytes and 8 * ours <= theirs, (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["zeros", "ones", "reflect"])
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_is_equal(name: str, mode: str, dtype: torch.dtype) -> None:
    layer = BinaryConv2d(16, 6, 3, 2, 1, groups=2, padding_mode=mode, dtype=dtype, **OPTIONS[name])
    if layer.input_shift is not None:
        nn.init.normal_(layer.input_shift)
        nn.init.normal_(layer.scale)  # type: ignore[arg-type]
    x = torch.randn(3, 16, 7, 8).to(dtype)
    packed = layer.pack()
    assert torch.equal(packed(x), layer(x)) and packed(x).dtype == dtype and not list(packed.parameters())
    assert torch.equal(packed(x[0]), layer(x)[0]) and torch.equal(layer(x[0]), layer(x)[0])
    other = BinaryConv2d(16, 6, 3, 2, 1, groups=2, padding_mode=mode, dtype=dtype, **OPTIONS[name]).pack()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), layer(x))
    assert packed.nbytes < layer.weight.numel() / 2 + 64 * 6 + 12 * 6 + 64


def test_two_stages_of_biper() -> None:
    layer = BinaryConv2d(
        3, 4, 3, padding=1, padding_mode="ones", weight_surrogate="biper", scale=None, dtype=torch.float64
    )
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    layer.real_weight = True
    wanted = conv2d(padded(sign(x), (1, 1), "ones"), torch.sin(20 * layer.weight), layer.bias)
    assert torch.allclose(layer(x), wanted, atol=1e-12)
    layer.real_weight = False
    wanted = conv2d(padded(sign(x), (1, 1), "ones"), sign(torch.sin(20 * layer.weight)), layer.bias)
    assert torch.allclose(layer(x), wanted, atol=1e-12) and torch.allclose(layer.pack()(x), wanted, atol=1e-6)


@pytest.mark.parametrize("mode", ["zeros"])
def test_compiles_whole(mode: str) -> None:
    torch._dynamo.reset()
    layer = BinaryConv2d(8, 4, 3, padding=1, padding_mode=mode, groups=2, scale="learned", input_shift=True)
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    compiled, inputs = torch.compile(layer, fullgraph=True, backend="aot_eager"), [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(f(x).square().sum(), inputs) for f in (layer, compiled)), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.compile(layer.pack(), fullgraph=True, backend="aot_eager")(x), layer(x))


def test_autocast_strides_and_empty() -> None:
    layer, x = BinaryConv2d(8, 4, 3, padding=1), torch.randn(2, 8, 5, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer(x.to(memory_format=torch.channels_last)), layer(x))
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer(x[:0]).shape == (0, 4, 5, 6) and layer.pack()(x[:0]).shape == (0, 4, 5, 6)
    empty = torch.randn(0, 8, 5, 6, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad is not None and empty.grad.shape == empty.shape


def test_from_float() -> None:
    full = nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), (1, 2), 2, padding_mode="reflect")
    layer = BinaryConv2d.from_float(full)
    x = torch.randn(2, 6, 8, 8)
    assert torch.equal(layer.weight, full.weight) and layer(x).shape == full(x).shape
    assert "kernel_size=(3, 2)" in repr(layer) and "padding_mode='reflect'" in repr(layer.pack())


def test_refusals() -> None:
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    for words, message in (
        ({"groups": 4}, "groups must divide the 6 outputs"), ({"groups": 2}, r"x must be \[N, 8, H, W\]"),
        ({"stride": 0}, "stride must be"), ({"dilation": (1, 2, 3)}, "dilation must be"), ({"padding": -1}, "padding must be"),
        ({"padding": "full"}, '"valid", "same"'), ({"padding": "same", "stride": 2}, "takes a stride of 1"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of"), ({"dilation": 4}, "does not fit"),
        ({"padding": 5, "padding_mode": "reflect"}, "takes less padding"), ({"save": "mask"}, "save must be"),
        ({"bias": torch.randn(5)}, r"bias must be \[6\]"), ({"scale": torch.randn(5)}, "scale must hold 1 or 6"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            binary_conv2d(x, weight, **words)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must be a floating tensor"):
        binary_conv2d(x.int(), weight)
    with pytest.raises(ValueError, match="groups must divide the 4 channels"):
        BinaryConv2d(4, 6, 3, groups=3)
    with pytest.raises(ValueError, match=r"x must be \[N, 4, H, W\]"):
        BinaryConv2d(4, 6, 3).pack()(torch.randn(2, 3, 5, 5))
    layer, x = BinaryConv2d(4, 6, 3), x.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
