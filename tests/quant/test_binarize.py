"""`binarize`: gradients of the declared surrogates, what is saved, statistics, and PyTorch's transforms of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from binarize_cases import CASES, KIND_NAMES, KINDS, NAMES, Case
from fastloss import quant, registry
from fastloss.quant import binarize, surrogates, unpack_bits
from fastloss.quant.contract import Save, Surrogate
from fastloss.quant.reference_quant import limit as reference_limit
from fastloss.quant.reference_quant import slope
from fastloss.quant.surrogates import SurrogateFunction


def chosen(case: Case) -> SurrogateFunction:
    return SurrogateFunction(*case.numbers[:1], case.p0, case.p1)._replace(kind=case.kind)


def away_from_kinks(case: Case, *shape: int) -> Tensor:
    """float64, on both sides of every kink and not on one."""
    u = torch.randn(shape, dtype=torch.float64) * 1.3
    for kink in (0.0, *case.kinks):
        u = torch.where((u.abs() - kink).abs() < 1e-3, u + 0.01, u)
    return u


def gradients(y: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, grad, allow_unused=True)


@pytest.mark.parametrize("save", ["exact", "auto"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_backward_is_autograd_of_the_declared_function(case: Case, save: str) -> None:
    u, grad = away_from_kinks(case, 5, 60), torch.randn(5, 60, dtype=torch.float64)
    shift, scale = (torch.rand(5, dtype=torch.float64).requires_grad_() for _ in range(2))
    x = (u + shift.detach()[:, None]).requires_grad_()
    dx, dshift, dscale = gradients(
        binarize(x, chosen(case), scale=scale, shift=shift, save=save), grad, x, shift, scale
    )
    wanted_dx, wanted_dshift = gradients(scale[:, None] * case.function(x - shift[:, None]), grad, x, shift)
    assert (dx - wanted_dx).abs().max() <= 1e-10 * wanted_dx.abs().max()
    assert (dshift - wanted_dshift).abs().max() <= 1e-10 * wanted_dx.abs().sum(1).max()
    sign = torch.where(u >= 0, 1.0, -1.0) if case.kind != Surrogate.BIPER else torch.sin(case.p0 * u).sign()
    assert (dscale - (grad * sign).sum(1)).abs().max() <= 1e-10 * grad.abs().sum()


def test_slopes_at_kinks_are_those_of_the_table() -> None:
    o, t, w, b = 3.0, 1.5, 20.0, 5.0
    line, nan, inf = 0.1 ** (1 / o) / 0.1, float("nan"), float("inf")
    table = {
        (Surrogate.IDENTITY, 0.0, 0.0): {0.0: 1, 1.0: 1, nan: 1, inf: 1},
        (Surrogate.CLIP, 1.0, 0.0): {0.0: 1, 1.0: 0, -1.0: 0, nan: 0, inf: 0},
        (Surrogate.APPROX, 0.0, 0.0): {0.0: 2, 1.0: 0, -1.0: 0, nan: 0, inf: 0},
        (Surrogate.RESTE, o, t): {0.0: line, 0.1: line, -0.1: line, t: t ** (1 / o - 1) / o, 1.6: 0, nan: 0, inf: 0},
        (Surrogate.BIPER, w, 0.0): {0.0: w, math.pi / w: -w, nan: nan},
        (Surrogate.SWISH, b, 0.0): {0.0: b, nan: 0, inf: 0},
        (Surrogate.FDA, 0.1, 9.0): {0.0: 4 / math.pi, 1.0001: 0, nan: 0, inf: 0},
    }
    for numbers, values in table.items():
        x = torch.tensor(list(values), dtype=torch.float64, requires_grad=True)
        (dx,) = gradients(binarize(x, SurrogateFunction(*numbers)), torch.ones_like(x), x)
        wanted = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
        assert torch.allclose(dx, wanted, rtol=1e-12, atol=1e-12, equal_nan=True), numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_signs(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-7, -1e-7], dtype=dtype)
    assert binarize(x).tolist() == [1, 1, -1, 1, -1, 1, -1]
    assert binarize(x).dtype == dtype
    assert unpack_bits(binarize(x, packed=True)).tolist() == [1, 1, -1, 1, -1, 1, -1]


def saved_bytes(call: Callable[[], Tensor], *given: Tensor) -> int:
    """Of tensors kept for the backward that were not given."""
    kept: dict[int, int] = {}
    addresses = {t.data_ptr() for t in given}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in addresses:
            kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(kept.values())


def test_bytes_kept_for_the_backward() -> None:
    x, scale = torch.randn(64, 1024, requires_grad=True), torch.rand(64, requires_grad=True)
    elements = x.numel()
    assert saved_bytes(lambda: binarize(x, "clip"), x) == elements // 8  # one bit
    assert saved_bytes(lambda: binarize(x, "clip", scale=scale), x, scale) == elements // 4  # two: dscale wants signs
    assert saved_bytes(lambda: binarize(x, "identity"), x) == 0
    assert saved_bytes(lambda: binarize(x, "identity", scale=scale), x, scale) == elements // 8
    assert saved_bytes(lambda: binarize(x, "reste", save="u8"), x) == elements
    assert saved_bytes(lambda: binarize(x, "reste"), x) == 0  # x itself
    packed = torch.ops.fastloss.binarize(x.detach(), None, None, 1, 1, 1, 1.0, 0.0, int(Save.SIGNS | Save.MASK))
    assert packed[1].nbytes + packed[3].nbytes == elements // 4 and packed[0].numel() == 0  # two, and no dense result


def test_nothing_is_kept_or_made_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, run = [], registry.run
    monkeypatch.setattr(registry, "run", lambda op, *args: seen.append(args[-1]) or run(op, *args))
    x = torch.randn(4, 40)
    binarize(x, "clip")
    with torch.no_grad():
        binarize(x.requires_grad_(), "swish", save="u8")
    assert seen == [Save.DENSE, Save.DENSE]


@pytest.mark.parametrize("case", [c for c in KINDS if c.ends], ids=[c.name for c in KINDS if c.ends])
def test_codes_have_the_slope_of_the_nearest_of_255_levels(case: Case) -> None:
    limit = reference_limit(*case.numbers)
    x = (torch.linspace(-1.2, 1.2, 1501) * limit)[None].requires_grad_()
    grad = torch.randn_like(x)
    (dx,) = gradients(binarize(x, chosen(case), save="u8"), grad, x)
    a = x.detach().double().abs()
    level = (254 * a.float() / limit).round().double() * limit / 254
    of_level = slope(level.clamp(max=limit), *case.numbers)
    of_level = torch.ones_like(a) if case.kind == Surrogate.CLIP else of_level
    wanted = torch.where(a <= limit, grad * of_level, 0.0)
    assert torch.allclose(dx.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("scale", ["mean", "row"])
@pytest.mark.parametrize("center", [False, True])
def test_statistics(scale: str, center: bool, detach: bool) -> None:
    """scale = mean |x - shift|, over all of x or each index of dim; their gradients too, unless they are constants."""
    case, grad = KINDS[Surrogate.APPROX], torch.randn(4, 3, 10, dtype=torch.float64)
    for dim in (0, 1, -1):
        x = away_from_kinks(case, 4, 3, 10).requires_grad_()
        over = tuple(range(3)) if scale == "mean" else tuple(d for d in range(3) if d != dim % 3)
        shift = x.mean(over, keepdim=True) if center else torch.zeros((), dtype=torch.float64)
        size = (x - shift).abs().mean(over, keepdim=True)
        if detach:
            shift, size = shift.detach(), size.detach()
        y = binarize(x, "approx", scale=scale, center=center, dim=dim, detach=detach)
        sign = torch.where(x - shift >= 0, 1.0, -1.0)
        assert torch.allclose(y, size * sign, rtol=1e-12)
        smooth = case.function(x - shift)
        declared = size.detach() * smooth + size * sign  # dscale is of the sign itself
        (dx,), (wanted,) = gradients(y, grad, x), gradients(declared, grad, x)
        assert torch.allclose(dx, wanted, rtol=1e-10, atol=1e-12), dim


def test_the_mean_of_many_numbers() -> None:
    """torch's own norm in float32 is off by 1e-4 here."""
    x = torch.rand(3, 700_001)
    for scale, over in (("mean", (0, 1)), ("row", (1,))):
        wanted = x.double().abs().mean(over, keepdim=True)
        assert torch.allclose(binarize(x, scale=scale).double().abs(), wanted.expand_as(x), rtol=2e-7)


