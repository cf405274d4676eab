"""Preference losses on log-probabilities of whole answers: of pairs (chosen, rejected), or of single answers (KTO).

Sums of token log-probabilities for DPO, RPO and KTO, their means for IPO, ORPO and SimPO. Log-probabilities under the
reference policy are constants, as a rule computed once and kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..segments import Sequences, sequences
from . import catalogue


def _log_ratio(logp: Tensor, reference: Tensor | None, what: str, reference_free: bool) -> Tensor:
    if reference_free:
        return logp
    if reference is None:
        raise ValueError(f"needs the reference log-probabilities of {what} answers, or reference_free=True; got None")
    if reference.shape != logp.shape:
        raise ValueError(
            f"log-probabilities of {what} answers: {tuple(logp.shape)}, reference {tuple(reference.shape)}"
        )
    return logp - reference.detach()


def _difference(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor | None, reference_rejected: Tensor | None,
    reference_free: bool,
) -> Tensor:  # fmt: skip
    """h = (l_w - ref_w) - (l_l - ref_l)."""
    _check_pair(chosen, rejected)
    better = _log_ratio(chosen, reference_chosen, "chosen", reference_free)
    return better - _log_ratio(rejected, reference_rejected, "rejected", reference_free)


def _check_pair(chosen: Tensor, rejected: Tensor) -> None:
    if chosen.shape != rejected.shape:
        raise ValueError(f"one chosen answer a rejected one, got {tuple(chosen.shape)} and {tuple(rejected.shape)}")


def _check_like(name: str, given: Tensor, logp: Tensor) -> None:
    if given.shape != logp.shape:
        raise ValueError(f"{name} must have shape {tuple(logp.shape)}, got {tuple(given.shape)}")


def _logistic(u: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(u) - e log sigmoid(-u)."""
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5], got {label_smoothing}")
    loss = -(1 - label_smoothing) * F.logsigmoid(u)
    return loss - label_smoothing * F.logsigmoid(-u) if label_smoothing else loss


@catalogue.entry(
    formula="-(1 - e) log sigma(u) - e log sigma(-u), u = beta ((l_w - ref_w) - (l_l - ref_l))",
    gradient="beta (e - sigma(-u)) on each chosen token, the negative on each rejected one",
    source="Rafailov et al., Direct Preference Optimization: Your Language Model is Secretly a Reward Model (2023); "
    "Mitchell 2023 (label smoothing, cDPO)",
)
def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> Tensor:
    """-(1 - e) log sigmoid(u) - e log sigmoid(-u), u = beta ((chosen - reference) - (rejected - reference)), one a pair.

    All arguments are sums of token log-probabilities, of one shape. label_smoothing e: the probability that a pair is
    the wrong way round. reference_free: as if the reference were uniform.
    """
    u = beta * _difference(chosen, rejected, reference_chosen, reference_rejected, reference_free)
    return _logistic(u, label_smoothing)


@catalogue.entry(
    formula="(h - 1 / (2 beta))^2, h = (l_w - ref_w) - (l_l - ref_l), l means over tokens",
    gradient="2 (h - 1 / (2 beta)) / |y_w| on each chosen token, the negative / |y_l| on each rejected one",
    source="Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences (2023)",
)
def ipo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    reference_free: bool = False,
) -> Tensor:
    """(h - 1 / (2 beta))^2, h = (chosen - reference) - (rejected - reference), one a pair; means over tokens.

    Raises ValueError for shapes that differ, beta <= 0, and no reference without reference_free.
    """
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    return (_difference(chosen, rejected, reference_chosen, reference_rejected, reference_free) - 0.5 / beta) ** 2


def _log_expm1(x: Tensor) -> Tensor:
    """log(e^x - 1) for x > 0: minus the log-odds of probability e^-x."""
    log1mexp = torch.where(x < 0.693, torch.log(-torch.expm1(-x)), torch.log1p(-torch.exp(-x.clamp(min=0.5))))
    return x + log1mexp


