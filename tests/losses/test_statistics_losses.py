"""Row losses that need more than the margin: entropies, sums, the largest score, a second temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
import row_loss_checks as checks
from fastloss import losses
from row_loss_checks import IGNORED, Case, N, problem, target_probability

LAMBDAS = torch.linspace(0.3, 2.0, N)
NEAR_ONE = 64  # the gradient is q / (1 - V^(1 - q)) = 5 times the difference of two softmaxes that are nearly equal


def entropy(z: Tensor) -> Tensor:
    return torch.special.entr(z.softmax(-1)).sum(-1)


def nll(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def tsallis(q: float, normalize: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    def formula(z: Tensor, y: Tensor) -> Tensor:
        value = (1 - (z.softmax(-1) ** q).sum(-1)) / (q - 1)
        return value / ((1 - z.shape[-1] ** (1 - q)) / (q - 1)) if normalize else value

    return formula


def ldr(z: Tensor, y: Tensor, lam: Tensor | float, margin: float) -> Tensor:
    """As published: the mean over all columns, the target's own among them."""
    own = torch.as_tensor(lam, dtype=z.dtype).expand(len(y))
    away = 1 - F.one_hot(y, z.shape[-1]).to(z.dtype)
    return own * torch.log(torch.exp((margin * away + z - z.gather(1, y[:, None])) / own[:, None]).mean(1))


def aldr(z: Tensor, y: Tensor) -> Tensor:
    moved = LAMBDAS.to(z.dtype) - 1.5
    return ldr(z, y, LAMBDAS.to(z.dtype), 0.7) - 2 * math.log(z.shape[-1]) / (2 * 1.5) * moved**2


def correctness(temperature: Tensor | float) -> Callable[[Tensor, Tensor], Tensor]:
    def formula(z: Tensor, y: Tensor) -> Tensor:
        t = torch.as_tensor(temperature, dtype=z.dtype).reshape(-1, 1)
        return ((z.argmax(-1) == y).to(z.dtype) - (z / t).softmax(-1).amax(-1)) ** 2

    return formula