@pytest.mark.parametrize("case", KINDS, ids=KIND_NAMES)
def test_compiles_whole(case: Case) -> None:
    x, scale = torch.randn(3, 70, requires_grad=True), torch.rand(3, requires_grad=True)
    save = "u8" if case.ends else "auto"

    def step(x: Tensor, scale: Tensor) -> Tensor:
        return binarize(x, chosen(case), scale=scale, save=save)

    grad = torch.randn(3, 70)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, scale)
    assert torch.equal(compiled, step(x, scale))
    for a, b in zip(gradients(compiled, grad, x, scale), gradients(step(x, scale), grad, x, scale), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("saves", [Save.DENSE, Save.SIGNS | Save.MASK, Save.DENSE | Save.CODES])
def test_opcheck(case: Case, saves: Save) -> None:
    if saves & Save.CODES and not case.ends:
        saves = Save.DENSE
    x, scale = torch.randn(3, 70), torch.rand(3)
    args = (x, None, scale, 3, 70, *case.numbers)
    torch.library.opcheck(torch.ops.fastloss.binarize.default, (*args, int(saves)))
    torch.library.opcheck(torch.ops.fastloss.binarize_backward.default, (x, x, None, None, None, *args[1:], 7))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", KINDS, ids=KIND_NAMES)
def test_torch_func(case: Case) -> None:
    x, scale, shift = torch.randn(4, 3, 20), torch.rand(4, 3) + 0.5, torch.randn(4, 3) / 8
    weight = torch.randn(3, 20)

    def loss(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (binarize(x, chosen(case), scale=scale, shift=shift) * weight).sum()

    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(x, scale, shift)
    for i in range(4):
        given = [t[i].clone().requires_grad_() for t in (x, scale, shift)]
        for a, b in zip(found, torch.autograd.grad(loss(*given), given), strict=True):
            assert torch.allclose(a[i], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", KINDS, ids=KIND_NAMES)
def test_forward_mode_is_the_transpose_of_the_backward(case: Case) -> None:
    x, scale = away_from_kinks(case, 3, 20), torch.rand(3, dtype=torch.float64)
    x[0, 0] = float("inf")
    along = (torch.randn_like(x), torch.randn_like(scale))
    y, tangent = torch.func.jvp(lambda x, s: binarize(x, chosen(case), scale=s), (x, scale), along)
    assert torch.equal(y, binarize(x, chosen(case), scale=scale))
    grad = torch.randn_like(y)
    grad[0, 0] = 0  # at infinity it is the value that counts
    given = [t.clone().requires_grad_() for t in (x, scale)]
    back = [
        b.nan_to_num(0.0) for b in torch.autograd.grad(binarize(given[0], chosen(case), scale=given[1]), given, grad)
    ]
    assert torch.allclose((grad * tangent).sum(), sum((a * b).sum() for a, b in zip(along, back, strict=True)))


def test_a_second_backward_is_of_the_slopes() -> None:
    x = away_from_kinks(KINDS[Surrogate.APPROX], 3, 20).requires_grad_()
    (dx,) = torch.autograd.grad(binarize(x, "approx").pow(2).sum(), x, create_graph=True)
    y = binarize(x.detach())
    (again,) = torch.autograd.grad(dx.sum(), x)
    # dx = 2 y F'(u): the derivative in y goes on through the surrogate.
    inside = x.detach().abs() < 1
    slopes = torch.where(inside, 2 - 2 * x.detach().abs(), 0.0)
    wanted = 2 * slopes**2 + torch.where(inside, 2 * y * -2 * x.detach().sign(), 0.0)
    assert torch.allclose(again, wanted)


def test_autocast_keeps_the_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(4, 30, requires_grad=True)
        y = binarize(x @ torch.eye(30), "clip")
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [lambda x: x.t(), lambda x: x[:, ::3], lambda x: x[1:2].expand(5, -1), lambda x: x[:0], lambda x: x[0, 0]],
    ids=["transposed", "strided", "expanded", "empty", "one number"],
)
def test_any_shape_and_stride(change: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(6, 33, requires_grad=True)
    given, plain = change(x), change(x).detach().clone().contiguous().requires_grad_()
    before = given.detach().clone()
    a, b = binarize(given, "swish", scale="mean"), binarize(plain, "swish", scale="mean")
    assert torch.equal(a, b) and a.shape == given.shape
    grad = torch.randn_like(b)
    (da,), (db,) = gradients(a, grad, given), gradients(b, grad, plain)
    assert torch.equal(da, db) and torch.equal(given, before)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x: binarize(x.int()), TypeError, "torch.int32"),
        (lambda x: binarize(x, "sigmoid"), ValueError, "'sigmoid'"),
        (lambda x: binarize(x, save="half"), ValueError, "'half'"),
        (lambda x: binarize(x, "reste", save="mask"), ValueError, "got reste"),
        (lambda x: binarize(x, "biper", save="u8"), ValueError, "biper"),
        (lambda x: binarize(x, scale="max"), ValueError, "'max'"),
        (lambda x: binarize(x, scale=torch.ones(3)), ValueError, r"1 or 4 numbers, got \[3\]"),
        (lambda x: binarize(x, shift=torch.ones(3)), ValueError, r"shift must hold 1 or 4 numbers, got \[3\]"),
        (lambda x: binarize(x, center=True, shift=torch.ones(1)), ValueError, "its own shift"),
        (lambda x: binarize(x, scale="row", dim=2), ValueError, "2"),
        (lambda x: binarize(x, scale=torch.ones(40), dim=-1, packed=True), ValueError, "rows of the last dimension"),
        (lambda x: surrogates.reste(0.5), ValueError, "0.5"),
        (lambda x: surrogates.clip(float("inf")), ValueError, "inf"),
        (lambda x: surrogates.fda(terms=1.5), ValueError, "1.5"),
        (lambda x: quant.reste_power(1.5), ValueError, "1.5"),
    ],
)
def test_errors_name_what_was_given(call, error, says) -> None:
    x = torch.randn(4, 40)
    before = x.clone()
    with pytest.raises(error, match=says):
        call(x)
    assert torch.equal(x, before)
