"""The fused CPU kernel of a linear head by itself: every engine of this machine against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp, reference
from fastloss.compiled import _C, MISSING
from fastloss.contract import Needs, Stat, Want

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))

OPS = torch.ops.fastloss
INF = float("inf")
EVERYTHING = int(Needs.INPUT | Needs.WEIGHT | Needs.BIAS)
# (instruction set of csrc/cpu/linear_cross_entropy.h, dtype) by name: the three kinds of tiles, and what is widened to fp32
ENGINES = {
    "float32": (2, torch.float32),
    "float16 in float32 tiles": (2, torch.float16),
    "bfloat16 in float32 tiles": (2, torch.bfloat16),
    "bfloat16 by AVX-512": (3, torch.bfloat16),
    "bfloat16 by AMX": (4, torch.bfloat16),
}
# Relative L2 error of a gradient that is rounded once, and whose exponentials are rounded once to 16 bits before.
RELATIVE = {torch.float32: 1e-6, torch.float16: 7e-4, torch.bfloat16: 4.5e-3}


class Head(NamedTuple):
    """A call, in the order of the op."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    target: Tensor | None
    prob: Tensor | None
    weight: Tensor | None
    epilogue: Tensor
    ignore_index: int = -100
    want: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    needs: int = EVERYTHING
    max_extra_bytes: int = 0


class Result(NamedTuple):
    stats: Tensor
    dx: Tensor
    dw: Tensor
    db: Tensor


@pytest.fixture(params=ENGINES.values(), ids=ENGINES.keys())
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of each engine in turn, which is forced."""
    isa, dtype = request.param
    monkeypatch.setattr(backend_cpp, "ISA", isa)
    if why_not := backend_cpp._Head(*head(dtype, 1, 1, 1)).why_not:
        pytest.skip(why_not)
    return dtype


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Undoes torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def head(dtype: torch.dtype, n: int, d: int, v: int, spread: float = 2.0, **options: Any) -> Head:
    """Logits of standard deviation `spread`, a bias, some rows ignored, some targets twice; nll, lse and lse² have weight."""
    target = torch.randint(0, v, (n,))
    if n > 3:
        target[3], target[n // 2] = -100, target[0]
    epilogue = torch.randn(4, n) * torch.tensor([1, 0.3, 0.05, 0.01])[:, None]
    x, w = torch.randn(n, d).to(dtype), (torch.randn(v, d) * d**-0.5 * spread).to(dtype)
    return Head(x, w, torch.randn(v), target, None, None, epilogue)._replace(**options)


def run(h: Head, **options: Any) -> Result:
    """The fused kernel, which must not refuse."""
    call = backend_cpp._Head(*h._replace(**options))
    assert call.why_not is None, call.why_not
    call.run()
    return Result(call.stats, call.dx, call.dw, call.db)


def expected(h: Head, dtype: torch.dtype) -> Result:
    """Textbook: logits as a matrix of `dtype`, the reference row op on them, and two products, rounded to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    x, w, epilogue = (t.to(wide) for t in (h.x, h.w, h.epilogue))
    bias, prob, weight = (None if t is None else t.to(wide) for t in (h.bias, h.prob, h.weight))
    z = torch.nn.functional.linear(x, w, bias).to(dtype)
    stats, _, dz = reference.cross_entropy(
        z, h.target, prob, weight, epilogue, h.ignore_index, h.want, h.scale, h.softcap
    )
    dz = dz.to(wide)
    return Result(stats, (dz @ w).to(dtype), (dz.T @ x).to(dtype), dz.sum(0))


