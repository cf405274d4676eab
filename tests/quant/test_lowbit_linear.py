"""`lowbit_linear`: values and gradients against the dense formula in float64, on every way that PyTorch calls it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss.quant import BitTensor, lowbit_linear, pack_bits, pack_codes, pack_ternary, unpack_bits
from fastloss.quant.lowbit_matmul import quantize_rows
from tolerance import check_close, check_gradient

ROWS, COLUMNS = 20, 200


def weight(kind: str = "codes4", group: int = 0, rows: int = ROWS) -> BitTensor:
    w = torch.randn(rows, COLUMNS)
    if kind == "binary":
        return pack_bits(w, scale=w.abs().mean(1))
    if kind == "ternary":
        return pack_ternary(w, 0.5, scale=0.7)
    if kind == "none":
        return pack_bits(w)
    size = torch.rand(rows, -(-COLUMNS // group) if group else 1) / 4 + 0.1
    return pack_codes(w, size, int(kind[-1]), group=group)


def formula(x: Tensor, w: BitTensor, bias: Tensor | None, quantize: bool = False) -> Tensor:
    """The dense product in x's dtype, differentiable in everything."""
    scale = w.scale if w.scale is None or w.group == 0 else w.scale.repeat_interleave(w.group, 1)[:, :COLUMNS]
    dense = unpack_bits(w._replace(scale=None), x.dtype)
    if scale is not None:
        dense = dense * scale.to(x.dtype)
    if quantize:
        codes, size = quantize_rows(x.detach().reshape(-1, COLUMNS))
        x = x + ((codes * size[:, None]).reshape(x.shape) - x).detach()
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


@pytest.mark.parametrize("kind", ["binary", "ternary", "none", "codes2", "codes4"])
@pytest.mark.parametrize("act_quant", [None, "int8row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(kind: str, act_quant: str | None, dtype: torch.dtype) -> None:
    w, bias = weight(kind), torch.randn(ROWS, dtype=dtype)
    x, g = torch.randn(3, 11, COLUMNS).to(dtype), torch.randn(3, 11, ROWS).to(dtype)
    inputs = [t.clone().requires_grad_() for t in (x, bias)]
    y = lowbit_linear(inputs[0], w, inputs[1], act_quant=act_quant)
    ours = torch.autograd.grad(y, inputs, g)
    results = []
    for of in (torch.float64, torch.float32):
        inputs = [t.to(of).requires_grad_() for t in (x, bias)]
        if act_quant:  # the codes are those of the dtype
            codes, size = quantize_rows(x.reshape(-1, COLUMNS))
            inputs[0] = (codes.to(of) * size[:, None]).reshape(x.shape).requires_grad_()
        found = formula(inputs[0], w, inputs[1])
        results.append((found.detach(), *torch.autograd.grad(found, inputs, g.to(of))))
    for got, right, torchs in zip((y, *ours), *results, strict=True):
        assert got.dtype == dtype
        check_close(got, torchs.to(dtype), right, dtype)


@pytest.mark.parametrize("group", [0, 64, 128])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("act_quant", [None, "int8row"])
def test_all_gradients_in_float64(group: int, shared: bool, act_quant: str | None) -> None:
    """On the reference: those of autograd to 1e-10, the scale's too."""
    w = weight(group=group)
    scale = (w.scale[:1] if shared else w.scale).double().requires_grad_()
    x, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((7, COLUMNS), (ROWS,)))
    g = torch.randn(7, ROWS, dtype=torch.float64)
    w = w._replace(scale=scale)
    y = lowbit_linear(x, w, bias, act_quant=act_quant)
    right = formula(x, w, bias, act_quant is not None)
    torch.testing.assert_close(y, right, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(t, (x, scale, bias), g) for t in (y, right))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("group", [0, 64])
def test_gradient_of_the_scale(group: int) -> None:
    w = weight(group=group)
    x, g = torch.randn(40, COLUMNS), torch.randn(40, ROWS)
    results = []
    for of in (torch.float32, torch.float64):
        scale = w.scale.to(of).requires_grad_()
        right = formula(x.to(of), w._replace(scale=scale), None)
        results.append(torch.autograd.grad(right, scale, g.to(of))[0])
    scale = w.scale.clone().requires_grad_()
    ours = torch.autograd.grad(lowbit_linear(x, w._replace(scale=scale)), scale, g)[0]
    check_gradient(*(t.reshape(1, -1) for t in (ours, *results)), torch.float32)


def test_second_derivatives() -> None:
    w = weight(group=64)
    x = torch.randn(3, COLUMNS, dtype=torch.float64, requires_grad=True)
    scale = w.scale.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, s: lowbit_linear(x, w._replace(scale=s)), (x, scale))


