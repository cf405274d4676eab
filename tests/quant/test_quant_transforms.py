"""Public functions of quant under torch.func, dynamic shapes, batches of gradients, and without numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastloss import quant
from fastloss.quant import ActivationCodec

ONE, ROWS = torch.tensor([0.3]), torch.rand(6) + 0.2
COLUMNS = 40

QUANTISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda x: quant.binarize(x),
    "reste": lambda x: quant.binarize(x, "reste", scale="row"),
    "centred": lambda x: quant.binarize(x, "approx", scale="row", center=True, detach=False),
    "u8": lambda x: quant.binarize(x, "approx", save="u8"),
    "ternary": lambda x: quant.ternarize(x),
    "ternary, clipped": lambda x: quant.ternarize(x, "twn", surrogate="clip", detach=False, center=True),
    "lsq": lambda x: quant.fake_quant(x, ONE, bits=4, offset=torch.tensor([0.1])),
    "affine": lambda x: quant.fake_quant(x, ONE, bits=2, mode="affine", zero_point=torch.tensor([1.3])),
    "elastic": lambda x: quant.elastic_binarize(x, ONE),
    "elastic, unsigned": lambda x: quant.elastic_binarize(x, ONE, 2, signed=False),
}  # fmt: skip
SAVING: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: quant.gelu(x),
    "silu": lambda x: quant.silu(x),
    "softmax": lambda x: quant.softmax(x),
    "layer_norm": lambda x: quant.layer_norm(x, x.shape[-1:], torch.ones(x.shape[-1])),
}


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x).square().sum(), x)[0]


@pytest.mark.parametrize("name", [n for n in QUANTISERS if n != "u8"])
def test_functional_transforms(name: str) -> None:
    f, x = QUANTISERS[name], torch.randn(2, 6, COLUMNS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: a loop over the batch
        values = torch.func.vmap(f)(x)
        gradients = torch.func.vmap(torch.func.grad(lambda a: f(a).square().sum()))(x)
    for i in range(2):
        torch.testing.assert_close(values[i], f(x[i]))
        torch.testing.assert_close(gradients[i], gradient(f, x[i]))
    y, moved = torch.func.jvp(lambda a: f(a).square().sum(), (x[0],), (x[1],))
    torch.testing.assert_close(y, f(x[0]).square().sum())
    torch.testing.assert_close(moved, (gradient(f, x[0]) * x[1]).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "mode"), [(3, "lsq"), (2, "affine"), (2, "seq")])
def test_forward_mode_of_every_parameter(bits: int, mode: str) -> None:
    x, scale = torch.randn(6, COLUMNS, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.3
    shift = torch.randn(6, dtype=torch.float64)
    kind = "zero_point" if mode == "affine" else "offset"

    def f(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return quant.fake_quant(x, scale, bits=bits, mode=mode, dim=0, **{kind: shift}).square().sum()  # type: ignore[arg-type]

    given = [t.clone().requires_grad_() for t in (x, scale, shift)]
    tangents = [torch.randn_like(t) for t in given]
    wanted = sum((g * t).sum() for g, t in zip(torch.autograd.grad(f(*given), given), tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(f, (x, scale, shift), tuple(tangents))[1], wanted)


@pytest.mark.parametrize("name", [*QUANTISERS, *SAVING])
def test_shapes_may_be_dynamic(name: str) -> None:
    f = (QUANTISERS | SAVING)[name]
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9):
        x = torch.randn(rows, COLUMNS)
        torch.testing.assert_close(gradient(compiled, x), gradient(f, x))


@pytest.mark.parametrize("name", [*QUANTISERS, *SAVING])
@pytest.mark.parametrize("shape", [(0, COLUMNS), (6, 0), (0, 0)])
def test_no_numbers(name: str, shape: tuple[int, int]) -> None:
    assert gradient((QUANTISERS | SAVING)[name], torch.randn(shape)).shape == shape


def test_no_rows_but_a_learned_scale() -> None:
    for save in ("mask", "u8", "exact"):
        x, scale = torch.randn(512, 0, 16, requires_grad=True), torch.ones(16, requires_grad=True)
        quant.binarize(x, scale=scale, dim=-1, save=save).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape and scale.grad is not None and not scale.grad.any()


@pytest.mark.parametrize("name", SAVING)
def test_batches_of_gradients(name: str) -> None:
    x = torch.randn(6, COLUMNS, requires_grad=True)
    y, v = SAVING[name](x), torch.randn(3, 6, COLUMNS)
    batch = torch.autograd.grad(y, x, v, is_grads_batched=True, retain_graph=True)[0]
    for i in range(3):
        torch.testing.assert_close(batch[i], torch.autograd.grad(y, x, v[i], retain_graph=True)[0])


def test_without_a_gradient_nothing_is_encoded() -> None:
    codec, x = ActivationCodec(ema=0.9), torch.randn(8, COLUMNS)
    weight = torch.ones(COLUMNS)
    with torch.no_grad():
        quant.gelu(x.requires_grad_(), codec=codec), quant.silu(x, codec), quant.softmax(x, codec=codec)
    assert torch.equal(
        quant.layer_norm(x.detach(), COLUMNS, weight, codec=codec), torch.layer_norm(x.detach(), (COLUMNS,), weight)
    )
    assert codec.low is None
    quant.gelu(x, codec=codec)
    assert codec.low is not None


def test_layer_norm_of_two_dtypes() -> None:
    x, weight = torch.randn(8, COLUMNS, dtype=torch.bfloat16), torch.rand(COLUMNS)
    y = quant.layer_norm(x, COLUMNS, weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, torch.layer_norm(x.float(), (COLUMNS,), weight).bfloat16())