CASES = [
    Case("NCE", losses.normalized_cross_entropy, lambda z, y: nll(z, y) / -z.log_softmax(-1).sum(-1)),
    Case("lse penalty", losses.lse_penalty, lambda z, y: 1e-4 * z.logsumexp(-1) ** 2),
    Case("router z-loss", losses.router_z_loss, lambda z, y: 1e-3 * z.logsumexp(-1) ** 2),
    Case("entropy bonus", losses.entropy_bonus, lambda z, y: -0.01 * entropy(z)),
    Case("confidence penalty", losses.confidence_penalty, lambda z, y: nll(z, y) - 0.1 * entropy(z)),
    Case("max entropy", losses.max_entropy, lambda z, y: math.log(z.shape[-1]) - entropy(z)),
    Case("Tsallis 2", losses.tsallis_entropy, tsallis(2)),
    Case("Tsallis 0.5", losses.tsallis_entropy, tsallis(0.5), {"q": 0.5}),
    Case("Tsallis 1.1", losses.tsallis_entropy, tsallis(1.1, True), {"q": 1.1, "normalize": True}, k=NEAR_ONE),
    Case(
        "Tsallis 1",
        losses.tsallis_entropy,
        lambda z, y: entropy(z) / math.log(max(z.shape[-1], 2)),
        {"q": 1, "normalize": True},
    ),
    Case("DynMoLE", losses.dynmole_entropy, lambda z, y: 0.01 * tsallis(1.1, True)(z, y), k=NEAR_ONE),
    Case("Brier", losses.brier, lambda z, y: ((z.softmax(-1) - F.one_hot(y, z.shape[-1])) ** 2).sum(-1)),
    Case("LDR-KL", losses.ldr_kl, lambda z, y: ldr(z, y, 1.0, 2.0)),
    Case("LDR-KL 0.5", losses.ldr_kl, lambda z, y: ldr(z, y, 0.5, 0.3), {"lam": 0.5, "margin": 0.3}),
    Case("LDR-KL 10", losses.ldr_kl, lambda z, y: ldr(z, y, 10.0, 0.1), {"lam": 10.0, "margin": 0.1}),
    Case("ALDR-KL", losses.aldr_kl, aldr, {"lam": LAMBDAS.double(), "initial": 1.5, "alpha": 2.0, "margin": 0.7}),
    Case("CA", losses.calibration, correctness(1.0)),
    Case("CA 2", losses.calibration, correctness(2.0), {"temperature": 2.0}),
    Case("CA, one a row", losses.calibration, correctness(LAMBDAS.double()), {"temperature": LAMBDAS.double()}),
    Case(
        "pass@n, one a row",
        losses.pass_at_n,
        lambda z, y: -torch.log1p(-((1 - target_probability(z, y)) ** torch.arange(1, N + 1))),
        {"n": torch.arange(1.0, N + 1, dtype=torch.float64)},
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@every_case
def test_float64(case: Case) -> None:
    checks.check_float64(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_case
def test_kernels(case: Case, dtype: torch.dtype) -> None:
    checks.check_kernels(case, dtype)


@every_case
def test_linear_head(case: Case) -> None:
    checks.check_linear_head(case)


@every_case
def test_rows_that_do_not_count(case: Case) -> None:
    checks.check_ignored_rows(case)
    checks.check_only_class(case)


@every_case
def test_extreme_scores_stay_finite(case: Case) -> None:
    z = torch.zeros(N, 2)
    z[:, 0] = torch.tensor([-120.0, -90, -30, -5, 0, 5, 30, 90, 120])
    for offset in (0.0, 1e4, -1e4):
        leaf = (z + offset).requires_grad_()
        rows = fastloss.row_loss(
            leaf, torch.zeros(N, dtype=torch.int64), case.loss, reduction="none", **case.parameters
        )
        (gradient,) = torch.autograd.grad(rows.sum(), leaf)
        assert rows.isfinite().all() and gradient.isfinite().all()
        if offset and "lse" not in case.formula.__code__.co_names and "logsumexp" not in case.formula.__code__.co_names:
            plain = fastloss.row_loss(
                z, torch.zeros(N, dtype=torch.int64), case.loss, reduction="none", **case.parameters
            )
            torch.testing.assert_close(rows, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "parameters", "formula"),
    [
        (losses.brier, {}, lambda p: 2 * (1 - p) ** 2),
        (losses.ldr_kl, {}, lambda p: mpmath.log((1 + mpmath.exp(2) * (1 - p) / p) / 2)),
        (losses.calibration, {}, lambda p: (1 - p) ** 2),
        (losses.tsallis_entropy, {}, lambda p: 1 - p**2 - (1 - p) ** 2),
    ],
    ids=["Brier", "LDR-KL", "CA", "Tsallis"],
)
def test_confident_rows_keep_their_digits(loss: Callable[..., Tensor], parameters: Any, formula: Any) -> None:
    """Float32, p_y down to e^-30 and up to 1 - e^-30, against 60 digits: nothing is 1 minus a probability."""
    margins = [-30.0, -8.0, -0.5, 0.5, 8.0, 16.0, 20.0, 30.0]
    z = torch.tensor([[d, 0.0] for d in margins], requires_grad=True)
    rows = fastloss.row_loss(z, torch.zeros(len(margins), dtype=torch.int64), loss, reduction="none", **parameters)
    (gradient,) = torch.autograd.grad(rows.sum(), z)
    with mpmath.workdps(60):

        def phi(d: Any) -> Any:
            return formula(1 / (1 + mpmath.exp(-d)))

        values = torch.tensor([float(phi(mpmath.mpf(d))) for d in margins], dtype=torch.float64)
        slopes = torch.tensor([float(mpmath.diff(phi, mpmath.mpf(d))) for d in margins], dtype=torch.float64)
    up = torch.tensor(margins) > 0
    keep = (
        up if loss is losses.calibration else torch.ones_like(up)
    )  # a wrong row's 1 - p_max is the kernel's difference
    torch.testing.assert_close(rows.detach().double()[keep], values[keep], rtol=1e-5, atol=0 if keep.all() else 1e-12)
    torch.testing.assert_close(gradient[keep, 0].double(), slopes[keep], rtol=2e-5, atol=0)


def test_statistics_at_another_temperature_are_refused() -> None:
    z, y = problem(torch.float32)
    s = fastloss.row_stats(z, y, stats=("tempered_lse", "argmax"), temperature=2.0)
    for call in (
        lambda: losses.ldr_kl(s, lam=1.0),
        lambda: losses.aldr_kl(s, lam=LAMBDAS),
        lambda: losses.brier(s),
        lambda: losses.tsallis_entropy(s, q=2.0),
        lambda: losses.calibration(s, temperature=1.0),
    ):
        with pytest.raises(ValueError, match="another temperature"):
            call()
    with pytest.raises(ValueError, match="without a temperature"):
        losses.brier(fastloss.row_stats(z, y))
    with pytest.raises(TypeError, match="aldr_kl needs lam"):
        fastloss.row_loss(z, y, losses.aldr_kl)
    with pytest.raises(ValueError, match="q must be > 0, got -1"):
        fastloss.row_loss(z, y, losses.tsallis_entropy, q=-1)


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (losses.max_entropy, lambda z: math.log(z.shape[-1]) - entropy(z)),
        (losses.tsallis_entropy, lambda z: tsallis(2)(z, z)),
        (losses.dynmole_entropy, lambda z: 0.01 * tsallis(1.1, True)(z, z)),
        (losses.router_z_loss, lambda z: 1e-3 * z.logsumexp(-1) ** 2),
    ],
)
def test_without_a_target(loss: Callable[..., Tensor], formula: Callable[[Tensor], Tensor]) -> None:
    z = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    ours, truth = fastloss.row_loss(z, None, loss), formula(z).mean()
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (ours, truth)), rtol=1e-10, atol=1e-12)