@catalogue.entry(
    formula="-l_w - weight log sigma(odds_w - odds_l), odds = l - log(1 - e^l), l means over tokens",
    gradient="-1 - weight sigma(odds_l - odds_w) / (1 - e^{l_w}) on l_w, weight sigma(odds_l - odds_w) / (1 - e^{l_l}) on l_l",
    source="Hong et al., ORPO: Monolithic Preference Optimization without Reference Model (2024); weight 0.1",
    published="1 - e^l cancels and its log is -inf when l -> 0; here log1mexp, finite with its gradient at l = 0 too",
)
def orpo(chosen: Tensor, rejected: Tensor, *, weight: float = 0.1, nll: Tensor | None = None) -> Tensor:
    """nll - weight log sigmoid(odds(chosen) - odds(rejected)), odds(l) = l - log(1 - e^l), one a pair.

    chosen, rejected: means of token log-probabilities. nll: the language-model loss of each pair, by default -chosen.
    """
    _check_pair(chosen, rejected)
    if nll is not None:
        _check_like("nll", nll, chosen)
    # p = 1 to the last digit has infinite odds; next to it they are finite, and the loss is smooth there
    tiny = torch.finfo(chosen.dtype).tiny ** 0.5
    ratio = _log_expm1(tiny - rejected) - _log_expm1(tiny - chosen)
    return (-chosen if nll is None else nll) - weight * F.logsigmoid(ratio)