def test_transforms() -> None:
    w, x = weight("binary"), torch.randn(4, 3, COLUMNS)
    torch.testing.assert_close(torch.vmap(lambda x: lowbit_linear(x, w))(x), lowbit_linear(x, w))
    ours = torch.func.grad(lambda x: lowbit_linear(x, w).square().sum())(x)
    right = torch.func.grad(lambda x: formula(x, w, None).square().sum())(x)
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
    value, slope = torch.func.jvp(lambda x: lowbit_linear(x, w), (x,), (x,))
    torch.testing.assert_close(value, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act_quant", [None, "int8row"])
def test_compiled(act_quant: str | None) -> None:
    w = weight(group=64)
    x = torch.randn(5, COLUMNS, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return lowbit_linear(x, w, act_quant=act_quant).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    right = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], right)


def test_autocast_and_shapes() -> None:
    w = weight("ternary")
    x = torch.randn(2, 3, COLUMNS, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lowbit_linear(x, w)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, ROWS)
    assert torch.equal(y, lowbit_linear(x.bfloat16(), w))
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert lowbit_linear(x[0, 0], w).shape == (ROWS,)
    assert lowbit_linear(x[:, :0], w).shape == (2, 0, ROWS)
    strided = torch.randn(COLUMNS, 4).T
    assert torch.equal(lowbit_linear(strided, w), lowbit_linear(strided.contiguous(), w))


def test_nothing_of_x_is_saved_without_a_trained_scale() -> None:
    w = weight()
    x = torch.randn(30, COLUMNS, requires_grad=True)
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lowbit_linear(x, w)
    assert sum(sizes) <= w.nbytes


def test_rows_of_int8() -> None:
    x = torch.tensor([[0.0, 0.0], [127.0, -63.5], [1e-30, 2e-30], [float("nan"), 1.0], [float("inf"), 1.0]])
    codes, scale = quantize_rows(x)
    assert codes.tolist()[:3] == [[0, 0], [127, -64], [64, 127]] and scale[0] == 0
    w = pack_bits(torch.ones(3, 2))
    y = lowbit_linear(x, w, act_quant="int8row")
    assert torch.equal(y[:2], torch.tensor([[0.0] * 3, [63.0] * 3])) and y[3:].isnan().all()


def test_refusals() -> None:
    w, x = weight(), torch.randn(3, COLUMNS)
    for error, call in (
        (TypeError, lambda: lowbit_linear(x, torch.ones(3, 3))),  # type: ignore[arg-type]
        (TypeError, lambda: lowbit_linear(x.int(), w)),
        (ValueError, lambda: lowbit_linear(x[:, 1:], w)),
        (ValueError, lambda: lowbit_linear(x, w, torch.ones(3))),
        (ValueError, lambda: lowbit_linear(x, w, act_quant="int4")),
        (ValueError, lambda: lowbit_linear(x, w._replace(columns=3))),
    ):
        with pytest.raises(error):
            call()
    assert fastloss.registry.choose(
        "lowbit_matmul", x, w.planes, COLUMNS, [1, 2, 4, 8], -8, w.scale, 0, False, None, None, x.dtype
    )