def check_statistics(stats: Tensor, truth: Tensor, h: Head) -> None:
    """max, logsum, target, sum; and the margin, that an offset common to all logits must not touch."""
    z = (h.x.double() @ h.w.double().T).abs().amax().item() * abs(h.scale)
    if h.bias is not None:
        bias = h.bias.double()[h.bias.isfinite()]
        z += ((bias - bias.median()).abs().amax().item() if len(bias) else 0) * abs(h.scale)
    kept = torch.ones_like(truth[0], dtype=torch.bool) if h.target is None else h.target != h.ignore_index
    size, largest = 1 + z, 1 + torch.nan_to_num(truth[: Stat.MEAN], 0, 0, 0).abs().amax().item()
    assert not stats[:, ~kept].any()
    ours, truth = stats.double()[:, kept], truth.double()[:, kept]

    def margin(t: Tensor) -> Tensor:
        return t[Stat.TARGET] - reference.finite(t[Stat.MAX]) - t[Stat.LOGSUM]

    def near(got: Tensor, right: Tensor, allowed: float, name: str) -> None:
        torch.testing.assert_close(got, right, rtol=0, atol=allowed, equal_nan=True, msg=lambda text: f"{name}: {text}")

    near(margin(ours), margin(truth), 3e-6 * size, "margin")
    near(ours[Stat.MAX], truth[Stat.MAX], 2e-6 * largest, "max")
    near(ours[Stat.TARGET], truth[Stat.TARGET], 2e-6 * largest, "target")
    near(ours[Stat.LOGSUM], truth[Stat.LOGSUM], 3e-6 * size + 1e-7 * largest, "logsum")
    if h.want & Want.SUM:  # relative to max as it is, rounded to float32
        weights = len(h.w) if h.weight is None else h.weight.double().sum()
        sums = truth[Stat.SUM] + (truth[Stat.MAX] - ours[Stat.MAX]) * weights
        near(ours[Stat.SUM], sums, 3e-6 * max(1, sums.abs().amax().item()), "sum")
    others = [s for s in range(len(stats)) if s > Stat.TARGET and not (s == Stat.SUM and h.want & Want.SUM)]
    assert not ours[others].any()


def check_gradient(ours: Tensor, unfused: Tensor, truth: Tensor, dtype: torch.dtype, name: str) -> None:
    """In L2 as good as one rounding, or as the unfused composition; and no single element far off."""
    error, theirs, limit = (ours.double() - truth), (unfused.double() - truth), RELATIVE[dtype]
    assert error.isfinite().all(), f"{name}: {int((~error.isfinite()).sum())} of {error.numel()} not finite"
    relative = float(error.norm() / truth.norm().clamp(min=1e-30))
    assert error.norm() <= max(limit * truth.norm(), 1.5 * theirs.norm()), f"{name}: relative error {relative:.3g}"
    excess = error.abs() - 1.5 * theirs.abs() - 4 * limit * truth.abs().amax()
    assert (excess <= 0).all(), f"{name}: {int((excess > 0).sum())} of {error.numel()} elements wrong"


def check_gradients(h: Head, results: list[Result]) -> None:
    truth, unfused, dtype = expected(h, torch.float64), expected(h, h.x.dtype), h.x.dtype
    for result in results:
        for flag, name in ((Needs.INPUT, "dx"), (Needs.WEIGHT, "dw"), (Needs.BIAS, "db")):
            got, theirs, right = (getattr(r, name) for r in (result, unfused, truth))
            if h.needs & flag:
                check_gradient(got, theirs, right, dtype, name)
            else:
                assert not got.numel()
        if h.target is not None and h.needs & Needs.INPUT:
            assert not result.dx[h.target == h.ignore_index].any()


def check(h: Head, *results: Result) -> Result:
    """The kernel on this head, or results of it, against float64; returns the first."""
    results = results or (run(h),)
    stats = expected(h, torch.float64).stats
    for result in results:
        check_statistics(result.stats, stats, h)
    check_gradients(h, list(results))
    return results[0]


def same_bits(a: Result, b: Result) -> bool:
    return all(torch.equal(p.view(torch.uint8), q.view(torch.uint8)) for p, q in zip(a, b, strict=True))


