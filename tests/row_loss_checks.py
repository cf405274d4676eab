"""What every row loss is checked for, given one independent formula: on a materialised softmax, in float64, by autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from tolerance import check_close, check_gradient

Formula = Callable[[Tensor, Tensor], Tensor]  # logits [N, V] of any dtype and class ids [N] -> one value a row
N, D, V, IGNORED = 9, 6, 13, 3


@dataclass(frozen=True)
class Case:
    """A loss, parameters for it, and the formula that it shall equal."""

    name: str
    loss: Callable[..., Tensor]
    formula: Formula
    parameters: dict[str, Any] = field(default_factory=dict)
    k: float = 16  # float32: rounding units of a row's scale; more where the loss is a small difference


def target_probability(z: Tensor, y: Tensor) -> Tensor:
    return z.softmax(-1)[torch.arange(len(y)), y]


def problem(dtype: torch.dtype, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which one is ignored, some are the largest column and some are not."""
    z, y = torch.randn(N, V) * scale, torch.randint(0, V, (N,))
    y[::2] = z[::2].argmax(-1)
    y[IGNORED] = -100
    return z.to(dtype), y


def _expected(case: Case, z: Tensor, y: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    leaf = z.detach().clone().requires_grad_()
    wide = leaf if leaf.dtype == torch.float64 else leaf.float()
    rows = torch.where(y != -100, case.formula(wide, y.clamp(min=0)), 0.0)
    return rows.detach(), torch.autograd.grad((rows * cotangent.to(rows.dtype)).sum(), leaf)[0]


def _ours(case: Case, z: Tensor, y: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    leaf = z.detach().clone().requires_grad_()
    rows = fastloss.row_loss(leaf, y, case.loss, reduction="none", **case.parameters)
    return rows.detach(), torch.autograd.grad((rows * cotangent.to(rows.dtype)).sum(), leaf)[0]


def check_float64(case: Case) -> None:
    """Value and gradient to 1e-10 of each row's largest."""
    z, y = problem(torch.float64)
    cotangent = torch.randn(N, dtype=torch.float64)
    for ours, truth in zip(_ours(case, z, y, cotangent), _expected(case, z, y, cotangent), strict=True):
        scale = truth.abs().reshape(N, -1).amax(-1).clamp(min=1e-30)
        error = (ours - truth).abs().reshape(N, -1).amax(-1)
        assert (error <= 1e-10 * scale).all(), f"{case.name}: relative errors {(error / scale).tolist()}"


def check_kernels(case: Case, dtype: torch.dtype) -> None:
    """Float32 or bfloat16 logits on the kernels, as accurate as the formula in float32."""
    z, y = problem(dtype)
    cotangent = torch.randn(N)
    ours = _ours(case, z, y, cotangent)
    theirs = _expected(case, z, y, cotangent)
    truth = _expected(case, z.double(), y, cotangent)
    check_close(ours[0], theirs[0], truth[0], torch.float32, k=case.k)
    check_gradient(ours[1], theirs[1], truth[1], dtype, k=case.k if dtype == torch.float32 else 4)


def check_linear_head(case: Case) -> None:
    """On a linear head, in both modes, the same as on its logits; so is the module."""
    w = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    y = problem(torch.float64)[1]
    parameters = case.parameters
    whole = fastloss.row_loss(F.linear(x, w), y, case.loss, **parameters)
    truth = torch.autograd.grad(whole, (x, w))
    module = fastloss.nn.LinearRowLoss(case.loss, **parameters)
    modes = [lambda: module(x, w, y)]
    for separable in (False, True) if not any(isinstance(p, Tensor) for p in parameters.values()) else (False,):
        modes.append(
            lambda s=separable: fastloss.linear_row_loss(x, w, y, case.loss, separable=s, **parameters)  # type: ignore[misc]
        )
    for mode in modes:
        value = mode()
        torch.testing.assert_close(value, whole, rtol=1e-10, atol=1e-12)
        for ours, expected in zip(torch.autograd.grad(value, (x, w)), truth, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(fastloss.nn.RowLoss(case.loss, **parameters)(F.linear(x, w), y), whole)


def check_ignored_rows(case: Case) -> None:
    """The loss itself, not only the reduction, is 0 on ignored rows; what stands in them is not read."""
    z, y = problem(torch.float32)
    z[IGNORED, 2], z[IGNORED, 4] = torch.nan, torch.inf
    z.requires_grad_()
    own, engine = fastloss.losses.catalogue.split_arguments(case.loss, case.parameters)
    rows = case.loss(fastloss.row_stats(z, y, **engine), **own)
    assert rows[IGNORED] == 0 and rows.isfinite().all()
    (gradient,) = torch.autograd.grad(rows.sum(), z)
    assert (gradient[IGNORED] == 0).all() and gradient.isfinite().all()


def check_only_class(case: Case) -> None:
    """V = 1, and all other scores -inf: a number (or inf, where that is the loss of p = 1), and a finite gradient."""
    for width in (1, 5):
        z = torch.full((N, width), -torch.inf)
        y = torch.zeros(N, dtype=torch.int64)
        z[:, 0] = torch.linspace(-3, 3, N)
        z.requires_grad_()
        rows = fastloss.row_loss(z, y, case.loss, reduction="none", **case.parameters)
        assert not rows.isnan().any()
        if width == 1:
            expected = case.formula(z.detach().double(), y).nan_to_num(nan=0.0, posinf=torch.inf)  # 0 / 0 is 0
            torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(rows.sum(), z)
        assert gradient.isfinite().all(), f"{case.name}: {gradient}"
