"""Policy losses whose importance weights are constants: the gradient goes through the log-probabilities alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Sequences
from . import catalogue
from .aggregation import aggregate, log_ratio
from .policy import REC_PAPER, TRINITY, UNCLAMPED, Operands, check_range, operands

CLIP_MODES = ("none", "one-side", "two-side", "ring", "gspo-one-side")
WEIGHTS = ("none", "importance", "gspo-importance", "advantage")
REGULARIZERS = ("none", "k2", "forward-kl")


@catalogue.entry(
    formula="-A sg[clip(rho, 1 - low, 1 + high)] l",
    gradient="-A clip(rho, 1 - low, 1 + high)",
    source="MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention (2025); "
    + TRINITY.format("cispo"),
    published=UNCLAMPED,
)
def cispo(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | Sequences | None = None,
    clip_low: float = 1.0,
    clip_high: float = 0.28,
    aggregation: str = "token-mean",
) -> Tensor:
    """-A clip(rho, 1 - clip_low, 1 + clip_high) logp, the weight a constant: clipping takes no token's gradient away."""
    check_range(clip_low=clip_low, clip_high=clip_high)
    o = operands(logp, old_logp, advantage, mask)
    weight = log_ratio(o.logp.detach(), o.old_logp).exp().clamp(1.0 - clip_low, 1.0 + clip_high)
    return aggregate(-o.advantage * weight * o.logp, o.sequences, aggregation)


@catalogue.entry(
    formula="-A l if A > threshold; -sg[min(rho, 1)] A l otherwise",
    gradient="-A, or -min(rho, 1) A",
    source="Roux et al., Tapered Off-Policy REINFORCE (2025); " + TRINITY.format("topr"),
    published=UNCLAMPED,
)
def topr(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | Sequences | None = None,
    threshold: float = 0.0,
    aggregation: str = "token-mean",
) -> Tensor:
    """-A logp for good samples, -min(rho, 1) A logp for those with A <= threshold, the weight a constant.

    The paper's `advantage` is the reward itself, and its rho that of the whole sequence; this is the code's, of the token.
    """
    o = operands(logp, old_logp, advantage, mask)
    tapered = log_ratio(o.logp.detach(), o.old_logp).clamp(max=0.0).exp()
    weight = torch.where(o.advantage <= threshold, tapered, 1.0)
    return aggregate(-o.advantage * weight * o.logp, o.sequences, aggregation)


@catalogue.entry(
    formula="-A f(rho), f(rho) = (4 / tau) sigma(tau (rho - 1)), tau = 1 if A > 0, else 1.05; constant_gate: -A sg[f(rho)] l",
    gradient="-4 A sigma (1 - sigma) rho; constant_gate: -A f(rho)",
    source="Soft Adaptive Policy Optimization (2025, arXiv 2511.20347); " + TRINITY.format("sapo"),
    published="the code multiplies the detached gate with l, whose gradient at rho = 1 is 2 / tau times the policy "
    "gradient and grows with rho where the paper's falls; constant_gate=True gives that one",
)
def sapo(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | Sequences | None = None,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    constant_gate: bool = False,
    aggregation: str = "seq-mean-token-mean",
) -> Tensor:
    """-A f(rho) with the soft gate f(rho) = (4 / tau) sigmoid(tau (rho - 1)): smooth where PPO clips.

    constant_gate: -A f(rho) logp with f a constant, as the published code has it ("token-mean" there).

    Raises ValueError for a tau that is not > 0.
    """
    if not (tau_positive > 0 and tau_negative > 0):
        raise ValueError(f"tau_positive and tau_negative must be > 0, got {tau_positive} and {tau_negative}")
    o = operands(logp, old_logp, advantage, mask)
    tau = torch.where(o.advantage > 0, o.logp.new_full((), tau_positive), tau_negative)
    current = o.logp.detach() if constant_gate else o.logp
    gate = torch.sigmoid(tau * torch.expm1(log_ratio(current, o.old_logp))) * (4.0 / tau)
    tokens = -o.advantage * gate
    return aggregate(tokens * o.logp if constant_gate else tokens, o.sequences, aggregation)


