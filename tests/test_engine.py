"""The rows engine: every statistic is differentiable and right, whatever function of them a loss is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss import RowStats
from tolerance import check_gradient

EVERYTHING = ("entropy", "sum", "sumsq", "tempered_lse", "argmax")
N, D, V = 6, 5, 17


def problem(
    dtype: torch.dtype = torch.float64, shape: tuple[int, int, int] = (N, D, V)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d, v = shape
    x, w, b = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((n, d), (v, d), (v,)))
    y = torch.randint(0, v, (n,))
    y[1] = -100
    return x, w, b, y


PROPERTIES = (
    "target_logit", "rest_lse", "margin", "logp", "log1mp", "lse", "nll", "mean_logit", "entropy", "sum", "nll_sum",
    "sumsq", "variance", "tempered_lse", "max",
)  # fmt: skip


def independent(name: str, z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Each statistic by the textbook formula."""
    rows, logp, p = torch.arange(len(z)), z.log_softmax(-1), z.softmax(-1)
    zy = z[rows, y]
    rest = z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -torch.inf).logsumexp(-1)
    return {
        "target_logit": zy, "rest_lse": rest, "margin": zy - rest, "logp": logp[rows, y],
        "log1mp": torch.log1p(-p[rows, y]), "lse": z.logsumexp(-1), "nll": -logp[rows, y], "mean_logit": (p * z).sum(-1),
        "entropy": -(p * logp).sum(-1), "sum": z.sum(-1), "nll_sum": -logp.sum(-1), "sumsq": (z * z).sum(-1),
        "variance": z.var(-1, unbiased=False), "tempered_lse": (z / t[:, None]).logsumexp(-1), "max": z.amax(-1),
    }[name]  # fmt: skip


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PROPERTIES)
def test_statistic(name: str, dtype: torch.dtype, linear: bool) -> None:
    """Value and gradient under a random cotangent; float32 runs on the kernels."""
    x, w, b, y = problem(dtype)
    t = torch.rand(N) + 0.5
    leaves = (x, w, b) if linear else (F.linear(x, w, b).detach().requires_grad_(),)
    args = dict(stats=EVERYTHING, temperature=t)
    s = (
        fastloss.linear_row_stats(x, w, y, linear_bias=b, **args)
        if linear
        else fastloss.row_stats(leaves[0], y, **args)
    )
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    valid = y != -100
    z = F.linear(*wide) if linear else wide[0]
    want = independent(name, z, y.clamp(min=0), t.double())
    got = getattr(s, name)
    tolerance = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got[valid].double(), want[valid], **tolerance)
    cotangent = torch.randn(N, dtype=torch.float64) * valid
    mine = torch.autograd.grad((got * cotangent.to(got.dtype)).sum(), leaves)
    truth = torch.autograd.grad((want * cotangent).sum(), wide)
    for a, r in zip(mine, truth, strict=True):
        torch.testing.assert_close(a.double(), r, **tolerance)


def test_argmax_and_accuracy() -> None:
    z, y = torch.randn(50, 31), torch.randint(0, 31, (50,))
    y[::2] = z[::2].argmax(-1)
    y[5] = -100
    s = fastloss.row_stats(z, y, stats=["argmax"])
    assert torch.equal(s.argmax, torch.where(y == -100, -1, z.argmax(-1)))
    assert torch.equal(s.accuracy, (s.argmax == y).float())


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_gradcheck_and_gradgradcheck(linear: bool) -> None:
    """All statistics at once, first and second derivatives, fp64."""
    x, w, b, y = problem(shape=(3, 2, 7))
    t = torch.rand(3) + 0.5

    def f(*leaves: Tensor) -> tuple[Tensor, ...]:
        if linear:
            s = fastloss.linear_row_stats(*leaves[:2], y, linear_bias=leaves[2], stats=EVERYTHING, temperature=t)
        else:
            s = fastloss.row_stats(*leaves, y, stats=EVERYTHING, temperature=t)
        return tuple(getattr(s, n)[s.valid] for n in PROPERTIES)

    leaves = (x, w, b) if linear else (torch.randn(3, 7, dtype=torch.float64, requires_grad=True),)
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_probabilities_have_a_gradient() -> None:
    z = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    q = torch.rand(4, 9, dtype=torch.float64, requires_grad=True)

    def f(z: Tensor, q: Tensor) -> Tensor:
        s = fastloss.row_stats(z, q, stats=["sum"], column_weight=torch.arange(9.0).double())
        return s.nll + 0.3 * s.nll_sum + s.lse**2

    assert torch.autograd.gradcheck(f, (z, q)) and torch.autograd.gradgradcheck(f, (z, q))