@catalogue.entry(
    formula="-(1 - e) log sigma(u) - e log sigma(-u), u = beta (l_w - l_l) - gamma, l means over tokens",
    gradient="beta (e - sigma(-u)) / |y_w| on each chosen token, the negative / |y_l| on each rejected one",
    source="Meng et al., SimPO: Simple Preference Optimization with a Reference-Free Reward (2024), equation 6; beta 2 and "
    "gamma 0.5 are the trl and princeton-nlp/SimPO defaults (gamma / beta 0.25)",
)
def simpo(
    chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0
) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma), one a pair; means of token log-probabilities, no reference."""
    _check_pair(chosen, rejected)
    return _logistic(beta * (chosen - rejected) - gamma, label_smoothing)


@catalogue.entry(
    formula="dpo - eta beta l_w (sum over tokens); with nll_weight: dpo - nll_weight l_w / |y_w|",
    gradient="that of dpo, and -eta beta on each chosen token; with nll_weight -nll_weight / |y_w|",
    source="Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer; "
    "YSLIU627/Regularized-Preference-Optimization rpo_trainer.py (beta 0.01, gemma 0.05; eta 0.005), its OpenRLHF (0.2)",
)
def rpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float = 0.01,
    eta: float = 0.005,
    nll_weight: float | None = None,
    chosen_tokens: Tensor | None = None,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> Tensor:
    """dpo(...) - eta beta chosen, one a pair: DPO with the SFT loss of the chosen answer as a regulariser.

    nll_weight: the OpenRLHF variant of the authors (0.2 there): the mean over the chosen answer's tokens instead of
    eta beta times the sum; it needs their number, `chosen_tokens`, of the pairs' shape.

    Raises ValueError for shapes that differ, and where chosen_tokens or the reference is missing.
    """
    loss = dpo(
        chosen, rejected, reference_chosen, reference_rejected, beta=beta, label_smoothing=label_smoothing,
        reference_free=reference_free,
    )  # fmt: skip
    if nll_weight is None:
        return loss - eta * beta * chosen
    if chosen_tokens is None:
        raise ValueError("nll_weight needs chosen_tokens, the number of tokens of each chosen answer; got None")
    _check_like("chosen_tokens", chosen_tokens, chosen)
    return loss - nll_weight * chosen / chosen_tokens.clamp(min=1)


@catalogue.entry(
    formula="lambda_D sigma(-beta (l - ref - kl)) if desirable, lambda_U sigma(beta (l - ref - kl)) if not",
    gradient="-+ lambda beta sigma(u) sigma(-u) on each token; kl is a constant",
    source="Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization (2024)",
    published="1 - sigmoid(u) cancels in float32 beyond u = 17; here sigmoid(-u)",
)
def kto(
    logp: Tensor,
    reference_logp: Tensor,
    desirable: Tensor,
    reference_point: float | Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """weight (1 - sigmoid(+-beta (logp - reference_logp - reference_point))), + for desirable answers, one an answer.

    logp, reference_logp: sums of token log-probabilities. desirable: bool, of their shape. reference_point: the estimate
    of KL(policy || reference), a constant: `kto_reference_point`, or 0.

    Raises ValueError for shapes that differ and a dtype of `desirable` that is not bool.
    """
    if desirable.shape != logp.shape or desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool {tuple(logp.shape)}, got {desirable.dtype} {tuple(desirable.shape)}")
    point = reference_point.detach() if isinstance(reference_point, Tensor) else reference_point
    if isinstance(point, Tensor):
        point = point.reshape(()) if point.numel() == 1 else point
        if point.dim():
            _check_like("reference_point, if it is not one number,", point, logp)
    u = beta * (_log_ratio(logp, reference_logp, "all", False) - point)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-u), undesirable_weight * torch.sigmoid(u))


@catalogue.entry(
    formula="max(0, mean(l' - ref')), l' of answers to other prompts of the batch",
    gradient="none: a constant",
    source="Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization (2024)",
)
def kto_reference_point(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """max(0, mean(logp - reference_logp)): KTO's estimate of KL(policy || reference), a constant.

    Both of answers paired with other prompts of the batch (sums over tokens, any shape). With many processes average
    the differences over all of them before. 0 for no answers.
    """
    difference = _log_ratio(logp, reference_logp, "all", False).detach()
    return (difference.sum() / max(1, difference.numel())).clamp(min=0.0)


#: Losses of pairs that take means over tokens; the others take sums.
_MEANS = (ipo, orpo, simpo)


def sequence_logp(logp: Tensor, mask: Tensor | Sequences | None = None, *, average: bool = False) -> Tensor:
    """Log-probability of each sequence [B] from those of its tokens [B, T]: their sum, or their mean (0 for no tokens)."""
    s = sequences(mask, logp)
    return s.mean(logp) if average else s.sum(logp)


def preference(
    loss: Callable[..., Tensor],
    logp: Tensor,
    reference_logp: Tensor | None = None,
    *,
    mask: Tensor | Sequences | None = None,
    average: bool | None = None,
    reduction: str = "mean",
    **arguments: Any,
) -> Tensor:
    """loss(chosen, rejected, ...) of log-probabilities of tokens, chosen answers in the first half of the sequences.

    logp: [2 P, T], rows 0 .. P - 1 the chosen answers and P .. 2 P - 1 the rejected ones in the same order (or a packed
    batch of 2 P sequences, in `mask`). reference_logp: of the same shape. average: means over tokens instead of sums;
    None: what the loss is defined with. reduction: "mean", "sum" or "none" ([P]).

    Raises ValueError for another reduction and an odd number of sequences, and what the loss raises.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')
    s = sequences(mask, logp)
    if not s.shape or s.shape[0] % 2:
        raise ValueError(f"chosen and rejected answers must be as many, got {tuple(s.shape)} sequences")
    means = loss in _MEANS if average is None else average
    halves = list(sequence_logp(logp, s, average=means).chunk(2))
    if reference_logp is not None:
        halves += sequence_logp(reference_logp, s, average=means).chunk(2)
    if "chosen_tokens" in inspect.signature(loss).parameters:
        arguments.setdefault("chosen_tokens", s.sizes(halves[0]).chunk(2)[0])
    pairs = loss(*halves, **arguments)
    if reduction == "none":
        return pairs
    return pairs.sum() if reduction == "sum" else pairs.sum() / max(1, pairs.numel())
