"""binary_cross_entropy_with_logits and kl_div on the CPU kernels: every instruction set, against float64 and torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss import backend_cpp
from fastloss.compiled import _C, MISSING
from tolerance import check_close, check_gradient

pytestmark = [
    pytest.mark.skipif(_C is None, reason=str(MISSING)),
    pytest.mark.filterwarnings("ignore:.*'mean' divides|.*\"mean\" divides"),
]

OPS = torch.ops.fastloss
ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")
KINDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "bce": (fastloss.functional.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, {}),
    "kl": (fastloss.functional.kl_div, F.kl_div, {}),
    "kl_log": (fastloss.functional.kl_div, F.kl_div, {"log_target": True}),
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each level of csrc/cpu/cpu.h in turn, forced."""
    if request.param > _C.best_isa():
        pytest.skip(f"needs {ISAS[request.param]}; the best of this machine is {_C.isa_name(_C.best_isa())}")
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return request.param


@pytest.fixture(autouse=True)
def cpp() -> Iterator[None]:
    """The kernel whatever the size, or an error."""
    with fastloss.use_backend("cpp"):
        yield


def operands(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Input and target; a third of the targets are exactly 0 or 1."""
    x, t = torch.randn(shape) * 6, torch.rand(shape)
    t = torch.where(torch.rand(shape) < 1 / 3, t.round(), t)
    if kind != "bce":
        x = x.log_softmax(-1) if x.dim() else x
    return x.to(dtype), ((t + 1e-6).log() if kind == "kl_log" else t).to(dtype)


def oracle(kind: str, x: Tensor, t: Tensor, w: Tensor | None = None, p: Tensor | None = None) -> Tensor:
    """The textbook's values in float64, by other formulas than the kernels'."""
    x, t = x.double(), t.double()
    if kind == "kl":
        return torch.special.entr(t).neg() - t * x
    if kind == "kl_log":
        return t.exp() * t - t.exp() * x
    one = torch.ones((), dtype=torch.float64)
    w, p = (one if a is None else a.double() for a in (w, p))
    return w * (p * t * torch.logaddexp(-x, one * 0) + (1 - t) * torch.logaddexp(x, one * 0))


def check(kind: str, x: Tensor, t: Tensor, reduction: str, **weights: Tensor | None) -> None:
    """Value and gradient under a random cotangent, as accurate as torch; a second backward bit-equal; inputs untouched."""
    ours, torch_own, more = KINDS[kind]
    before = [a.clone() for a in (x, t)]
    share = {"mean": 1 / max(1, x.numel()), "batchmean": 1 / x.shape[0] if x.dim() else 1.0}.get(reduction, 1.0)
    cotangent, results = None, []
    for f in (ours, torch_own, None):
        leaf = x.detach().to(x.dtype if f else torch.float64).requires_grad_()
        if f is not None:
            loss = f(leaf, t, reduction=reduction, **weights, **more)
        else:
            values = oracle(kind, leaf, t, weights.get("weight"), weights.get("pos_weight"))
            loss = values if reduction == "none" else values.sum() * share
        cotangent = torch.randn_like(loss) if cotangent is None else cotangent
        grad = torch.autograd.grad(loss, leaf, cotangent.to(loss.dtype), retain_graph=True)[0]
        again = torch.autograd.grad(loss, leaf, cotangent.to(loss.dtype))[0]
        assert torch.equal(grad, again), "second backward differs"
        results.append((loss.detach(), grad))
    (a, da), (b, db), (r, dr) = results
    assert a.dtype == b.dtype and a.shape == b.shape and da.dtype == db.dtype
    check_close(a, b, r, a.dtype, k=8)
    check_gradient(*(d.reshape(1, -1) for d in (da, db, dr)), x.dtype)
    for given, kept in zip((x, t), before, strict=True):
        assert torch.equal(given, kept), "an input was written to"


@each_kind
@each_dtype
def test_reductions_and_sizes(isa: int, dtype: torch.dtype, kind: str) -> None:
    """One element, less than a vector, odd, several blocks, several parts."""
    for shape in ((), (1,), (7,), (3, 37), (5, 1000), (2, 9001)):
        for reduction in ("mean", "sum", "none", *(["batchmean"] if kind != "bce" else [])):
            check(kind, *operands(kind, shape, dtype), reduction)


@each_dtype
def test_weights(isa: int, dtype: torch.dtype) -> None:
    """None, one number, the last dim's, trailing dims', the whole shape's, and what has to be spread out first."""
    shapes = [None, (), (1,), (30,), (4, 30), (50, 4, 30), (1, 1, 30), (50, 1, 1), (4, 1)]
    x, t = operands("bce", (50, 4, 30), dtype)
    pairs = [(a, None) for a in shapes] + [(None, a) for a in shapes] + [((30,), (4, 1)), ((50, 4, 30), ())]
    for w, p in pairs:
        weight, pos_weight = (None if a is None else (torch.rand(a) * 2 + 0.1).to(dtype) for a in (w, p))
        for reduction in ("mean", "none"):
            check("bce", x, t, reduction, weight=weight, pos_weight=pos_weight)


def hard(kind: str) -> tuple[Tensor, Tensor]:
    x = torch.tensor([0, -0.0, 1, -1, 20, -20, 88, -88, 120, -120, 1e4, -1e4, 3e38, INF, -INF, NAN])
    t = torch.tensor(
        [0, 1, 0.5, 1e-30, 1e-42, 1 - 2**-24, NAN] if kind != "kl_log" else [0, -1e-3, -50, -110, -INF, NAN]
    )
    return (a.reshape(-1).contiguous() for a in torch.meshgrid(x, t, indexing="ij"))  # type: ignore[return-value]


@each_kind
def test_hard_values(isa: int, kind: str) -> None:
    """Margins, what overflows, infinities and NaN. NaN where torch has it; elsewhere the value, and the gradient always."""
    x, t = hard(kind)
    ours, torch_own, more = KINDS[kind]
    results = []
    for f, dtype in ((ours, torch.float32), (torch_own, torch.float32), (torch_own, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        values = f(leaf, t.to(dtype), reduction="none", **more)
        results.append((values.detach(), *torch.autograd.grad(values.sum(), leaf)))
    for (a, da), (b, db), (r, dr) in [results]:
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(da.isnan(), db.isnan())
        finite = b.isfinite() & r.isfinite()
        assert torch.equal(a[b.isinf()], b[b.isinf()])
        exact, relative = oracle(kind, x, t)[finite], 4e-7 if kind == "bce" else 1e-6
        allowed = 1.25 * (b.double()[finite] - exact).abs() + relative * exact.abs() + 1e-37
        assert ((a.double()[finite] - exact).abs() <= allowed).all()
        good, tiny = ~db.isnan(), torch.finfo(torch.float32).tiny  # what is subnormal may be 0
        allowed = 1.25 * (db - dr).abs() + 4 * torch.finfo(torch.float32).eps * dr.abs() + tiny
        assert ((da - dr).abs() <= allowed)[good].all()


def test_margin_form(isa: int) -> None:
    """A sure element's loss and gradient keep their digits: no 1 - 1 and no 20 - 20.000000002."""
    x = torch.tensor([20.0, -20.0, 60.0, -60.0]).requires_grad_()
    t = torch.tensor([1.0, 0.0, 1.0, 0.0])
    values = fastloss.functional.binary_cross_entropy_with_logits(x, t, reduction="none")
    (grad,) = torch.autograd.grad(values.sum(), x)
    small = torch.exp(-x.detach().double().abs())
    torch.testing.assert_close(values.detach().double(), small.log1p(), rtol=3e-7, atol=0)
    torch.testing.assert_close(grad.double().abs(), small / (1 + small), rtol=3e-7, atol=0)


@each_kind
@each_dtype
def test_layouts(dtype: torch.dtype, kind: str) -> None:
    """Transposed, sliced, expanded with stride 0, starting anywhere: as the contiguous copies."""
    x, t = operands(kind, (60, 50), dtype)
    row = t[:1].expand(60, 50)
    for a, b in ((x.T, t.T), (x[:, 3:40], t[:, 3:40]), (x, row), (x.reshape(-1)[7:2999], t.reshape(-1)[1:2993])):
        assert a.shape == b.shape
        check(kind, a, b, "none")
        check(kind, a, b, "sum")


@each_kind
def test_float32_targets_of_16_bits(kind: str) -> None:
    for dtype, reduction in itertools.product(DTYPES[1:], ("sum", "none")):
        x, t = operands(kind, (4, 600), torch.float32)
        check(kind, x.to(dtype), t, reduction)


@each_kind
def test_autocast_gives_float32(kind: str) -> None:
    ours, torch_own, more = KINDS[kind]
    x, t = operands(kind, (4, 600), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (f(x, t, reduction="sum", **more) for f in (ours, torch_own))
    assert a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_kind
def test_loss_scale_of_float16(kind: str) -> None:
    """A mean's gradient is subnormal in float16; under an upstream gradient of 2^16 it is made again, not scaled."""
    ours, _, more = KINDS[kind]
    x, t = operands(kind, (400, 500), torch.float16)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ours(leaf, t, reduction="mean", **more) * 1.0, leaf, torch.tensor(60000.0).half())
    wide = x.double().requires_grad_()
    (truth,) = torch.autograd.grad(oracle(kind, wide, t).mean(), wide, torch.tensor(60000.0).half().double())
    close = (grad.double() - truth).abs() <= 2**-11 * truth.abs() * 1.01 + 2**-25
    assert close.all(), "rounded more than once"


@each_kind
@each_dtype
def test_thread_count_does_not_change_a_bit(dtype: torch.dtype, kind: str) -> None:
    x, t = operands(kind, (3, 40_000), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with_gradient = OPS.pointwise_loss(x, t, None, None, list(KINDS).index(kind), 1.0, True, True)
            assert torch.equal(with_gradient[0], OPS.pointwise_loss(x, t, None, None, list(KINDS).index(kind))[0])
            results.append(with_gradient)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_gradient(isa: int, dtype: torch.dtype) -> None:
    """Past 16 MiB results are written past the cache, values too."""
    n = (17 << 20) // dtype.itemsize + 5
    x = torch.linspace(-9, 9, n).to(dtype)
    t = torch.zeros((), dtype=dtype).expand(n).contiguous()
    loss, dinput = OPS.pointwise_loss(x, t, None, None, 0, 1.0, True, True)
    values, _ = OPS.pointwise_loss(x, t, None, None, 0, 1.0, False, False)
    torch.testing.assert_close(dinput.float(), x.float().sigmoid(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(values.float(), F.softplus(x.float()), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(loss, F.softplus(x.double()).sum().float(), rtol=1e-6, atol=0)