FUNCTIONS: dict[str, tuple[Callable[[RowStats], Tensor], Callable[[Tensor, Tensor], Tensor], tuple[str, ...]]] = {
    "focal": (
        lambda s: (1 - s.logp.exp()) ** 2 * -s.logp,
        lambda z, y: (1 - _logp(z, y).exp()) ** 2 * -_logp(z, y),
        (),
    ),
    "generalised CE": (
        lambda s: -torch.expm1(0.7 * s.logp) / 0.7,
        lambda z, y: (1 - _logp(z, y).exp() ** 0.7) / 0.7,
        (),
    ),
    "unlikelihood": (lambda s: -s.log1mp, lambda z, y: -torch.log(1 - _logp(z, y).exp()), ()),
    "entropy bonus": (
        lambda s: -s.logp - 0.1 * s.entropy,
        lambda z, y: -_logp(z, y) + 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1),
        ("entropy",),
    ),
    "not separable by rows": (
        lambda s: torch.softmax(s.logp, 0) * -s.logp,
        lambda z, y: torch.softmax(_logp(z, y), 0) * -_logp(z, y),
        (),
    ),
}


def _logp(z: Tensor, y: Tensor) -> Tensor:
    return z.log_softmax(-1)[torch.arange(len(y)), y]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_function_of_the_statistics(name: str, dtype: torch.dtype) -> None:
    ours, theirs, stats = FUNCTIONS[name]
    x, w, b, y = problem(dtype)
    y = y.clamp(min=0)
    loss = fastloss.linear_row_loss(x, w, y, ours, linear_bias=b, stats=stats, reduction="sum")
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    want = theirs(F.linear(*wide), y).sum()
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(loss.double(), want, **tolerance)
    for a, r in zip(torch.autograd.grad(loss, (x, w, b)), torch.autograd.grad(want, wide), strict=True):
        torch.testing.assert_close(a.double(), r, **tolerance)
    z = F.linear(x, w, b).detach()
    torch.testing.assert_close(fastloss.row_loss(z, y, ours, stats=stats, reduction="sum").double(), want, **tolerance)


def test_ignored_rows_count_nothing() -> None:
    z, y = torch.randn(8, 11, requires_grad=True), torch.randint(0, 11, (8,))
    y[3] = -100
    for reduction, shape in (("none", (8,)), ("mean", ()), ("sum", ())):
        loss = fastloss.row_loss(z, y, lambda s: -s.logp, reduction=reduction)
        assert loss.shape == shape
        torch.testing.assert_close(loss, F.cross_entropy(z, y, reduction=reduction))
        (g,) = torch.autograd.grad(loss.sum(), z)
        assert (g[3] == 0).all()


@pytest.mark.parametrize("frozen", ["input", "weight", "none"])
def test_only_needed_gradients(frozen: str) -> None:
    x, w, b, y = problem(torch.float32)
    x.requires_grad_(frozen != "input")
    w.requires_grad_(frozen != "weight")
    b.requires_grad_(frozen == "none")
    for loss in (
        fastloss.linear_cross_entropy(x, w, y, linear_bias=b),
        fastloss.linear_row_loss(x, w, y, lambda s: -s.logp, linear_bias=b),
    ):
        for leaf in (x, w, b):
            leaf.grad = None
        loss.backward()
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, w, b)]
        F.cross_entropy(F.linear(*wide), y).backward()
        for leaf, r in zip((x, w, b), wide, strict=True):
            assert (leaf.grad is None) == (r.grad is None)
            if r.grad is not None:
                torch.testing.assert_close(leaf.grad.double(), r.grad, rtol=1e-5, atol=1e-6)


def test_weight_gradient_into_a_buffer() -> None:
    """dW is added, in float32, to what the buffer holds; linear_weight.grad stays empty."""
    x, w, _, y = problem(torch.bfloat16)
    buffer = torch.full((V, D), 2.0)
    loss = fastloss.linear_cross_entropy(x, w, y, grad_weight=buffer)
    loss.backward()
    assert w.grad is None and x.grad is not None
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
        grads.append(torch.autograd.grad(F.cross_entropy(F.linear(*leaves), y), leaves)[1])
    check_gradient(buffer - 2, *grads, torch.bfloat16)


def test_errors_say_what_was_given() -> None:
    z, y = torch.randn(3, 7), torch.randint(0, 7, (3,))
    with pytest.raises(ValueError, match="unknown statistic 'entrpy'"):
        fastloss.row_stats(z, y, stats=["entrpy"])
    with pytest.raises(ValueError, match=r"pass .entropy. in `stats`"):
        _ = fastloss.row_stats(z, y).entropy
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(4,\)"):
        fastloss.row_stats(z, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(IndexError, match="target 9 at row 1"):
        fastloss.row_stats(z, torch.tensor([1, 9, 2]))
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        fastloss.row_stats(z, y, stats=["tempered_lse"], temperature=0.0)
    with pytest.raises(ValueError, match="softcap must be > 0"):
        fastloss.row_stats(z, y, softcap=-1.0)
    with pytest.raises(TypeError, match="class ids"):
        fastloss.row_stats(z, y.bool())
    with pytest.raises(ValueError, match="one value a row"):
        fastloss.row_loss(z, y, lambda s: s.logp.sum())
    with pytest.raises(ValueError, match="max_extra_bytes must be > 0"):
        fastloss.linear_row_stats(z, torch.randn(5, 7), max_extra_bytes=-1)
