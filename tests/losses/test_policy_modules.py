"""The modules of the policy losses, and what they say to mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastloss
from fastloss import Sequences, losses, nn
from token_problem import ADVANTAGE, MASK, B, T, policies


@pytest.mark.parametrize("name", [n for n in nn.__all__ if hasattr(getattr(nn, n), "named_loss")])
def test_modules_are_their_functions(name: str) -> None:
    module = getattr(nn, name)
    if module.named_loss is None or module is nn.KTOLoss or issubclass(module, nn.PreferenceLoss):
        return
    logp, old, _ = policies()
    constants = (old,) if "old_logp" in module.named_loss.__code__.co_varnames else ()
    given = module(aggregation="seq-sum")
    want = module.named_loss(logp, *constants, ADVANTAGE, mask=MASK, aggregation="seq-sum")
    assert torch.equal(given(logp, *constants, ADVANTAGE, mask=MASK), want)
    assert repr(given) == f"{name}(aggregation='seq-sum')"
    generic = nn.PolicyLoss(module.named_loss, aggregation="seq-sum")
    assert torch.equal(generic(logp, *constants, ADVANTAGE, mask=MASK), want)
    with pytest.raises(TypeError, match="takes no 'clip'"):
        module(clip=0.2)


def test_linear_module() -> None:
    """token_logp, the mask, the entropy and the loss in one."""
    x, w, bias = torch.randn(B, T, 8, requires_grad=True), torch.randn(50, 8), torch.randn(50)
    ids = torch.randint(0, 50, (B, T))
    ids[0, 4:] = -100
    old = torch.full((B, T), -4.0)
    module = nn.LinearPolicyLoss(nn.GRPOLoss(), temperature=0.8, shift=True, entropy_weight=0.01)
    logp, entropy = fastloss.token_logp(x, w, ids, linear_bias=bias, temperature=0.8, shift=True, entropy=True)
    mask = fastloss.token_mask(ids, shift=True)
    assert mask.sum() == B * (T - 1) - 2
    want = losses.grpo(logp, old, ADVANTAGE, mask=mask) + losses.token_entropy_bonus(entropy, 0.01, mask=mask)
    assert torch.equal(module(x, w, ids, old, ADVANTAGE, linear_bias=bias), want)
    mask[2] = False
    want = losses.grpo(logp, old, ADVANTAGE, mask=mask) + losses.token_entropy_bonus(entropy, 0.01, mask=mask)
    some = torch.ones(B, T)
    some[2] = 0
    assert torch.equal(module(x, w, ids, old, ADVANTAGE, linear_bias=bias, mask=some), want)
    assert torch.equal(module(x, w, ids, old, ADVANTAGE, linear_bias=bias, mask=Sequences(some > 0)), want)
    assert "temperature=0.8, entropy_weight=0.01" in repr(module)


A, L, OLD = ADVANTAGE, torch.zeros(B, T), torch.zeros(B, T)
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "aggregation": (lambda: losses.grpo(L, OLD, A, aggregation="mean"), ValueError, "token-mean"),
    "advantage": (lambda: losses.grpo(L, OLD, A[:3]), ValueError, r"\(4,\), or a token, \(4, 6\), got \(3,\)"),
    "old": (lambda: losses.grpo(L, OLD[:, :5], A), ValueError, r"\(4, 6\), got \(4, 5\)"),
    "mask": (lambda: losses.grpo(L, OLD, A, mask=MASK[:2]), ValueError, r"got \(2, 6\)"),
    "integers": (lambda: losses.grpo(L.long(), OLD, A), TypeError, "torch.int64"),
    "clip": (lambda: losses.ppo_clip(L, OLD, A, clip_low=-0.1), ValueError, "clip_low must be >= 0, got -0.1"),
    "dual": (lambda: losses.grpo(L, OLD, A, dual_clip=0.5), ValueError, "dual_clip"),
    "kl": (lambda: losses.grpo(L, OLD, A, reference_logp=OLD, kl="k4"), ValueError, "'k4'"),
    "rec": (lambda: losses.rec(L, OLD, A, clip_mode="both"), ValueError, "'both'"),
    "sapo": (lambda: losses.sapo(L, OLD, A, tau_positive=0.0), ValueError, "tau_positive"),
    "groups": (lambda: losses.group_relative(A, 3), ValueError, "4 rewards do not fall into groups of 3"),
    "group ids": (lambda: losses.group_relative(A, A), ValueError, "integer"),
    "baseline": (lambda: losses.opmd_advantage(A, 2, baseline="max"), ValueError, "'max'"),
    "denominator": (lambda: losses.aggregate(L, None, "seq-sum", denominator=2.0), ValueError, "divides by nothing"),
    "no loss": (lambda: nn.PolicyLoss(), TypeError, "needs a loss"),
    "two losses": (lambda: nn.GRPOLoss(losses.rec), TypeError, "has its loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    call_it, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        call_it()
