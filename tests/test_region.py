"""Region statistics, their gradients on every CPU backend and instruction set, and the losses made of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastloss
import region_formulas
from fastloss import backend_cpp, losses, region_autograd
from fastloss.region_statistics import region_coefficients
from region_formulas import BCE, ENTROPY, PROBABILITIES, SHARP, SQUARED
from tolerance import check_close, check_gradient

ALL = SQUARED | BCE | ENTROPY
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
ops = torch.ops.fastloss


def labels(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Labels 0 and 1 as bytes, or soft ones."""
    hard = torch.rand(shape) < 0.3
    if kind == "bool":
        return hard
    return hard.to(dtype) if kind == "own" else torch.where(torch.rand(shape) < 0.5, hard.float(), torch.rand(shape))


def hard_regions(p: int) -> tuple[Tensor, Tensor]:
    """Regions that break what is written carelessly, and their labels."""
    x, t = torch.randn(9, p) * 3, (torch.rand(9, p) < 0.3).float()
    x[1] = torch.where(t[1] > 0, 1, -1) * torch.linspace(15, 120, p)  # right, and sure of it
    x[2] = -torch.where(t[2] > 0, 1, -1) * torch.linspace(15, 120, p)  # wrong, and sure of it
    x[3] += 1e4
    t[4] = 0
    t[5] = 1
    x[6] = -200
    x[7], t[7] = 0, 0.5
    x[8, p // 2] = -torch.inf
    t[8, p // 2] = 0
    return x, t


def check(x: Tensor, t: Tensor, mask: Tensor | None, want: int, sharpness: float = 1.0, k: float = 4.0) -> None:
    """Statistics and a random gradient of them on this dtype, against autograd in float64 and torch in the same dtype."""
    finite = x.where(x.isfinite(), torch.full_like(x, -1e3))  # the limit, where the textbook has 0 * inf
    g = torch.rand(10, len(x), dtype=torch.float64) - 0.5
    results = []
    for dtype in (torch.float64, torch.float32 if x.dtype == torch.float64 else x.dtype):
        leaf = finite.to(dtype).requires_grad_()
        wide = leaf.double() if dtype == torch.float64 else leaf.float()
        stats = region_formulas.statistics(wide, t, mask, want, sharpness)
        results.append((stats, torch.autograd.grad(stats, leaf, g.to(stats.dtype))[0]))
    (stats64, grad64), (stats_torch, grad_torch) = results
    stats = ops.region_stats(x, t, mask, want, sharpness)
    grad = ops.region_stats_backward(region_coefficients(g.to(stats.dtype)), x, t, mask, want, sharpness)
    for row, (ours, theirs, right) in enumerate(zip(stats, stats_torch, stats64, strict=True)):
        try:  # each number by itself: they differ by orders of magnitude
            check_close(ours[:, None], theirs[:, None], right[:, None], torch.float32)
        except AssertionError as error:
            raise AssertionError(f"statistic {row}: {error}") from error
    check_gradient(grad, grad_torch, grad64, x.dtype, k)


@each_dtype
@pytest.mark.parametrize("kind", ["bool", "own", "soft"])
@pytest.mark.parametrize("want", [0, ALL, SHARP | SQUARED])
def test_kernel(dtype: torch.dtype, kind: str, want: int) -> None:
    short = (3, 1) if want == 0 and kind != "soft" else (3, 5)  # several terms of one pixel may all but cancel
    for (r, p), isa in itertools.product([short, (2, 37), (2, 2051)], range(backend_cpp._C.best_isa() + 1)):
        x, t = (torch.randn(r, p) * 3).to(dtype), labels(kind, (r, p), dtype)
        before = backend_cpp.ISA
        backend_cpp.ISA = isa
        try:
            k = 16.0 if kind == "soft" else 4.0  # a t + b (1 - t) may cancel
            check(x, t, None, want, 5.0, k)
            check(x, t, torch.rand(r, p) < 0.6, want, 5.0, k)
        finally:
            backend_cpp.ISA = before


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("want", [ALL, ALL | SHARP, SQUARED | PROBABILITIES, SHARP | PROBABILITIES])
def test_hard_regions(backend: str, want: int) -> None:
    x, t = hard_regions(67)
    if want & PROBABILITIES:
        x = x.clamp(-20, 20).sigmoid()
    with fastloss.use_backend(backend):
        for dtype in DTYPES:
            check(x.to(dtype), t.to(dtype), None, want, 12.0)


@pytest.mark.parametrize("want", [0, ALL, ALL | SHARP, SQUARED | PROBABILITIES, SHARP | PROBABILITIES])
def test_float64(want: int) -> None:
    """The reference's own derivative against autograd of the textbook's formulas, to 1e-10; and once more through it."""
    x = torch.randn(4, 9, dtype=torch.float64) * 3
    x = (x.sigmoid() if want & PROBABILITIES else x).requires_grad_()
    t, mask = labels("soft", x.shape, x.dtype), torch.rand(2, 9) < 0.7
    g = torch.randn(10, 4, dtype=torch.float64)
    right = region_formulas.statistics(x, t, mask, want, 3.0)
    torch.testing.assert_close(ops.region_stats(x, t, mask, want, 3.0), right, rtol=1e-10, atol=1e-10)
    grad = ops.region_stats_backward(region_coefficients(g), x, t, mask, want, 3.0)
    torch.testing.assert_close(grad, torch.autograd.grad(right, x, g)[0], rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradgradcheck(lambda x: region_autograd.region_stats(x, t, mask, want, 3.0), x)


@each_dtype
def test_confident_errors_are_not_lost(dtype: torch.dtype) -> None:
    """One pixel of 4096 is wrong by e^-16: 1 - 2 I / (S + Y) is 0 or worse in float32, false positives are not."""
    x, t = torch.full((1, 4096), 88.0, dtype=dtype), torch.ones(1, 4096, dtype=torch.bool)
    x[0, 0], t[0, 0] = -16, False
    stats = fastloss.region_stats(x, t)
    assert abs(stats.false_positive.item() / 1.1253516e-07 - 1) < 1e-6
    assert abs(losses.dice(stats, smooth=0.0).item() / (1.1253516e-07 / 8190) - 1) < 1e-6


def test_far_logits_keep_their_digits() -> None:
    """e^-80: the product with log2(e) rounded once would be 1e-6 off."""
    x, t = torch.full((1, 100), -80.3), torch.zeros(1, 100, dtype=torch.bool)
    right = region_formulas.statistics(x.double(), t, None, 0, 1.0)[3]
    assert abs(fastloss.region_stats(x, t).false_positive.double() / right - 1) < 5e-7


def test_threads_and_repeats() -> None:
    """A region that is split among threads: the same bits whatever their number, and the accuracy of double."""
    x, t = torch.randn(2, 200_001), labels("bool", (2, 200_001), torch.float32)
    x[0] += 3
    right = region_formulas.statistics(x.double(), t, None, ALL, 1.0)
    coef, found, before = torch.rand(5, 2), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((ops.region_stats(x, t, None, ALL), ops.region_stats_backward(coef, x, t, None, ALL)))
    finally:
        torch.set_num_threads(before)
    for stats, grad in found:
        assert torch.equal(stats, found[0][0]) and torch.equal(grad, found[0][1])
    assert ((found[0][0] - right).abs() <= 3e-7 * right.abs()).all()


def test_gradient_past_the_cache() -> None:
    """More than 16 MiB of gradient is streamed; regions then start anywhere in a cache line."""
    x, t = torch.randn(5, 900_001), labels("bool", (5, 900_001), torch.float32)
    coef = torch.rand(5, 5)
    ours = ops.region_stats_backward(coef, x, t, None, BCE)
    with fastloss.use_backend("reference"):
        torch.testing.assert_close(ours, ops.region_stats_backward(coef, x, t, None, BCE), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, t, mask = torch.randn(4, 9, dtype=dtype), torch.rand(4, 9) < 0.5, torch.rand(2, 9) < 0.5
    torch.library.opcheck(ops.region_stats.default, (x, t, mask, ALL, 1.0))
    coef = torch.rand(5, 4, dtype=torch.promote_types(dtype, torch.float32))
    torch.library.opcheck(ops.region_stats_backward.default, (coef, x, t, mask, ALL, 1.0))


def test_what_kernels_read_wrongly_is_refused() -> None:
    x, t = torch.randn(4, 9), torch.rand(4, 9) < 0.5
    for bad in (
        (x, t[:2], None),
        (x, t, torch.ones(3, 9, dtype=torch.bool)),
        (x, t, torch.ones(2, 8, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="must be"):
            ops.region_stats(*bad)
    with pytest.raises(TypeError, match="mask must be torch"):
        ops.region_stats(x, t, torch.ones(4, 9))
    with pytest.raises(ValueError, match="are those of logits"):
        ops.region_stats(x, t, None, PROBABILITIES | BCE)
    with pytest.raises(ValueError, match="coef must have shape"):
        ops.region_stats_backward(torch.rand(5, 3), x, t, None)
    with fastloss.use_backend("cpp"), pytest.raises(fastloss.BackendError, match="contiguous regions"):
        ops.region_stats(x.T, t.T, None)


def test_softmax_does_not_read_pixels_that_do_not_count() -> None:
    x, t = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[:, 0] = False
    x[:, :, 0] = torch.nan
    x.requires_grad_()
    got = fastloss.region_loss(x, t, losses.dice, mask=mask, activation="softmax")
    want = fastloss.region_loss(x[:, :, 1:], t[:, 1:], losses.dice, activation="softmax")
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got, x)
    assert gradient.isfinite().all() and (gradient[:, :, 0] == 0).all()