# Tiles are 32 x 32 and a reduction 32 long; w waits in blocks, E in the memory of dw (d / 32 panels), d in steps of 1024.
SHAPES = (
    (1, 1, 1), (1, 32, 1), (5, 1, 3), (33, 32, 7), (37, 17, 91), (40, 33, 65), (70, 64, 501), (300, 31, 64),
    (300, 256, 1037), (96, 1056, 333), (700, 65, 1000),
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_threads(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Whole and ragged tiles of every kind; the same bits on a second run and with one thread or two."""
    h, results = head(dtype, *shape), []
    for count in (1, 2, 2, 5):
        torch.set_num_threads(count)
        results.append(run(h))
    check(h, results[0])
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("needs", range(8))
def test_gradients_one_by_one(dtype: torch.dtype, needs: int) -> None:
    """What is not needed comes back empty; the statistics do not depend on it."""
    h = head(dtype, 130, 65, 501)
    assert torch.equal(check(h._replace(needs=needs)).stats, run(h).stats)


def weigh(h: Head, *factors: float) -> Tensor:
    """The epilogue with its rows (nll, lse, lse², sum) times these."""
    return h.epilogue * torch.tensor(factors)[:, None]


def smoothed(h: Head) -> Head:
    """Label smoothing with column weights, and z-loss."""
    return h._replace(weight=torch.rand(len(h.w)) + 0.5, want=int(Want.SUM))


def with_bias(h: Head, at: slice | int, value: float, target: int | None = None) -> Head:
    """A bias of 0 but for `value` at some columns, which `target`, if given, is the target of all rows."""
    bias = torch.zeros(len(h.w))
    bias[at] = value
    return h._replace(bias=bias, target=h.target if target is None else torch.full_like(h.target, target))


def every_seventh(h: Head, value: float, **options: Any) -> Head:
    """A bias of `value` at columns that are nobody's target."""
    target = torch.where(h.target < 0, h.target, h.target // 7 * 7 + 1)
    return with_bias(h, slice(None, None, 7), value)._replace(target=target, **options)


def sure(h: Head, p: float) -> Head:
    """Plain cross entropy with p_y about p."""
    nll_only = torch.tensor([1.0, 0, 0, 0])[:, None].repeat(1, len(h.x))
    return with_bias(h, 5, float(torch.tensor(p / (1 - p) * len(h.w)).log()), 5)._replace(epilogue=nll_only)


def apart(t: Tensor, more: int) -> Tensor:
    """The same rows with NaN between them, not aligned."""
    wide = torch.full((t.shape[0], t.shape[1] + more), torch.nan, dtype=t.dtype)
    wide[:, 1 : t.shape[1] + 1] = t
    return wide[:, 1 : t.shape[1] + 1]


FEATURES: dict[str, Callable[[Head], Head]] = {
    "no bias": lambda h: h._replace(bias=None),
    "smoothing": smoothed,
    "smoothing, unit weights, negative scale": lambda h: smoothed(h)._replace(weight=None, scale=-0.75),
    "softcap": lambda h: h._replace(softcap=5.0, scale=1.25),
    "softcap, negative scale": lambda h: h._replace(softcap=5.0, scale=-1.25),
    "negative scale": lambda h: h._replace(scale=-0.75),
    "offset": lambda h: h._replace(bias=h.bias + 1e4),
    "offset, smoothing": lambda h: smoothed(h)._replace(bias=h.bias + 1e4, epilogue=weigh(h, 1, 1, 0, 1)),
    "no target": lambda h: h._replace(target=None, epilogue=weigh(h, 0, 1, 1, 0)),
    "apart": lambda h: h._replace(x=apart(h.x, 3), w=apart(h.w, 5)),
    "all ignored": lambda h: h._replace(target=torch.full_like(h.target, -100)),
    "ignored class id": lambda h: h._replace(target=h.target.clamp(min=0), ignore_index=int(h.target[0])),
    "minus inf bias": lambda h: every_seventh(h, -INF),
    "inf bias, negative scale": lambda h: every_seventh(h, INF, scale=-1.0),
    "p_y 0.9": lambda h: sure(h, 0.9),
    "p_y 0.999": lambda h: sure(h, 0.999),
    "p_y 0.9999": lambda h: sure(h, 0.9999),
    "target far below": lambda h: with_bias(h, 9, 200.0),
    "target far above": lambda h: with_bias(h, 9, 200.0, 9),
    "some targets far below, some above": lambda h: with_bias(h, slice(0, None, 3), 120.0),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features(dtype: torch.dtype, feature: str) -> None:
    """Each at a size of many tiles and at one of a few, in chunks of 32 tokens and in one."""
    for shape in ((130, 65, 506), (37, 17, 100)):
        h = FEATURES[feature](head(dtype, *shape))
        check(h, run(h), run(h, max_extra_bytes=1))


def test_wide_logits(dtype: torch.dtype) -> None:
    """Of standard deviation 60: nearly every token is done again with its own maximum as offset."""
    check(head(dtype, 96, 64, 900, spread=60.0))


def test_chunks_change_nothing_in_a_row(dtype: torch.dtype) -> None:
    """Statistics and dx of a token are its own; dw is summed over chunks in float32."""
    h = smoothed(head(dtype, 300, 48, 201))
    whole, parts = run(h), check(h._replace(max_extra_bytes=1))
    assert torch.equal(whole.stats, parts.stats) and torch.equal(whole.dx, parts.dx)


def test_aligned_or_not_the_same_bits(dtype: torch.dtype) -> None:
    h = head(dtype, 70, 48, 201)
    x, w = (torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (h.x, h.w))
    assert x.data_ptr() % 16 and same_bits(run(h), run(h._replace(x=x, w=w)))


def test_no_rows(dtype: torch.dtype) -> None:
    h = head(dtype, 0, 48, 201)
    call = backend_cpp._Head(*h)  # refuses; the kernel itself makes zeros of what it is given
    call.run()
    assert not call.dw.any() and not call.db.any()
    with fastloss.use_backend("cpp"):
        stats, _, dx, dw, _ = OPS.linear_cross_entropy(*h)
    assert stats.shape == (8, 0) and dx.shape == (0, 48) and not dw.any()


def test_bad_rows_stay_alone(dtype: torch.dtype) -> None:
    """Class ids out of range and NaN in x: NaN in these rows and in no other; ignored rows are not read."""
    h = head(dtype, 70, 48, 201)
    h.target[5], h.target[6], h.target[7] = 10**9, -7, -(2**63)
    h.x[9, 3] = torch.nan
    h.x[3] = torch.nan  # ignored
    stats, dx, _, _ = run(h)
    bad = torch.zeros(70, dtype=torch.bool)
    bad[[5, 6, 7, 9]] = True
    assert torch.equal(dx.isnan().all(1), bad) and torch.equal(dx.isnan().any(1), bad)
    assert torch.equal(stats[: Stat.MEAN].isnan().any(0), bad) and stats[Stat.TARGET, 5:8].isnan().all()
    nothing = run(h._replace(target=torch.full((70,), -100), x=torch.full_like(h.x, torch.nan)))
    assert not any(t.any() for t in nothing)


def test_one_column_is_all_there_is(dtype: torch.dtype) -> None:
    """All other columns are -inf: with it as target the rest is empty; with another target, that has no probability."""
    h = with_bias(head(dtype, 70, 48, 201), slice(None), -INF)
    h.bias[4] = 0
    nll_only = torch.tensor([1.0, 0, 0, 0])[:, None].repeat(1, 70)
    found = run(h._replace(target=torch.full((70,), 4), epilogue=nll_only))
    assert (found.stats[: Stat.TARGET] == -INF).all() and found.stats[Stat.TARGET].isfinite().all()
    assert not found.dx.any() and not found.dw.any() and not found.db.any()
    missed = run(h._replace(target=torch.full((70,), 7), epilogue=nll_only))
    assert (missed.stats[Stat.TARGET] == -INF).all() and missed.stats[: Stat.TARGET].isfinite().all()
    assert missed.dx.isfinite().all()


REFUSED: dict[str, tuple[str, Callable[[Head], Head]]] = {
    "entropy": ("no statistics beyond", lambda h: h._replace(want=int(Want.ENTROPY | Want.ARGMAX))),
    "sum under a softcap": ("not linear in x", lambda h: smoothed(h)._replace(softcap=5.0)),
    "probabilities": (
        "class ids",
        lambda h: h._replace(target=None, prob=torch.randn(len(h.x), len(h.w)).softmax(-1).to(h.x.dtype)),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("dtype_of_head", [torch.float32, torch.bfloat16])
def test_refusals_go_through_chunks(dtype_of_head: torch.dtype, case: str) -> None:
    reason, change = REFUSED[case]
    h = change(head(dtype_of_head, 70, 48, 201))
    h = h._replace(epilogue=weigh(h, 1, 1, 1, 1 if h.want & Want.SUM else 0))
    assert reason in backend_cpp._Head(*h).why_not or _C.best_isa() < 2
    with fastloss.use_backend("cpp"):
        stats, _, *gradients = OPS.linear_cross_entropy(*h)
    check_gradients(h, [Result(stats, *gradients)])
    largest, eps = expected(h, torch.float64).stats[Stat.MAX], torch.finfo(dtype_of_head).eps
    torch.testing.assert_close(stats[Stat.MAX].double(), largest, rtol=2 * eps, atol=8 * eps)


def test_other_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below AVX-512 the same op runs in chunks; what no engine takes is said."""
    h = head(torch.float32, 70, 48, 201)
    assert "scale" in backend_cpp._Head(*h._replace(scale=0.0)).why_not or _C.best_isa() < 2
    monkeypatch.setattr(backend_cpp, "ISA", 0)
    assert "AVX-512" in backend_cpp._Head(*h).why_not
    with fastloss.use_backend("cpp"):
        stats, _, *gradients = OPS.linear_cross_entropy(*h)
    check(h, Result(stats, *gradients))


def test_statistics_alone(dtype: torch.dtype) -> None:
    """No gradient needed: one product. In 32 bits also by linear_row_stats."""
    h = smoothed(head(dtype, 70, 48, 201))
    with fastloss.use_backend("cpp"):
        stats = OPS.linear_cross_entropy(*h[:11], 0)[0]
        if dtype == torch.float32:
            assert torch.equal(stats, OPS.linear_row_stats(*h[:6], None, *h[7:11], 0)[0])
    check_statistics(stats, expected(h, torch.float64).stats, h)
    assert torch.equal(stats, run(h).stats)
