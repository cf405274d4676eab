"""`fake_quant`: every instruction set, dtype and layout against the reference, gradients against autograd of the declared
surrogate in float64, torch's own fake quantisation where it is defined alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp, registry
from fastloss.compiled import _C, MISSING
from fastloss.quant import fake_quant
from fastloss.quant.contract import Grad
from fastloss.quant.fake_quant import lsq_levels, seq_levels

ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL = int(Grad.X | Grad.SCALE | Grad.SHIFT)
#: rows, columns, groups, inner: tensor, rows, last dimension, channels, groups of a row, short runs that repeat or do not
LAYOUTS = (
    (1, 1, 1, 1), (7, 13, 1, 1), (50, 700, 1, 1), (7, 130, 7, 130), (7, 131, 131, 1), (12, 65, 4, 195), (6, 256, 24, 64),
    (6, 96, 72, 8), (3, 9, 3, 1), (20, 2100, 2100, 1), (20, 3000, 20000, 3), (2, 1100, 1100, 1), (2, 20000, 2, 20000),
)  # fmt: skip
LEVELS = {
    "signed": (-8.0, 7.0, 1.0, 0.0, False), "affine": (0.0, 255.0, 1.0, 0.0, True), "seq": (-0.99, 0.99, 2.0, 0.5, False),
    "ternary": (-0.99, 0.99, 1.5, 0.0, False),
}  # fmt: skip

compiled_only = pytest.mark.skipif(_C is None, reason=str(MISSING))


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each level of csrc/cpu/cpu.h in turn, forced."""
    best = _C.best_isa()  # type: ignore[union-attr]
    if request.param > best:
        pytest.skip(f"needs {ISAS[request.param]}; the best of this machine is {_C.isa_name(best)}")  # type: ignore[union-attr]
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Undoes torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def on(backend: str, op: str, *args: Any) -> Any:
    with registry.use_backend(backend):
        return getattr(torch.ops.fastloss, op).default(*args)


def operands(layout: tuple[int, int, int, int], dtype: torch.dtype, shared: bool = False) -> tuple[Any, ...]:
    rows, columns, groups, _ = layout
    x = (torch.randn(rows, columns) * 3).to(dtype)
    x.view(-1)[::17] = 0
    count = 1 if shared else groups
    scale = torch.rand(count) * torch.where(torch.arange(count) % 3 == 2, 1.0, 0.3) + 0.05
    return torch.randn(rows, columns).to(dtype), x, scale, torch.randn(count), torch.randint(-3, 4, (count,)).float()


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


