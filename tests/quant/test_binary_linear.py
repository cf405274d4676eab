"""`binary_linear`: values, gradients against float64 autograd of the declared surrogates, saved bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastloss.quant import binarize, binary_linear, surrogates
from tolerance import check_close

M, N, K = 9, 13, 70
SURROGATES = ("clip", "identity", "approx", "reste", "biper", "swish", "fda")


def sign(u: Tensor) -> Tensor:
    return torch.where(u >= 0, 1.0, -1.0).to(u.dtype)


def antiderivative(u: Tensor, name: str) -> Tensor:
    """F of the table "binarize" in docs/design.md, with the usual numbers."""
    if name == "clip":
        return u.clamp(-1, 1)
    if name == "identity":
        return u
    if name == "approx":
        v = u.clamp(-1, 1)
        return 2 * v - v * v.abs()
    if name == "reste":
        power = 3.0
        inside = torch.where(u.abs() <= 0.1, 1.0, u.abs()).clamp(max=1.5).pow(1 / power) * sign(u)
        return torch.where(
            u.abs() <= 0.1, u * 0.1 ** (1 / power) / 0.1, torch.where(u.abs() <= 1.5, inside, inside.detach())
        )
    if name == "biper":
        return torch.sin(20 * u)
    if name == "swish":
        s = torch.sigmoid(5 * u)
        return 2 * s * (1 + 5 * u * (1 - s)) - 1
    v = u.clamp(-1, 1)
    return 4 / math.pi * sum(torch.sin((2 * i + 1) * 0.1 * v) / (2 * i + 1) for i in range(10))


def straight_through(u: Tensor, name: str) -> Tensor:
    f = antiderivative(u, name)
    return f + (sign(torch.sin(20 * u) if name == "biper" else u) - f).detach()


def formula(
    x: Tensor, w: Tensor, bias: Tensor | None, of_x: str = "clip", of_w: str = "clip", scale: str | Tensor | None = "row",
    center: bool = False, input_shift: Tensor | None = None, detach: bool = True,
) -> Tensor:  # fmt: skip
    middle = (w.mean() if scale == "mean" else w.mean(1, keepdim=True)) if center else torch.zeros((), dtype=w.dtype)
    u = w - (middle.detach() if detach else middle)
    size = scale
    if isinstance(scale, str):
        size = u.abs().mean() if scale == "mean" else u.abs().mean(1)
        size = size.detach() if detach else size
    v = x if input_shift is None else x - input_shift
    y = straight_through(v, of_x) @ straight_through(u, of_w).T
    y = y if size is None else y * size
    return y if bias is None else y + bias


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, bias, upstream gradient; no |u| within 1e-2 of a kink."""
    x, w = torch.randn(M, K).to(dtype), (torch.randn(N, K) * 0.8).to(dtype)
    for t in (x, w):
        for kink in (0.1, 1.0, 1.5):
            t[(t.abs() - kink).abs() < 1e-2] = 0.5
    return x, w, torch.randn(N).to(dtype), torch.randn(M, N).to(dtype)


