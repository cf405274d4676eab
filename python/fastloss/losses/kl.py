"""Estimates of KL(policy || reference), one a token, from the log-probabilities of tokens that the policy sampled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..segments import Sequences, sequences
from . import catalogue
from .aggregation import LOG_RATIO_LIMIT

_SOURCE = (
    "Schulman, Approximating KL Divergence (2020); modelscope/Trinity-RFT trinity/algorithm/kl_fn/kl_fn.py, "
    "whose coefficient is 0.001"
)


def _operands(
    logp: Tensor, reference_logp: Tensor, mask: Tensor | Sequences | None
) -> tuple[Sequences, Tensor, Tensor]:
    s = sequences(mask, logp)
    return s, s.keep(logp), s.keep(reference_logp).detach()


def _k3(x: Tensor) -> Tensor:
    """e^x - 1 - x, whose exponential goes on along its tangent beyond x = 20."""
    below = x.clamp(max=LOG_RATIO_LIMIT)
    beyond = x - below
    return torch.expm1(below) + below.exp() * beyond - x


@catalogue.entry(formula="l - ref", gradient="1 on logp", source=_SOURCE)
def kl_k1(logp: Tensor, reference_logp: Tensor, *, mask: Tensor | Sequences | None = None) -> Tensor:
    """logp - reference_logp, [B, T]: unbiased, of either sign. Its gradient says nothing of the reference."""
    _, logp, ref = _operands(logp, reference_logp, mask)
    return logp - ref


@catalogue.entry(formula="(l - ref)^2 / 2", gradient="l - ref", source=_SOURCE)
def kl_k2(logp: Tensor, reference_logp: Tensor, *, mask: Tensor | Sequences | None = None) -> Tensor:
    """(logp - reference_logp)^2 / 2, [B, T]: its gradient is that of the KL divergence on the policy's own samples."""
    _, logp, ref = _operands(logp, reference_logp, mask)
    return (logp - ref) ** 2 / 2


@catalogue.entry(
    formula="e^x - 1 - x, x = ref - l; for x > 20 e^20 (1 + x - 20) - 1 - x",
    gradient="1 - e^x on logp",
    source=_SOURCE,
    published="e^x overflows at x = 88 in float32; here it goes on along its tangent from x = 20, so that the gradient "
    "keeps its sign and stays finite. expm1 keeps the digits near x = 0",
)
def kl_k3(logp: Tensor, reference_logp: Tensor, *, mask: Tensor | Sequences | None = None) -> Tensor:
    """e^x - 1 - x with x = reference_logp - logp, [B, T]: never negative. The penalty of GRPO."""
    _, logp, ref = _operands(logp, reference_logp, mask)
    return _k3(ref - logp)


@catalogue.entry(
    formula="clamp(e^x - 1 - x, +-10), x = clamp(ref - l, +-20)",
    gradient="1 - e^x on logp, 0 where a clamp holds",
    source=_SOURCE + '; named "low_var_kl" there and in verl',
)
def kl_low_var(logp: Tensor, reference_logp: Tensor, *, mask: Tensor | Sequences | None = None) -> Tensor:
    """k3 with x clamped to +-20 and the result to +-10, [B, T]: tokens far from the reference get no gradient."""
    _, logp, ref = _operands(logp, reference_logp, mask)
    x = torch.clamp(ref - logp, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.clamp(torch.expm1(x) - x, -10.0, 10.0)


@catalogue.entry(
    formula="clamp(e^(l - old), 0, 2) k3(l, ref)",
    gradient="rho (k3 + 1 - e^x) on logp where rho < 2, else 2 (1 - e^x)",
    source=_SOURCE,
    published="as k3",
)
def kl_corrected_k3(
    logp: Tensor, reference_logp: Tensor, old_logp: Tensor, *, mask: Tensor | Sequences | None = None
) -> Tensor:
    """k3 weighted by clamp(e^(logp - old_logp), 0, 2), [B, T]: for tokens that an older policy sampled."""
    s, logp, ref = _operands(logp, reference_logp, mask)
    rho = torch.clamp(torch.clamp(logp - s.keep(old_logp).detach(), max=LOG_RATIO_LIMIT).exp(), 0.0, 2.0)
    return rho * _k3(ref - logp)


def check_estimator(name: str) -> None:
    """Raise ValueError for an estimator that is none."""
    if name not in (*_ESTIMATORS, "corrected_k3"):
        raise ValueError(f"kl must be one of {', '.join(_ESTIMATORS)}, corrected_k3; got {name!r}")


_ESTIMATORS: dict[str, Callable[..., Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3, "low_var": kl_low_var}


def kl_penalty(
    logp: Tensor, reference_logp: Tensor, old_logp: Tensor | None, estimator: str, mask: Tensor | Sequences | None
) -> Tensor:
    """The estimate of that name: "k1", "k2", "k3", "low_var" or "corrected_k3"."""
    if estimator == "corrected_k3" and old_logp is not None:
        return kl_corrected_k3(logp, reference_logp, old_logp, mask=mask)
    check_estimator(estimator)
    if estimator == "corrected_k3":
        raise ValueError("kl corrected_k3 needs old_logp, got None")
    return _ESTIMATORS[estimator](logp, reference_logp, mask=mask)
