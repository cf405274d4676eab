"""A small head with sampled tokens, for the tests of all losses on log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastloss
from tolerance import check_gradient

B, T, D, V = 4, 6, 5, 13
TEMPERATURE = 0.7
LENGTHS = (6, 3, 5, 1)
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
ADVANTAGE = torch.tensor([1.3, -0.8, 0.0, -2.0], dtype=torch.float64)


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(x [B, T, D], w [V, D], target [B, T] with -100 beyond the length of each sequence)."""
    x, w = torch.randn(B, T, D, dtype=torch.float64), 0.7 * torch.randn(V, D, dtype=torch.float64)
    target = torch.randint(0, V, (B, T))
    for row, length in enumerate(LENGTHS):
        target[row, length:] = -100
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), target  # one draw for all dtypes


def plain_logp(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """The definition, logits and all."""
    p = ((x @ w.T) / TEMPERATURE).softmax(-1)
    picked = p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return picked.log()


def old_and_reference(dtype: torch.dtype = torch.float64, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Log-probabilities near those that the head of the same seed gives."""
    x, w, target = head()
    logp = plain_logp(x, w, target).detach()
    old = logp + spread * torch.randn(B, T, dtype=torch.float64)
    return old.to(dtype), (old + spread * torch.randn(B, T, dtype=torch.float64)).to(dtype)


Loss = Callable[[Tensor, Tensor], Tensor]  # (log-probabilities, mask) -> one number


def through_head(ours: Loss, oracle: Loss, dtype: torch.dtype, k: float = 32.0) -> None:
    """Value and gradients of the head: in fp64 to 1e-10, in fp32 by the tolerance rule."""
    seed = int(torch.randint(0, 2**31, ()))
    torch.manual_seed(seed)
    x, w, target = head(dtype)
    mask = target != -100
    value = ours(fastloss.token_logp(x, w, target, temperature=TEMPERATURE), mask)
    got = (value, *torch.autograd.grad(value, (x, w)))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    truth = oracle(plain_logp(*wide, target), mask)
    want = (truth, *torch.autograd.grad(truth, wide))
    assert value.isfinite() and value.dtype == dtype
    assert all(t.norm() > 0 for t in want), "the case tests nothing"
    if dtype == torch.float64:
        for a, b in zip(got, want, strict=True):
            assert (a - b).norm() <= 1e-10 * b.norm(), f"relative error {float((a - b).norm() / b.norm()):.3g}"
        return
    narrow = [t.detach().requires_grad_() for t in (x, w)]
    plain = oracle(plain_logp(*narrow, target), mask)
    error, torch_error = (abs(float(t.detach().double() - truth.detach())) for t in (value, plain))
    terms = max(1.0, abs(float(truth.detach())))  # they are of order 1 to 20 and may cancel in the value
    assert error <= 1.25 * torch_error + 16 * torch.finfo(dtype).eps * terms, (
        f"error {error:.3g}, torch {torch_error:.3g}"
    )
    for a, b, r in zip(got[1:], torch.autograd.grad(plain, narrow), want[1:], strict=True):
        check_gradient(a.reshape(1, -1), b.reshape(1, -1), r.reshape(1, -1), dtype, k)


def pack(*padded: Tensor) -> tuple[list[Tensor], Tensor]:
    """([tokens of all sequences one after the other], the sequence of each), of [B, T] and LENGTHS."""
    ids = torch.cat([torch.full((length,), row) for row, length in enumerate(LENGTHS)])
    return [torch.cat([t[row, :length] for row, length in enumerate(LENGTHS)]) for t in padded], ids


def policies(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [B, T] of tokens under three policies that are near each other."""
    logp = -3 * torch.rand(B, T, dtype=dtype) - 0.1
    return logp, logp + 0.3 * torch.randn(B, T, dtype=dtype), logp + 0.3 * torch.randn(B, T, dtype=dtype)