@catalogue.entry(
    formula="-A w l [rho in range] + reg; ranges none, one-side (rho <= 1 + high if A >= 0, rho >= 1 - low if A <= 0), two-side, "
    "ring (two-side, or A >= 0 and rho <= 1 - low', or A <= 0 and rho >= 1 + high'), gspo-one-side (rho of the sequence); "
    "w: 1, rho, e^(A / temperature); reg: coefficient (l - old)^2 or -coefficient l",
    gradient="-A w [in range] + 2 coefficient (l - old), or - coefficient",
    source=REC_PAPER + "; " + TRINITY.format("rec"),
    published=UNCLAMPED + "; weight gspo_importance_sampling fails there unless clip_mode is gspo-one-side",
)
def rec(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | Sequences | None = None,
    clip_mode: str = "none",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ring_low: float = 0.6,
    ring_high: float = 2.0,
    weight: str = "none",
    temperature: float = 1.0,
    regularizer: str = "none",
    regularizer_weight: float = 0.0,
    aggregation: str | None = None,
) -> Tensor:
    """-A w logp where the ratio is in range (a constant, as w is), plus a regulariser: the REC family.

    clip_mode: "none"; "one-side" (REC-OneSide, PPO's: rho <= 1 + clip_high where A >= 0, rho >= 1 - clip_low where
    A <= 0); "two-side" (both for every token); "ring" (two-side, and what is farther than ring_low below where A >= 0 or
    ring_high above where A <= 0); "gspo-one-side" (the ratio of the sequence).
    weight: "none", "importance" (rho), "gspo-importance" (the sequence's), "advantage" (e^(A / temperature)).
    regularizer, of weight regularizer_weight: "k2" (logp - old_logp)^2 or "forward-kl" -logp, on every token that counts.
    aggregation: default "token-mean", for clip_mode "gspo-one-side" "seq-mean-token-mean".
    """
    _check_rec(clip_mode, weight, regularizer, temperature)
    check_range(
        clip_low=clip_low, clip_high=clip_high, ring_low=ring_low, ring_high=ring_high,
        regularizer_weight=regularizer_weight,
    )  # fmt: skip
    o = operands(logp, old_logp, advantage, mask)
    rho = log_ratio(o.logp.detach(), o.old_logp).exp()
    used = _sequence_ratio(o) if clip_mode == "gspo-one-side" else rho
    factor = o.advantage
    if weight == "importance":
        factor = factor * rho
    elif weight == "gspo-importance":
        factor = factor * _sequence_ratio(o)
    elif weight == "advantage":
        factor = factor * torch.exp(o.advantage / temperature)
    inside = _in_range(clip_mode, used, o.advantage, (clip_low, clip_high), (ring_low, ring_high))
    tokens = -torch.where(inside, factor, 0.0) * o.logp
    if regularizer == "k2":
        tokens = tokens + regularizer_weight * (o.logp - o.old_logp) ** 2
    elif regularizer == "forward-kl":
        tokens = tokens - regularizer_weight * o.logp
    usual = "seq-mean-token-mean" if clip_mode == "gspo-one-side" else "token-mean"
    return aggregate(tokens, o.sequences, aggregation or usual)


def _check_rec(clip_mode: str, weight: str, regularizer: str, temperature: float) -> None:
    for name, value, accepted in (
        ("clip_mode", clip_mode, CLIP_MODES), ("weight", weight, WEIGHTS), ("regularizer", regularizer, REGULARIZERS),
    ):  # fmt: skip
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


def _sequence_ratio(o: Operands) -> Tensor:
    """e^(mean over the tokens of a sequence of logp - old_logp) at each of its tokens, a constant."""
    mean = o.sequences.mean(o.logp.detach() - o.old_logp)
    return log_ratio(o.sequences.keep(o.sequences.spread(mean)), torch.zeros_like(o.logp)).exp()


def _in_range(
    mode: str, rho: Tensor, advantage: Tensor, clip: tuple[float, float], ring: tuple[float, float]
) -> Tensor:
    above, below = rho <= 1.0 + clip[1], rho >= 1.0 - clip[0]
    good, bad = advantage >= 0, advantage <= 0
    if mode == "none":
        return torch.ones_like(good)
    if mode in ("one-side", "gspo-one-side"):
        return (good & above) | (bad & below)
    if mode == "two-side":
        return above & below
    return (above & below) | (good & (rho <= 1.0 - ring[0])) | (bad & (rho >= 1.0 + ring[1]))