def test_adaptive_lambda() -> None:
    """Two steps against the formula on a materialised softmax, at the sample's own temperature."""
    z, y = problem(torch.float64)
    index = torch.arange(N) * 2
    adaptive = losses.AdaptiveLambda(2 * N, initial=1.5, alpha=2.0)
    lam = torch.full((N,), 1.5, dtype=torch.float64)
    for _ in range(2):
        old = adaptive(index)
        adaptive.update(index, fastloss.row_stats(z / old[:, None], stats="entropy").entropy, classes=z.shape[1])
        p = (z / lam[:, None]).softmax(-1)
        divergence = (p * torch.log(z.shape[1] * p)).sum(-1)
        lam = 1.5 - 1.5 * divergence / (2 * math.log(z.shape[1]))
        torch.testing.assert_close(adaptive(index).double(), lam, rtol=1e-6, atol=1e-7)
        lam = adaptive(index).double()
    assert (adaptive.lam[1::2] == 1.5).all() and "lam" in adaptive.state_dict()
    loss = fastloss.row_loss(z, y, losses.aldr_kl, lam=adaptive(index), initial=1.5, alpha=2.0, reduction="none")
    assert loss[IGNORED] == 0 and loss.isfinite().all()
    certain = losses.AdaptiveLambda(1)
    certain.update(torch.tensor([0]), torch.tensor([0.0]), classes=5)
    assert certain.lam.item() == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="one entropy a sample"):
        certain.update(torch.tensor([0]), torch.zeros(2), classes=5)
    with pytest.raises(ValueError, match="samples must be > 0, got 0"):
        losses.AdaptiveLambda(0)


def test_normalisations() -> None:
    z = torch.randn(4, 7, dtype=torch.float64) * 30
    torch.testing.assert_close(losses.l1_normalize(z), z * 7 / z.abs().sum(1, keepdim=True))
    soft = torch.nn.functional.softplus(z, threshold=1000)
    torch.testing.assert_close(losses.softplus_normalize(z), soft * 7 / soft.sum(1, keepdim=True))
    assert torch.equal(losses.l1_normalize(torch.zeros(2, 3)), torch.zeros(2, 3))
    low = torch.tensor([[-300.0, -300.0]], requires_grad=True)
    torch.testing.assert_close(losses.softplus_normalize(low), torch.ones(1, 2))
    small = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.l1_normalize, small)
    assert torch.autograd.gradcheck(losses.softplus_normalize, small)
