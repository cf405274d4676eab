"""Policy losses on the log-probabilities of sampled tokens: policy gradient, PPO and its group-relative relatives.

All take `logp` (of the policy that is trained; `fastloss.token_logp`), most take `old_logp` (of the policy that sampled,
a constant), and an `advantage` of each sequence or of each token, a constant too (losses/advantages.py). `mask` says
which tokens count: a tensor of their shape, or `Sequences` for a packed batch; a token that does not count adds exactly
nothing, whatever its numbers are. Losses are at least float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..segments import Sequences, sequences
from . import catalogue
from .aggregation import LOG_RATIO_LIMIT, aggregate, log_ratio
from .kl import check_estimator, kl_penalty

REC_PAPER = (
    "Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm: Demystifying Some Myths About GRPO and Its Friends"
)
TRINITY = "modelscope/Trinity-RFT trinity/algorithm/policy_loss_fn/{}_policy_loss.py"
UNCLAMPED = "log-ratios are not clamped there and overflow at 88 in float32; here they are, at +-20"


class Operands(NamedTuple):
    """Numbers of each token, 0 where it does not count; all but `logp` are constants."""

    sequences: Sequences
    logp: Tensor
    old_logp: Tensor
    advantage: Tensor


def operands(logp: Tensor, old_logp: Tensor | None, advantage: Tensor, mask: Tensor | Sequences | None) -> Operands:
    """What all policy losses start from, checked."""
    s = sequences(mask, logp)
    logp = s.keep(logp)
    old = logp.detach() if old_logp is None else s.keep(old_logp).detach()
    return Operands(s, logp, old, s.keep(s.spread(advantage)).detach().to(logp.dtype))


def check_range(**limits: float) -> None:
    """Raise ValueError for a clipping range that is negative."""
    for name, value in limits.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")


@catalogue.entry(
    formula="-A l", gradient="-A", source="Williams, REINFORCE (1992); " + REC_PAPER + " (group-relative: A = r - mean)"
)
def policy_gradient(
    logp: Tensor, advantage: Tensor, *, mask: Tensor | Sequences | None = None, aggregation: str = "token-mean"
) -> Tensor:
    """-advantage * logp: REINFORCE; with `group_relative(rewards, groups, scale=False)` the group-relative one."""
    o = operands(logp, None, advantage, mask)
    return aggregate(-o.advantage * o.logp, o.sequences, aggregation)


@catalogue.entry(
    formula="-A l / (1 + tau)", gradient="-A / (1 + tau)", source=REC_PAPER + "; " + TRINITY.format("opmd"),
    published="old log-probabilities are taken and not used there; here they are not taken",
)  # fmt: skip
def opmd(
    logp: Tensor, advantage: Tensor, *, mask: Tensor | Sequences | None = None, tau: float = 1.0,
    aggregation: str = "token-mean",
) -> Tensor:  # fmt: skip
    """-advantage * logp / (1 + tau), with `opmd_advantage`: online policy mirror descent.

    Raises ValueError for tau <= -1.
    """
    if not tau > -1:
        raise ValueError(f"tau must be > -1, got {tau}")
    return policy_gradient(logp, advantage, mask=mask, aggregation=aggregation) / (1.0 + tau)


@catalogue.entry(
    formula="-A l, A = r - (mean - 0.1)", gradient="-A",
    source="Arnal et al., Asymmetric REINFORCE for off-Policy Reinforcement Learning (2025); " + REC_PAPER,
)  # fmt: skip
def asymre(
    logp: Tensor, advantage: Tensor, *, mask: Tensor | Sequences | None = None, aggregation: str = "token-mean"
) -> Tensor:
    """-advantage * logp, with `asymre_advantage`: REINFORCE whose baseline is shifted below the mean."""
    return policy_gradient(logp, advantage, mask=mask, aggregation=aggregation)


@catalogue.entry(
    formula="max(-A rho, -A clip(rho, 1 - low, 1 + high)), rho = e^clamp(l - old, +-20); with dual_clip c: min(., -A c) if A < 0",
    gradient="-A rho where the first branch holds and |l - old| < 20, else 0",
    source="Schulman et al., Proximal Policy Optimization Algorithms (2017); Ye et al. 2020 (dual clip); "
    + TRINITY.format("ppo"),
)
def ppo_clip(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | Sequences | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token-mean",
) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), rho = e^(logp - old_logp) clamped at e^+-20.

    dual_clip = c > 1: at most -A c where A < 0, so that a token whose probability rose far gives no huge gradient.
    """
    o = operands(logp, old_logp, advantage, mask)
    tokens = _clipped(log_ratio(o.logp, o.old_logp), o.advantage, clip_low, clip_high, dual_clip)
    return aggregate(tokens, o.sequences, aggregation)


