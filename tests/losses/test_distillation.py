"""Distillation losses against independent formulas in float64, values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss import losses

N, V = 6, 13


def rows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(N, V, dtype=torch.float64, generator=generator) * 4
    t = torch.randn(N, V, dtype=torch.float64, generator=generator) * 3
    y = torch.randint(0, V, (N,), generator=generator)
    return z.requires_grad_(), t, y


def agree(ours: Tensor, want: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-12)
    w = torch.randn_like(ours)
    got = torch.autograd.grad((ours * w).sum(), inputs)
    true = torch.autograd.grad((want * w).sum(), inputs)
    for a, b in zip(got, true, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def mixed(p: Tensor, q: Tensor, a: float, b: float, beta: float) -> Tensor:
    m = beta * q + (1 - beta) * p
    return a * divergence(q, m) + b * divergence(p, m)


T = 2.0
CASES: dict[str, tuple[Callable[..., Tensor], dict[str, Any], Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]] = {
    "forward_kl": (losses.forward_kl, {"temperature": T}, lambda p, q, z, t: T * T * divergence(q, p)),
    "reverse_kl": (losses.reverse_kl, {"temperature": T}, lambda p, q, z, t: T * T * divergence(p, q)),
    "symmetric_kl": (
        losses.symmetric_kl,
        {"temperature": T, "weight": 0.3},
        lambda p, q, z, t: T * T * (0.3 * divergence(q, p) + 0.7 * divergence(p, q)),
    ),
    "jensen_shannon": (
        losses.jensen_shannon,
        {"temperature": T, "beta": 0.2},
        lambda p, q, z, t: T * T * mixed(p, q, 0.2, 0.8, 0.2),
    ),
    "skewed_kl": (losses.skewed_kl, {"temperature": T}, lambda p, q, z, t: T * T * mixed(p, q, 1, 0, 0.1)),
    "skewed_reverse_kl": (
        losses.skewed_reverse_kl,
        {"temperature": T},
        lambda p, q, z, t: T * T * divergence(p, 0.1 * p + 0.9 * q),
    ),
    "total_variation": (
        losses.total_variation,
        {"temperature": T},
        lambda p, q, z, t: torch.maximum(p - q, torch.zeros_like(p)).sum(-1),
    ),
    "log_cosh": (  # BinaryKLNorm as its paper writes it: KL of a fair coin and a logistic one, both sides
        losses.log_cosh,
        {"temperature": T},
        lambda p, q, z, t: (
            -T * T * (F.logsigmoid((z - t) / T) / 2 + F.logsigmoid((t - z) / T) / 2 + math.log(2)).sum(-1)
        ),
    ),
    "teacher_cross_entropy": (
        losses.teacher_cross_entropy,
        {"temperature": T},
        lambda p, q, z, t: -(q * p.log()).sum(-1),
    ),
    "binary_distillation": (
        losses.binary_distillation,
        {"temperature": T},
        lambda p, q, z, t: F.binary_cross_entropy_with_logits(z / T, (t / T).sigmoid(), reduction="none").sum(-1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    z, t, _ = rows()
    loss, arguments, formula = CASES[name]
    want = formula((z / T).softmax(-1), (t / T).softmax(-1), z, t)
    agree(fastloss.row_loss(z, None, loss, teacher=t, reduction="none", **arguments), want, (z,))
    module = fastloss.nn.RowLoss(loss, **arguments)
    torch.testing.assert_close(module(z, teacher=t), want.mean())


def test_mean_teacher_cross_entropy() -> None:
    z, t, _ = rows()
    p, q = z.softmax(-1), t.softmax(-1)
    want = -0.7 * (q * p.log()).sum(-1) - 0.3 * (p * q.log()).sum(-1)
    loss = losses.mean_teacher_cross_entropy
    agree(fastloss.row_loss(z, None, loss, teacher=t, alpha=0.3, reduction="none"), want, (z,))


def test_knowledge_distillation_shares_one_pass_with_cross_entropy() -> None:
    z, t, y = rows()
    y[2] = -100
    hard = F.cross_entropy(z, y, reduction="none")
    soft = F.kl_div(F.log_softmax(z / 3, -1), F.log_softmax(t / 3, -1), log_target=True, reduction="none").sum(-1)
    want = torch.where(y == -100, 0.0, 0.4 * hard + 0.6 * 9 * soft)
    loss = losses.knowledge_distillation
    agree(
        fastloss.row_loss(z, y, loss, teacher=t, alpha=0.6, temperature=3.0, reduction="none"),
        want,
        (z,),
    )
    mean = fastloss.row_loss(z, y, loss, teacher=t, alpha=0.6, temperature=3.0)
    torch.testing.assert_close(mean, want.sum() / (N - 1))


@pytest.mark.parametrize("tail", [True, False])
def test_sparse_teacher(tail: bool) -> None:
    z, t, _ = rows()
    q, ids = t.softmax(-1).topk(4, -1)
    p = z.softmax(-1)
    want = (q * (q / p.gather(1, ids)).log()).sum(-1)
    if tail:
        left = 1 - q.sum(-1)
        rest = 1 - p.gather(1, ids).sum(-1)
        want = want + left * (left / rest).log()
    loss = losses.sparse_forward_kl
    agree(
        fastloss.row_loss(z, None, loss, listed=ids, probabilities=q, tail=tail, reduction="none"),
        want,
        (z,),
    )
    everything, all_ids = t.softmax(-1).sort(-1, descending=True)
    full = fastloss.row_loss(z, None, loss, listed=all_ids, probabilities=everything, tail=tail, reduction="none")
    torch.testing.assert_close(full, divergence(t.softmax(-1), p), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, V])
def test_plackett_luce(k: int) -> None:
    z, t, y = rows()
    ids, weights = losses.plackett_luce_order(t, y, k, temperature=4.0)
    ours = fastloss.row_loss(z, y, losses.plackett_luce, listed=ids, weights=weights, reduction="none")
    terms = []
    for i in range(N):  # as the paper writes it, one choice after the other
        left = [int(y[i]), *(j for j in t[i].argsort(descending=True).tolist() if j != int(y[i]))]
        alpha, total = (t[i] / 4).softmax(-1), z.new_zeros(())
        for _ in range(k):
            total = total + alpha[left[0]] * (z[i, left].logsumexp(-1) - z[i, left[0]])
            left = left[1:]
        terms.append(total)
    agree(ours, torch.stack(terms), (z,))
    with pytest.raises(ValueError, match="k must be"):
        losses.plackett_luce_order(t, y, V + 1)


def test_hl_gauss_and_readout() -> None:
    z, _, _ = rows()
    values = torch.linspace(-12, 12, N, dtype=torch.float64)
    edges = torch.linspace(-10, 10, V + 1, dtype=torch.float64)
    cdf = torch.special.ndtr((edges - values.clamp(-10, 10)[:, None]) / 1.2)
    q = cdf.diff() / (cdf[:, -1:] - cdf[:, :1])
    ours = fastloss.row_loss(z, None, losses.hl_gauss, values=values, sigma=1.2, reduction="none")
    agree(ours, -(q * F.log_softmax(z, -1)).sum(-1), (z,))
    centres = losses.bin_centres(V, -10.0, 10.0, like=z)
    value = fastloss.row_loss(z, None, losses.bin_readout, teacher=centres, reduction="none")
    agree(value, z.softmax(-1) @ ((edges[1:] + edges[:-1]) / 2), (z,))


def test_two_hot() -> None:
    z, _, _ = rows()
    values = torch.tensor([-12.0, -9.5, -3.3, 0.0, 4.4, 10.0], dtype=torch.float64)
    columns, weight = losses.two_hot_columns(values, V, -10.0, 10.0)
    centres = losses.bin_centres(V, -10.0, 10.0, like=z)
    expected = weight * centres[columns[:, 0]] + (1 - weight) * centres[columns[:, 1]]
    torch.testing.assert_close(expected, values.clamp(float(centres[0]), float(centres[-1])))
    q = torch.zeros_like(z.detach()).scatter_add(1, columns, torch.stack((weight, 1 - weight), -1))
    ours = fastloss.row_loss(z, None, losses.two_hot, columns=columns, weight=weight, reduction="none")
    agree(ours, -(q * F.log_softmax(z, -1)).sum(-1), (z,))


@pytest.mark.parametrize("name", CASES)
def test_far_apart_and_equal_rows_are_finite(name: str) -> None:
    """Margins of 120 in float32, and a teacher that is the student: no NaN, nothing negative, gradient exactly 0 at equality."""
    loss, arguments, _ = CASES[name]
    z = torch.zeros(3, V)
    z[0, 0], z[1, 0], z[2, 1] = 240.0, -240.0, 5.0
    t = torch.stack((-z[0], -z[1], z[2]))
    z.requires_grad_()
    value = fastloss.row_loss(z, None, loss, teacher=t, reduction="none", **arguments)
    (g,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all() and g.isfinite().all()
    if name not in ("teacher_cross_entropy", "binary_distillation"):
        assert (value >= 0).all() and value[2] <= 1e-6 and g[2].abs().max() <= 1e-6