def compare(ours: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def gradients(y: Tensor, inputs: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    return (y, *torch.autograd.grad(y, inputs, g.to(y.dtype)))


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_in_float64(name: str) -> None:
    x, w, bias, g = problem()
    inputs = [t.requires_grad_() for t in (x, w, bias)]
    ours = binary_linear(x, w, bias, input_surrogate=name, weight_surrogate=name, save="exact")
    compare(gradients(ours, inputs, g), gradients(formula(x, w, bias, name, name), inputs, g))


@pytest.mark.parametrize("scale", ["row", "mean", None, "learned", "one"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_statistics_in_float64(scale: str | None, center: bool, detach: bool) -> None:
    x, w, bias, g = problem()
    inputs = [t.requires_grad_() for t in (x, w, bias)]
    size: str | Tensor | None = scale
    if scale in ("learned", "one"):
        size = torch.rand(N if scale == "learned" else 1, dtype=torch.float64, requires_grad=True)
        inputs.append(size)
    ours = binary_linear(x, w, bias, scale=size, center=center, detach=detach)
    compare(
        gradients(ours, inputs, g),
        gradients(formula(x, w, bias, "clip", "clip", size, center, None, detach), inputs, g),
    )


@pytest.mark.parametrize("count", [1, K])
def test_learned_input_shift(count: int) -> None:
    x, w, _, g = problem()
    shift = torch.randn(count, dtype=torch.float64) / 4
    inputs = [t.requires_grad_() for t in (x, w, shift)]
    ours = binary_linear(x, w, input_shift=shift)
    compare(gradients(ours, inputs, g), gradients(formula(x, w, None, input_shift=shift), inputs, g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["clip", "identity", "approx", "reste"])
def test_kernels(dtype: torch.dtype, name: str) -> None:
    """What runs by default, by the tolerance rule; x of any leading shape."""
    x, w, bias, g = problem(dtype)
    results = []
    for of in (dtype, torch.float32, torch.float64):
        inputs = [t.to(of).requires_grad_() for t in (x, w, bias)]
        if of == dtype:
            y = binary_linear(
                inputs[0].reshape(3, 3, K), inputs[1], inputs[2], input_surrogate=name, save="exact"
            ).reshape(M, N)
        if of != dtype or dtype == torch.float32:
            other = formula(*inputs, name)  # type: ignore[arg-type]
            results.append(gradients(other, inputs, g))
        if of == dtype:
            results.insert(0, gradients(y, inputs, g))
    ours, torchs, right = results if len(results) == 3 else (results[0], results[1], results[3])
    for a, b, c in zip(ours, torchs, right, strict=True):
        assert a.dtype == dtype
        check_close(a, b.to(dtype), c, dtype)


def test_levels_of_the_slope() -> None:
    """ "auto" takes |u| in 255 levels: the slope of the nearest one."""
    x, w, _, g = problem()
    inputs = [x.requires_grad_()]
    ours = gradients(binary_linear(x, w, input_surrogate="approx"), inputs, g)
    exact = gradients(binary_linear(x, w, input_surrogate="approx", save="exact"), inputs, g)
    assert torch.equal(ours[0], exact[0])
    dsigns = (g * w.abs().mean(1)) @ sign(w)
    difference = (ours[1] - exact[1]).abs()
    assert 0 < difference.max() and (difference <= 2 / 254 * 0.501 * dsigns.abs()).all()


def saved_bytes(call: object) -> int:
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()  # type: ignore[operator]
    return sum(found.values())


@pytest.mark.parametrize("surrogate", ["clip", "identity"])
def test_saved_bytes(surrogate: str) -> None:
    """An eighth of what torch's float32 layer keeps; here a sixteenth (clip)."""
    x, w, bias = (
        torch.randn(256, 1024, requires_grad=True),
        torch.randn(512, 1024, requires_grad=True),
        torch.randn(512),
    )
    bias.requires_grad_()
    theirs = saved_bytes(lambda: torch.nn.functional.linear(x, w, bias))
    ours = saved_bytes(lambda: binary_linear(x, w, bias, input_surrogate=surrogate, weight_surrogate=surrogate))
    assert theirs == 4 * (x.numel() + w.numel())
    assert ours <= theirs / 15


def test_special_numbers() -> None:
    """sign(0) = sign(-0.0) = +1, sign(NaN) = -1, and an input too small for fp16 keeps its sign under autocast."""
    w = torch.ones(1, 1)
    x = torch.tensor([[0.0], [-0.0], [math.nan], [math.inf], [-1e-30]])
    assert binary_linear(x, w, scale=None)[:, 0].tolist() == [1, 1, -1, 1, -1]
    with torch.autocast("cpu", dtype=torch.float16):
        y = binary_linear(x, w, scale=None)
    assert y.dtype == torch.float16 and y[:, 0].tolist() == [1, 1, -1, 1, -1]
    x.requires_grad_()
    slope = torch.autograd.grad(binary_linear(x, w, scale=None).sum(), x)[0]
    assert slope[:, 0].tolist() == [1, 1, 0, 0, 1]


def test_second_derivatives_and_transforms() -> None:
    x, w, _, _ = problem()
    x.requires_grad_(), w.requires_grad_()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return binary_linear(x, w).square().sum()

    dx = torch.autograd.grad(loss(x, w), x, create_graph=True)[0]
    right = torch.autograd.grad(formula(x, w, None).square().sum(), x, create_graph=True)[0]
    torch.testing.assert_close(dx, right, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach(), w.detach()), dx.detach(), rtol=1e-10, atol=1e-10)
    batched = torch.vmap(lambda x: binary_linear(x, w))(x.detach().reshape(3, 3, K))
    torch.testing.assert_close(batched.reshape(M, N), binary_linear(x, w), rtol=1e-10, atol=1e-10)


def test_compiled() -> None:
    x, w, _, _ = problem(torch.float32)
    x.requires_grad_(), w.requires_grad_()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return binary_linear(x, w, input_surrogate="reste", detach=False).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x, w), (x, w)), torch.autograd.grad(loss(x, w), (x, w)), strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_and_strides() -> None:
    w = torch.randn(N, K)
    x = torch.randn(K, 6)
    assert torch.equal(binary_linear(x.T, w), binary_linear(x.T.contiguous(), w))
    assert torch.equal(binary_linear(x.T, torch.randn(K, N).T.copy_(w)), binary_linear(x.T.contiguous(), w))
    assert binary_linear(x[:, 0], w).shape == (N,)
    assert binary_linear(torch.randn(2, 0, K), w).shape == (2, 0, N)


def test_refusals() -> None:
    x, w, bias, _ = problem(torch.float32)
    for error, call in (
        (TypeError, lambda: binary_linear(x.int(), w)),
        (TypeError, lambda: binary_linear(x, w.int())),
        (ValueError, lambda: binary_linear(x[:, 1:], w)),
        (ValueError, lambda: binary_linear(x, w[0])),
        (ValueError, lambda: binary_linear(x, w, bias[1:])),
        (ValueError, lambda: binary_linear(x, w, scale="column")),
        (ValueError, lambda: binary_linear(x, w, scale=torch.ones(3))),
        (ValueError, lambda: binary_linear(x, w, input_surrogate="step")),
        (ValueError, lambda: binary_linear(x, w, input_shift=torch.ones(3))),
        (ValueError, lambda: binary_linear(x, w, save="u4")),
        (ValueError, lambda: surrogates.reste(power=0.5)),
    ):
        with pytest.raises(error):
            call()


@pytest.mark.parametrize("surrogate", ["clip", "approx", "identity", "biper"])
def test_empty_batches_have_gradients(surrogate: str) -> None:
    x, shift = torch.randn(0, 70, requires_grad=True), torch.zeros(70, requires_grad=True)
    weight, scale = torch.randn(5, 70, requires_grad=True), torch.ones(5, requires_grad=True)
    y = binary_linear(x, weight, input_surrogate=surrogate, input_shift=shift, scale=scale)
    signs = binarize(x, surrogate, shift=shift, scale=scale[:1], save="auto", dim=1)
    (y.sum() + signs.sum()).backward()
    assert x.grad.shape == x.shape
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (shift, weight, scale))


def test_two_layers_compiled_with_dynamic_shapes() -> None:
    x, w, v = (torch.randn(*shape, requires_grad=True) for shape in ((M, K), (N, K), (4, N)))

    def loss(x: Tensor) -> Tensor:
        return binary_linear(binary_linear(x, w), v, weight_surrogate="approx").square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (M, 5):
        a, b = torch.autograd.grad(compiled(x[:rows]), (x, w, v)), torch.autograd.grad(loss(x[:rows]), (x, w, v))
        torch.testing.assert_close(a, b)


def test_names_have_the_usual_numbers() -> None:
    for name in SURROGATES:
        assert surrogates.surrogate_of(name) == getattr(surrogates, name)()


def test_forward_mode() -> None:
    x, w, bias, _ = problem()
    tangent = torch.randn_like(x)
    y, along = torch.func.jvp(lambda x: binary_linear(x, w, bias), (x,), (tangent,))
    right = torch.func.jvp(lambda x: formula(x, w, bias), (x,), (tangent,))[1]
    torch.testing.assert_close(y, binary_linear(x, w, bias), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(along, right, rtol=1e-10, atol=1e-10)
