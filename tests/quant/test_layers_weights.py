"""ReCU, learned bases, elastic activations, dynamic sign, output scales and mimicking, each against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastloss.quant import dynamic_sign, elastic_binarize, elastic_scale, unpack_bits
from fastloss.quant.layers import (
    ElasticBinarize,
    LowRankMimicking,
    MultiBasisLinear,
    OutputScale,
    ReCU,
    basis_scales,
    multi_basis,
)
from fastloss.quant.recipes import recu_tau
from surrogate_functions import saved_bytes, signed

DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize("shape", [(5, 40), (4, 3, 3, 2)])
@pytest.mark.parametrize("tau", [0.5, 0.85, 0.99])
def test_recu(tau: float, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, **DOUBLE, requires_grad=True)
    rows = w.flatten(1)
    u = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) / (2 * math.sqrt(2)))
    q = -u.detach().abs().mean(1, keepdim=True) * math.log(2 - 2 * tau)
    wanted = torch.minimum(torch.maximum(u, -q), q).reshape(shape)
    ours = ReCU(tau)(w)
    assert torch.allclose(ours, wanted, atol=1e-12)
    gradient = torch.randn(shape, **DOUBLE)
    if tau > 0.5:  # there every weight lies on the clamp
        a, b = (torch.autograd.grad(y, w, gradient)[0] for y in (ours, wanted))
        assert torch.allclose(a, b, atol=1e-10) and a.abs().sum() > 0


def test_recu_tau() -> None:
    shares = [recu_tau(p / 10) for p in range(11)]
    assert shares == sorted(shares) and shares[0] == pytest.approx(0.85) and shares[-1] == pytest.approx(0.99)
    slope = 0.14 / (math.e - 1)
    assert shares[5] == pytest.approx(slope * math.exp(0.5) + 0.85 - slope)


@pytest.mark.parametrize("bases", [1, 2, 3])
@pytest.mark.parametrize("shape", [(4, 30), (3, 2, 3, 3)])
def test_multi_basis(shape: tuple[int, ...], bases: int) -> None:
    w = torch.randn(shape, **DOUBLE, requires_grad=True)
    scales = basis_scales(w, bases).requires_grad_()
    beside = (-1, *[1] * (len(shape) - 1))
    rest, wanted = w, torch.zeros_like(w)
    for s in scales:
        basis = signed(rest, "clip")
        wanted = wanted + s.reshape(beside) * basis
        rest = rest - s.reshape(beside) * basis
    gradient = torch.randn(shape, **DOUBLE)
    ours = multi_basis(w, scales)
    assert torch.allclose(ours, wanted, atol=1e-12)
    assert torch.allclose(scales[0], w.flatten(1).abs().mean(1))
    for a, b in zip(*(torch.autograd.grad(y, (w, scales), gradient) for y in (ours, wanted)), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_gradients_of_two_bases_as_in_the_paper() -> None:
    w = torch.randn(4, 30, **DOUBLE, requires_grad=True)
    scales = basis_scales(w, 2).requires_grad_()
    s1, s2 = scales.detach()[:, :, None]
    g, rest = torch.randn(4, 30, **DOUBLE), (w - s1 * signed(w, "clip")).detach()
    m1, m2 = (w.abs() < 1).double(), (rest.abs() < 1).double()
    dw, ds = torch.autograd.grad(multi_basis(w, scales), (w, scales), g)
    assert torch.allclose(dw, g * (s1 * m1 + s2 * m2 * (1 - s1 * m1)), atol=1e-12)
    assert torch.allclose(ds[0], (g * w.sign() * (1 - s2 * m2)).sum(1), atol=1e-12)
    assert torch.allclose(ds[1], (g * rest.sign()).sum(1), atol=1e-12)


@pytest.mark.parametrize("input_bits", [None, 4])
def test_multi_basis_linear(input_bits: int | None) -> None:
    full = nn.Linear(70, 6)
    layer = MultiBasisLinear.from_float(full, bases=3, input_bits=input_bits)
    x = torch.randn(5, 70)
    assert torch.allclose(layer.scales, basis_scales(full.weight, 3))
    y, packed = layer(x), layer.pack()
    held = sum(unpack_bits(part.bits) for part in packed.parts)  # type: ignore[union-attr]
    assert torch.allclose(held, multi_basis(layer.weight, layer.scales), atol=1e-7)  # type: ignore[arg-type]
    assert torch.allclose(packed(x), y, atol=1e-5)
    errors = [(multi_basis(full.weight, basis_scales(full.weight, b)) - full.weight).norm().item() for b in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)


def elastic_formula(
    x: Tensor, scale: Tensor, bits: int, is_signed: bool, dim: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, d y / d x, factor and slope of d y / d scale) of the table, elementwise."""
    a = scale if dim is None else scale.reshape(-1, *[1] * (x.dim() - 1))
    sharing = x.numel() / scale.numel()
    if is_signed and bits == 1:
        s = torch.where(x >= 0, 1.0, -1.0).double()
        return a * s, (x.abs() <= a).double(), s / math.sqrt(sharing)
    low, high = (-1, 1) if is_signed else (0, bits)
    least = x.min() if (not is_signed and bits == 2) else 0.0
    v = (x - least) / a
    q = v.round().clamp(low, high)
    inside = (v >= low) & (v <= high)
    return a * q + least, inside.double(), torch.where(inside, q - v, q) / math.sqrt(sharing * high)


