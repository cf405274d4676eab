"""`ternarize`: values, gradients, what is kept, and PyTorch's transforms of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss.quant import ternarize, unpack_bits

METHODS = ("twn", "mean43", "absmean")


def formula(x: Tensor, method: str, dim: int | None, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(t, scale, d = x - center), in float64, by the definitions in the papers; differentiable."""
    x = x.double()
    over = tuple(range(x.dim())) if dim is None else tuple(d for d in range(x.dim()) if d != dim % x.dim())
    d = x - x.mean(over, keepdim=True).detach() if center else x
    mean = d.abs().mean(over, keepdim=True)
    if method == "twn":
        large = d.detach().abs() > 0.7 * mean.detach()
        scale = (d.abs() * large).sum(over, keepdim=True) / large.sum(over, keepdim=True)
        return d.detach().sign() * large, scale, d
    scale = mean * 4 / 3 if method == "mean43" else mean.clamp(min=1e-5)
    return (d / scale).detach().round().clamp(-1, 1), scale, d


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("method", METHODS)
def test_values(method: str, dim: int | None, center: bool) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(4, 3, 130).to(dtype)
        before = x.clone()
        t, scale, _ = formula(x, method, dim, center)
        y = ternarize(x, method, dim=dim, center=center)
        assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, before)
        assert torch.allclose(y.double(), t * scale, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=0)
        packed = ternarize(x, method, dim=dim, center=center, packed=True)
        assert torch.equal(unpack_bits(packed._replace(scale=None)).double(), t)
        assert torch.allclose(unpack_bits(packed).double(), t * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("surrogate", ["identity", "clip"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients(method: str, surrogate: str, detach: bool) -> None:
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        x, grad = torch.randn(5, 90, dtype=dtype), torch.randn(5, 90, dtype=dtype)
        x.requires_grad_()
        (dx,) = torch.autograd.grad(ternarize(x, method, surrogate=surrogate, detach=detach), x, grad)
        wide = x.detach().double().requires_grad_()
        t, scale, d = formula(wide, method, 0, False)
        passes = (d.abs() <= scale).detach() if surrogate == "clip" else torch.ones_like(d)
        declared = d * passes + (scale.detach() if detach else scale) * t
        (wanted,) = torch.autograd.grad(declared, wide, grad.double())
        assert torch.allclose(dx.double(), wanted, rtol=close, atol=close)


def test_bytes_kept_for_the_backward() -> None:
    x, kept = torch.randn(64, 1024, requires_grad=True), []

    def bytes_of(**options: object) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            ternarize(x, "twn", **options)  # type: ignore[arg-type]
        return sum(kept)

    few = 3 * 64 * 4  # scales
    assert bytes_of(surrogate="identity") <= few
    assert bytes_of(surrogate="clip") <= x.numel() // 8 + few


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("surrogate", ["identity", "clip"])
def test_transforms(surrogate: str) -> None:
    x, weight = torch.randn(3, 4, 20), torch.randn(4, 20)

    def loss(x: Tensor) -> Tensor:
        return (ternarize(x, "absmean", surrogate=surrogate, detach=False) * weight).sum()

    found = torch.func.vmap(torch.func.grad(loss))(x)
    for one, of_one in zip(x, found, strict=True):
        given = one.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(loss(given), given)
        assert torch.allclose(of_one, wanted, rtol=1e-5, atol=1e-6)
        along = torch.randn_like(one)
        value, tangent = torch.func.jvp(loss, (one,), (along,))
        assert torch.allclose(value, loss(one)) and torch.allclose(tangent, (wanted * along).sum(), rtol=1e-4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    given = x[0].clone().requires_grad_()
    (dx,) = torch.autograd.grad(compiled(given), given)
    assert torch.allclose(dx, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (2, 3, 5, 7)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    ternarize(x, "twn").sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    strided = torch.randn(*shape, 2)[..., 0]
    assert torch.equal(ternarize(strided), ternarize(strided.contiguous()))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x: ternarize(x.int()), TypeError, "torch.int32"),
        (lambda x: ternarize(x, "max"), ValueError, "'max'"),
        (lambda x: ternarize(x, surrogate="reste"), ValueError, "'reste'"),
        (lambda x: ternarize(x, dim=1), ValueError, "dim 1"),
        (lambda x: ternarize(x[0]), ValueError, r"\[40\]"),
    ],
)
def test_errors_name_what_was_given(call, error, says) -> None:
    with pytest.raises(error, match=says):
        call(torch.randn(4, 40))