def exact_sums(
    g: Tensor, x: Tensor, scale: Tensor, offset: Tensor, zero: Tensor, layout: Any, levels: Any
) -> list[Tensor]:
    """dscale, doffset and the sums of the magnitudes in float64, of the levels that float32 arithmetic finds."""
    groups, inner = layout[2:]
    low, high, steps, shift, rounded = levels
    index = torch.arange(x.numel()) // inner % groups
    s, o, z = (t.expand(groups)[index] for t in (scale, offset, zero))
    v = (x.float().reshape(-1) - o) / s
    q = ((torch.minimum(torch.maximum(v, low - z), high - z) * steps - shift).round() + shift) / steps
    at = v.round() if rounded else v
    inside = (at >= low - z) & (at <= high - z)
    exact = (x.float().reshape(-1) - o).double() / s.double()
    g64 = g.double().reshape(-1)
    term = g64 * torch.where(inside, q.double() - exact, q.double())
    out = torch.where(inside, 0.0, g64)
    return [torch.zeros(groups, dtype=torch.float64).index_add(0, index, t) for t in (term, out, term.abs(), out.abs())]


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_kernels(isa: int, layout: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    where = layout[2:]
    for given, levels in ((given, levels) for given in (3, 1) for levels in LEVELS.values()):
        g, x, *parameters = operands(layout, dtype, shared=given == 1)
        scale, offset, zero = (p if i < given else None for i, p in enumerate(parameters))
        args = (x, scale, offset, zero, *where, *levels)
        assert torch.equal(on("cpp", "fake_quant", *args), on("reference", "fake_quant", *args))
        dx, dscale, doffset = on("cpp", "fake_quant_backward", g, *args, ALL)
        assert torch.equal(dx, on("reference", "fake_quant_backward", g, *args, int(Grad.X))[0])
        nothing = torch.zeros(1)
        ds, do, ds_size, do_size = exact_sums(g, x, scale, nothing if offset is None else offset,
                                              nothing if zero is None else zero, layout, levels)  # fmt: skip
        assert ((dscale - ds).abs() <= 1e-6 * ds_size + 1e-30).all()
        assert ((doffset - do).abs() <= 1e-6 * do_size + 1e-30).all()
        for needs in (Grad.X, Grad.SCALE, Grad.SHIFT, Grad.NOTHING) if given == 3 else ():
            made = on("cpp", "fake_quant_backward", g, *args, int(needs))
            for part, whole, flag in zip(made, (dx, dscale, doffset), (Grad.X, Grad.SCALE, Grad.SHIFT), strict=True):
                assert torch.equal(part, whole) if needs & flag else part.numel() == 0


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_numbers(isa: int, dtype: torch.dtype) -> None:
    """NaN, infinities, ties, zeros of both signs, subnormals; steps from the smallest to the largest."""
    hard = [
        0.0,
        -0.0,
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        -2.5,
        7.5,
        -8.5,
        7.49,
        1e4,
        -1e4,
        math.inf,
        -math.inf,
        math.nan,
        6e-8,
        -6e-8,
        1e-30,
    ]
    for scale in (1.0, 0.1, 3.0, -0.7, 1e-35, 1e-12, 1e12, 1e35, 1e-45):
        x = torch.tensor(hard * 3, dtype=dtype).reshape(3, -1)
        args = (x, torch.tensor([scale]), None, None, 1, 1)
        for levels in LEVELS.values():
            assert same(on("cpp", "fake_quant", *args, *levels), on("reference", "fake_quant", *args, *levels))
            g = torch.ones_like(x)
            ours, theirs = (
                on(b, "fake_quant_backward", g, *args, *levels, int(Grad.X))[0] for b in ("cpp", "reference")
            )
            assert same(ours, theirs)


@compiled_only
def test_the_quotient_is_that_of_the_division(isa: int) -> None:
    """Two Newton steps on a reciprocal round as the division does: 4e5 pairs, with levels so fine that q is v."""
    rows, columns = 400, 1000
    powers = 2.0 ** torch.randint(-50, 50, (rows,))
    scales = torch.randint(2**23, 2**24, (rows,)) * 2.0**-23 * powers
    x = torch.randint(2**23, 2**24, (rows, columns)) * 2.0 ** torch.randint(-50, 0, (rows, columns)) * powers[:, None]
    args = (x, scales, None, None, rows, columns, -(2.0**40), 2.0**40, 2.0**60, 0.0, False)
    made = on("cpp", "fake_quant", *args)
    assert torch.equal(made, x / scales[:, None] * scales[:, None]) and not torch.equal(made, x)


@compiled_only
@pytest.mark.parametrize("layout", [(1, 300000, 1, 1), (200, 600, 600, 1), (100, 1000, 100, 1000)], ids=str)
def test_the_sums_do_not_depend_on_threads(isa: int, layout: tuple[int, int, int, int], threads: None) -> None:
    g, x, scale, offset, zero = operands(layout, torch.float32)
    args = (g, x, scale, offset, zero, *layout[2:], *LEVELS["signed"], ALL)
    runs = []
    for count in (1, 2, 3, 5, 1):
        torch.set_num_threads(count)
        runs.append(on("cpp", "fake_quant_backward", *args))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    "mode, bits, signed",
    [("lsq", 4, True), ("lsq", 8, False), ("seq", 2, True), ("seq", 1.58, True), ("affine", 3, True)],
)
@pytest.mark.parametrize("where", [{}, {"dim": 0}, {"dim": -1}, {"group": 5}], ids=str)
def test_gradients_are_those_of_the_declared_surrogate(
    mode: str, bits: float, signed: bool, where: dict[str, int]
) -> None:
    """y = (c + stop(q - c)) scale + offset, c = clamp(v): its derivatives are LSQ's rule."""
    f64 = torch.float64
    x = torch.randn(6, 10, dtype=f64).mul(3).requires_grad_()
    count = {"{}": 1, "{'dim': 0}": 6, "{'dim': -1}": 10, "{'group': 5}": 12}[str(where)]
    scale = (torch.rand(count, dtype=f64) + 0.3).requires_grad_()
    offset = torch.randn(count, dtype=f64).requires_grad_()
    levels = seq_levels(bits) if mode == "seq" else lsq_levels(bits, signed)

    def lay(p: Tensor) -> Tensor:
        if "group" in where:
            return p.reshape(6, 2, 1).expand(6, 2, 5).reshape(6, 10)
        return p if count == 1 else p.reshape((6, 1) if count == 6 else (1, 10))

    s, o = lay(scale), lay(offset)
    v = (x - o) / s
    low, high = (float(torch.tensor(t)) for t in (levels.low, levels.high))
    at = v.round() if mode == "affine" else v
    c = torch.where((at >= low) & (at <= high), v, v.clamp(low, high).detach())
    q = ((v.clamp(low, high) * levels.steps - levels.shift).round() + levels.shift) / levels.steps
    wanted = (c + (q - c).detach()) * s + o
    made = fake_quant(x, scale, bits=bits, signed=signed, mode=mode, offset=offset, grad_factor=None, **where)
    torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(made)
    ours, theirs = (torch.autograd.grad(y, (x, scale, offset), g) for y in (made, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradient_factors() -> None:
    x, scale = torch.randn(8, 32), torch.full((8,), 0.3, requires_grad=True)

    def dscale(**more: Any) -> Tensor:
        y = fake_quant(x, scale, dim=0, **more)
        return torch.autograd.grad(y.square().sum(), scale)[0]

    plain = dscale(bits=3, grad_factor=None)
    assert plain.abs().min() > 0
    torch.testing.assert_close(dscale(bits=3), plain / math.sqrt(32 * 3))
    torch.testing.assert_close(dscale(bits=3, grad_factor=0.25), plain * 0.25)
    for bits, largest in ((2, 1), (3, 3), (1.58, 1)):
        plain = dscale(bits=bits, mode="seq", grad_factor=None)
        torch.testing.assert_close(dscale(bits=bits, mode="seq"), plain / math.sqrt(32 * largest))


@pytest.mark.parametrize("channels", [False, True])
def test_torchs_own(channels: bool) -> None:
    """Values and gradients of torch's learnable fake quantisation; steps of powers of two, where its reciprocal is exact."""
    x = (torch.randn(6, 5, 7) * 4).requires_grad_()
    x.data.view(-1)[:8] = torch.tensor([0.0625, 0.1875, -0.3125, 1.0, -1.0, 0.9375, 3.0, -3.0])
    scale = (2.0 ** torch.randint(-4, -1, (5 if channels else 1,))).requires_grad_()
    zero = torch.randint(-3, 4, (5 if channels else 1,)).float().requires_grad_()
    core = (
        torch._fake_quantize_learnable_per_channel_affine
        if channels
        else torch._fake_quantize_learnable_per_tensor_affine
    )
    theirs = core(x, scale, zero, 1, -8, 7, 0.5) if channels else core(x, scale, zero, -8, 7, 0.5)
    ours = fake_quant(x, scale, bits=4, mode="affine", zero_point=zero, dim=1 if channels else None, grad_factor=0.5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    g = torch.randn_like(ours)
    got, wanted = (torch.autograd.grad(y, (x, scale, zero), g) for y in (ours, theirs))
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=0)
    for a, b in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compile_autocast_strides_and_empty() -> None:
    x, scale = torch.randn(12, 20, requires_grad=True), torch.full((20,), 0.2, requires_grad=True)
    run = torch.compile(lambda x, s: fake_quant(x, s, bits=4, dim=1) * 2, fullgraph=True, backend="aot_eager")
    eager = fake_quant(x, scale, bits=4, dim=1) * 2
    torch.testing.assert_close(run(x, scale), eager)
    g = torch.randn(12, 20)
    for a, b in zip(
        torch.autograd.grad(run(x, scale), (x, scale), g), torch.autograd.grad(eager, (x, scale), g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    turned = x.t()
    torch.testing.assert_close(fake_quant(turned, scale, bits=4, dim=0), fake_quant(x, scale, bits=4, dim=1).t())
    with torch.autocast("cpu", torch.bfloat16):
        y = fake_quant(x @ x.t(), scale[:12], bits=4, dim=0)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert scale.grad is not None and scale.grad.dtype == torch.float32 and scale.grad[:12].abs().sum() > 0
    y = fake_quant(torch.empty(0, 20, requires_grad=True), scale, bits=4, dim=1)
    assert y.shape == (0, 20)
    assert torch.autograd.grad(y.sum(), scale)[0].eq(0).all()


def test_functions_of_functions() -> None:
    x, scale = torch.randn(30), torch.full((1,), 0.3, requires_grad=True)
    wanted = torch.func.grad(lambda s: fake_quant(x, s, bits=3).square().sum())(scale.detach())
    (got,) = torch.autograd.grad(fake_quant(x, scale, bits=3).square().sum(), scale, create_graph=True)
    torch.testing.assert_close(got.detach(), wanted)


def test_errors() -> None:
    x, scale = torch.randn(4, 6), torch.ones(1)
    for error, words, more in (
        (ValueError, "bits must be 1 to 16", {"bits": 0}),
        (ValueError, "bits must be 1 to 16", {"bits": 1.58}),
        (ValueError, "bits of SEQ", {"bits": 1, "mode": "seq"}),
        (ValueError, "signed", {"bits": 2, "mode": "seq", "signed": False}),
        (ValueError, "mode must be", {"mode": "x"}),
        (ValueError, "zero_point is of", {"zero_point": torch.zeros(1)}),
        (ValueError, "1 or 4 numbers", {"dim": 0, "offset": torch.zeros(3)}),
        (ValueError, "group must divide", {"group": 4}),
        (ValueError, "dim must be in", {"dim": 2}),
        (ValueError, "grad_factor must be", {"grad_factor": "x"}),
    ):
        with pytest.raises(error, match=words):
            fake_quant(x, scale, **more)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="floating"):
        fake_quant(torch.ones(3, dtype=torch.int32), scale)
    with pytest.raises(TypeError, match="scale must be"):
        fake_quant(x, None)  # type: ignore[arg-type]
    assert "float64" in fastloss.explain("fake_quant", x.double(), scale, None, None, 1, 1, *LEVELS["signed"])


@pytest.mark.parametrize(("groups", "inner"), [(1, 1), (3, 61), (61, 1), (3, 1891)])
@pytest.mark.parametrize("size", [0.0, 1e-40])
def test_a_scale_without_a_reciprocal_leaves_its_gradient_finite(
    isa: int, groups: int, inner: int, size: float
) -> None:
    x, g = torch.rand(93, 61) + 1.0, torch.randn(93, 61)
    x = torch.where(torch.rand(93, 61) < 0.5, -x, x)
    quantizer = (torch.full((groups,), size), None, None, groups, inner, -8.0, 7.0, 1.0, 0.0, False)
    found = torch.ops.fastloss.fake_quant_backward(g, x, *quantizer, int(Grad.SCALE))[1]
    terms = g.double() * torch.where(x > 0, 7.0, -8.0)
    wanted = terms.sum().reshape(1) if groups == 1 else terms.reshape(-1, groups, inner).sum((0, 2))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


def test_two_in_one_graph_of_dynamic_shapes() -> None:
    """The gradient factor depends on the shape, and is a symbol there."""
    step = torch.tensor([0.1], requires_grad=True)

    def twice(x: Tensor) -> Tensor:
        return (fake_quant(fake_quant(x, step, bits=4) * 2, step, bits=4) * x.detach()).sum()

    compiled = torch.compile(twice, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 3):
        x = torch.randn(rows, 6, requires_grad=True)
        for ours, wanted in zip(
            torch.autograd.grad(compiled(x), (x, step)), torch.autograd.grad(twice(x), (x, step)), strict=True
        ):
            assert torch.allclose(ours, wanted, rtol=1e-5)