@pytest.mark.parametrize("dim", [None, 0])
@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("shape", [(6, 20), (3, 4, 11)])
def test_elastic_binarize(shape: tuple[int, ...], bits: int, is_signed: bool, dim: int | None) -> None:
    x = torch.randn(shape, **DOUBLE, requires_grad=True)
    start = elastic_scale(x, bits, signed=is_signed, dim=dim)
    mean = x.detach().abs().mean() if dim is None else x.detach().abs().flatten(1).mean(1)
    largest = 1 if is_signed else 2**bits - 1
    assert torch.allclose(start, (2 if is_signed else 4) * mean / math.sqrt(largest))
    scale = (0.6 * start).requires_grad_()
    with torch.no_grad():
        x.view(-1)[:2] = torch.tensor([0.0, -0.0])
    y = elastic_binarize(x, scale, bits, signed=is_signed, dim=dim)
    wanted, dx, dscale = elastic_formula(x.detach(), scale.detach(), bits, is_signed, dim)
    g = torch.randn(shape, **DOUBLE)
    ours = torch.autograd.grad(y, (x, scale), g)
    assert torch.allclose(y, wanted, atol=1e-12) and torch.allclose(ours[0], g * dx, atol=1e-12)
    sums = (g * dscale).sum().reshape(1) if dim is None else (g * dscale).flatten(1).sum(1)
    assert torch.allclose(ours[1], sums, atol=1e-10)


def test_elastic_binarize_saves_two_bits() -> None:
    x, scale = torch.randn(64, 1024, requires_grad=True), torch.ones(1, requires_grad=True)
    assert saved_bytes(lambda: elastic_binarize(x * 1.0, scale), x, scale) <= 64 * 1024 / 4 + 64


def test_small_scales_keep_their_gradient() -> None:
    x, scale = torch.randn(8, 8), torch.full((1,), -0.5, requires_grad=True)
    y = elastic_binarize(x, scale)
    assert torch.allclose(y.abs(), torch.tensor(1e-5), rtol=1e-2)
    y.sum().backward()
    assert scale.grad is not None and torch.allclose(scale.grad, (x >= 0).sum() * 2.0 / 8 - 64 / 8, atol=1e-5)


@pytest.mark.parametrize("bits, is_signed", [(1, True), (2, True), (1, False), (2, False)])
def test_elastic_module(bits: int, is_signed: bool) -> None:
    """The first batch sets the scale, later ones and a state_dict do not."""
    torch._dynamo.reset()
    module, x = ElasticBinarize(bits, signed=is_signed), torch.randn(4, 9)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    scale = elastic_scale(x, bits, signed=is_signed)
    assert torch.allclose(module.scale, scale) and torch.equal(
        y, elastic_binarize(x, module.scale, bits, signed=is_signed)
    )
    module(5 * x)
    assert torch.allclose(module.scale, scale)
    other = ElasticBinarize(bits, signed=is_signed)
    other.load_state_dict(module.state_dict())
    other(5 * x)
    assert torch.equal(other.scale, module.scale) and f"bits={bits}" in repr(other)