def _clipped(x: Tensor, advantage: Tensor, low: float, high: float, dual_clip: float | None) -> Tensor:
    check_range(clip_low=low, clip_high=high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None, got {dual_clip}")
    rho = x.exp()
    tokens = torch.maximum(-advantage * rho, -advantage * torch.clamp(rho, 1.0 - low, 1.0 + high))
    if dual_clip is None:
        return tokens
    return torch.where(advantage < 0, torch.minimum(tokens, -advantage * dual_clip), tokens)


@catalogue.entry(
    formula="ppo_clip with dual_clip 3 + kl_weight * kl(l, ref)",
    gradient="that of ppo_clip + kl_weight * that of the KL estimate",
    source="Shao et al., DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (2024); "
    + REC_PAPER + "; " + TRINITY.format("ppo"),
)  # fmt: skip
def grpo(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | Sequences | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    reference_logp: Tensor | None = None,
    kl: str = "k3",
    kl_weight: float = 0.001,
    aggregation: str = "token-mean",
) -> Tensor:
    """PPO's clipped loss with dual clip 3 and `group_relative` advantages, plus a KL penalty if a reference is given.

    kl: "k1", "k2", "k3", "low_var" or "corrected_k3" (losses/kl.py), weighted with kl_weight and aggregated alike.
    The paper averages over the tokens of each sequence first: aggregation="seq-mean-token-mean"; DAPO and the code
    this follows over all tokens.
    """
    check_estimator(kl)
    o = operands(logp, old_logp, advantage, mask)
    tokens = _clipped(log_ratio(o.logp, o.old_logp), o.advantage, clip_low, clip_high, dual_clip)
    if reference_logp is not None:
        tokens = tokens + kl_weight * kl_penalty(logp, reference_logp, old_logp, kl, o.sequences)
    return aggregate(tokens, o.sequences, aggregation)


@catalogue.entry(
    formula="max(-A s, -A clip(s, 1 - low, 1 + high)), s = e^(mean_t (l - old)), and e^(l - sg[l]) sg[s] for each token",
    gradient="-A s on every token of the sequence where the first branch holds, else 0",
    source="Zheng et al., Group Sequence Policy Optimization (2025); " + TRINITY.format("gspo"),
    published=UNCLAMPED,
)
def gspo(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | Sequences | None = None,
    clip_low: float = 0.0003,
    clip_high: float = 0.0004,
    aggregation: str = "seq-mean-token-mean",
) -> Tensor:
    """PPO's clipped loss with one ratio a sequence, e^(mean over its tokens of logp - old_logp) (clamped at e^+-20).

    The token form: with an advantage a sequence and the default aggregation it is the sequence loss and its gradient.
    """
    o = operands(logp, old_logp, advantage, mask)
    mean = o.sequences.mean(o.logp - o.old_logp).detach()
    x = o.sequences.keep(o.sequences.spread(mean)) + (o.logp - o.logp.detach())
    x = torch.clamp(x, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return aggregate(_clipped(x, o.advantage, clip_low, clip_high, None), o.sequences, aggregation)