def test_dynamic_sign() -> None:
    v = torch.randn(7, 64) * 0.02
    t = torch.tensor([0.005, 0.01, 0.5, -1.0, 0.0, 0.01, 0.01])
    v[5], v[6] = v[5].abs(), -v[6].abs()
    for row in range(7):
        threshold, many = min(max(float(t[row]), -0.01), 0.01), int((v[row] > 0).sum()) > 32
        for x, bit in zip(v[row].tolist(), dynamic_sign(v, t)[row].tolist(), strict=True):
            assert bit == ((-1 if many else 1) if abs(x) < threshold else (1 if x >= 0 else -1))
    assert torch.equal(dynamic_sign(v, t[:, None]), dynamic_sign(v, t))
    assert torch.equal(dynamic_sign(v, 0.0), torch.where(v >= 0, 1.0, -1.0))
    assert dynamic_sign(torch.tensor([0.0, -0.0, float("nan")]), 0.0).tolist() == [1, 1, -1]
    assert dynamic_sign(v.bfloat16(), 0.01).dtype == torch.bfloat16
    assert not dynamic_sign(v.requires_grad_(), 0.01).requires_grad


@pytest.mark.parametrize("height, width", [(None, None), (4, None), (4, 5)])
def test_output_scale(height: int | None, width: int | None) -> None:
    module, x = OutputScale(3, height, width), torch.randn(2, 3, 4, 5)
    assert torch.equal(module(x), x)
    factors = [nn.init.normal_(p) for p in module.parameters()]
    wanted = x * factors[0][:, None, None]
    wanted = wanted if height is None else wanted * factors[1][:, None]
    wanted = wanted if width is None else wanted * factors[2]
    assert torch.allclose(module(x), wanted)
    with pytest.raises(ValueError, match="x must be"):
        module(torch.randn(2, 4, 4, 5))


def test_low_rank_mimicking() -> None:
    teacher = [torch.randn(*shape, **DOUBLE) * 0.6 ** torch.arange(shape[-1]) for shape in ((3, 20, 16), (40, 8))]
    student = [(t + 0.3 * torch.randn_like(t)).requires_grad_() for t in teacher]
    module = LowRankMimicking((16, 8), **DOUBLE)
    loss = module(student, teacher)
    total = 0.0
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        k = module.directions(i)
        assert k.shape == (t.shape[-1], max(2, t.shape[-1] // 4))
        assert torch.allclose(k.T @ k, torch.eye(k.shape[1], **DOUBLE), atol=1e-10)
        centred = t.flatten(0, -2) - t.flatten(0, -2).mean(0)
        kept = (centred @ k).square().sum() / torch.linalg.svdvals(centred)[: k.shape[1]].square().sum()
        assert kept > 0.85  # nearly the directions of most variance: the method is a randomised one
        total = total + ((s - t) @ k).square().mean() / 2
    assert torch.allclose(loss, 1e-4 * total)
    loss.backward()
    assert all(s.grad is not None and s.grad.abs().sum() > 0 for s in student)
    first = module.directions(0).clone()
    module(student, [2 * t + 1 for t in teacher])
    assert torch.equal(module.directions(0), first)
    other = LowRankMimicking((16, 8), **DOUBLE)
    other.load_state_dict(module.state_dict())
    assert torch.allclose(other(student, teacher), loss)


def test_refusals() -> None:
    x = torch.randn(3, 4)
    for make, message in (
        (lambda: ReCU(1.0), "tau must be"), (lambda: recu_tau(2.0), "progress must be"),
        (lambda: ReCU()(x[0]), "weight must be"),
        (lambda: multi_basis(x, torch.ones(2, 4)), "scales"), (lambda: basis_scales(x, 0), "bases must be"),
        (lambda: MultiBasisLinear(3, 2, bases=0), "bases must be"),
        (lambda: elastic_binarize(x, torch.ones(1), 3), "bits must be 1 or 2"),
        (lambda: ElasticBinarize(4), "bits must be 1 or 2"),
        (lambda: elastic_binarize(x, torch.ones(2)), "scale must hold"),
        (lambda: elastic_binarize(x, torch.ones(4), dim=1), "dim must be"),
        (lambda: dynamic_sign(x, torch.ones(4)), "threshold must be"), (lambda: dynamic_sign(x, 1.0, limit=-1), "limit must be"),
        (lambda: LowRankMimicking(()), "features must be"), (lambda: LowRankMimicking((4,))([x], [x, x]), "teacher must be"),
        (lambda: LowRankMimicking((4,))([x], [x[:, :3]]), "teacher must be"),
        (lambda: LowRankMimicking((4,))([x[:1]], [x[:1]]), "rows of features"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()
    for call in (lambda: elastic_binarize(x.int(), torch.ones(1)), lambda: dynamic_sign(x.int(), 0.0)):
        with pytest.raises(TypeError, match="floating"):
            call()
