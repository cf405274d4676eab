"""Distillation from a teacher that is given as logits, or as a linear head whose logits are never stored.

p = softmax(z / T) is the student and q = softmax(t / T) the teacher; every loss carries the factor T^2 that keeps its
gradient's size (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"). Rows: `row_loss(logits, target or
None, losses.forward_kl, teacher=t, temperature=2.0)`; heads: `linear_row_loss(..., teacher=TeacherHead(input, weight))`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import terms
from ..wide_statistics import WideRowStats
from . import catalogue

_PUBLISHED = "softmax().log() and clamps lose the tail; here sums of non-negative summands of log-probabilities"


def _term(make: Any, *names: str) -> Any:
    """The engine arguments of a loss whose term is make(**the parameters named)."""
    return lambda **parameters: {"term": make(**{name: parameters[name] for name in names})}


def _tempered(*, temperature: float, **_: Any) -> tuple[float, float]:
    """A loss that is T^2 times its term."""
    return 0.0, temperature**2


@catalogue.row(
    formula="T^2 sum_j q_j (log q_j - log p_j)",
    gradient="T (p_j - q_j)",
    source="Hinton et al. 2015; Sharpness-Aware Training for Free (SAF, MESA: the teacher is the model's own past)",
    temperature="temperature",
    engine=_term(terms.kl),
    combination=_tempered,
    published=_PUBLISHED,
)
def forward_kl(stats: WideRowStats, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL(q, p), one value a row: knowledge distillation, zero exactly where student and teacher agree.

    Also the trajectory loss of SAF and MESA, whose teacher is the model's own earlier (or averaged) logits: T = 5 and a
    weight of 0.3 to 0.8 there. Store such logits in bfloat16, or their top k for `sparse_forward_kl`.
    """
    return temperature**2 * stats.term


@catalogue.row(
    formula="T^2 sum_j p_j (log p_j - log q_j)",
    gradient="T p_j ((log p_j - log q_j) - KL(p, q))",
    source="Gu et al. 2024, MiniLLM: Knowledge Distillation of Large Language Models",
    temperature="temperature",
    engine=lambda **_: {"term": terms.kl(0.0, 1.0)},
    combination=_tempered,
    published=_PUBLISHED,
)
def reverse_kl(stats: WideRowStats, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p, q), one value a row: mode-seeking distillation."""
    return temperature**2 * stats.term


@catalogue.row(
    formula="T^2 (w KL(q, p) + (1 - w) KL(p, q))",
    gradient="T (w (p_j - q_j) + (1 - w) p_j ((log p_j - log q_j) - KL(p, q)))",
    source="Taming Sparsely Activated Transformer with Stochastic Experts (THOR: w = 1/2 between two experts)",
    temperature="temperature",
    engine=lambda weight, **_: {"term": terms.kl(weight, 1 - weight)},
    combination=_tempered,
    published=_PUBLISHED,
)
def symmetric_kl(stats: WideRowStats, *, weight: float = 0.5, temperature: float = 1.0) -> Tensor:
    """T^2 (weight KL(q, p) + (1 - weight) KL(p, q)): THOR's consistency of two experts, with gradients to both."""
    return temperature**2 * stats.term


@catalogue.row(
    formula="T^2 (beta KL(q, m) + (1 - beta) KL(p, m)), m = beta q + (1 - beta) p",
    gradient="T (f_a(j) - p_j sum f_a), f_a = (1 - beta) p (log p - log m)",
    source="Agarwal et al. 2024, On-Policy Distillation of Language Models (generalised JSD)",
    temperature="temperature",
    engine=lambda beta, **_: {"term": terms.jensen_shannon(beta)},
    combination=_tempered,
    published="the mixture in probability space underflows; here log m by logaddexp",
)
def jensen_shannon(stats: WideRowStats, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """T^2 times the generalised Jensen-Shannon divergence, 0 < beta < 1."""
    return temperature**2 * stats.term


@catalogue.row(
    formula="T^2 KL(q, lam q + (1 - lam) p)",
    gradient="T (f_a(j) - p_j sum f_a), f_a = -q (1 - lam) p / m",
    source="Ko et al. 2024, DistiLLM: Towards Streamlined Distillation for Large Language Models",
    temperature="temperature",
    engine=lambda lam, **_: {"term": terms.mixture(1.0, 0.0, lam)},
    combination=_tempered,
)
def skewed_kl(stats: WideRowStats, *, lam: float = 0.1, temperature: float = 1.0) -> Tensor:
    """T^2 KL(q, m) with m = lam q + (1 - lam) p: bounded where the student misses the teacher's mass."""
    return temperature**2 * stats.term


@catalogue.row(
    formula="T^2 KL(p, lam p + (1 - lam) q)",
    gradient="T (f_a(j) - p_j sum f_a), f_a = p (log p - log m + 1) - p lam p / m",
    source="Ko et al. 2024, DistiLLM: Towards Streamlined Distillation for Large Language Models",
    temperature="temperature",
    engine=lambda lam, **_: {"term": terms.mixture(0.0, 1.0, 1 - lam)},
    combination=_tempered,
)
def skewed_reverse_kl(stats: WideRowStats, *, lam: float = 0.1, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p, m) with m = lam p + (1 - lam) q."""
    return temperature**2 * stats.term


@catalogue.row(
    formula="sum_j |p_j - q_j| / 2",
    gradient="p_j (s_j - E_p[s]) / (2 T), s_j = sign(p_j - q_j)",
    source="Wen et al. 2023, f-Divergence Minimization for Sequence-Level Knowledge Distillation",
    temperature="temperature",
    engine=_term(terms.total_variation),
    combination=lambda **_: (0.0, 1.0),
)
def total_variation(stats: WideRowStats, *, temperature: float = 1.0) -> Tensor:
    """The total variation distance of student and teacher, in [0, 1]."""
    return stats.term


@catalogue.row(
    formula="T^2 sum_j log cosh((z_j - t_j) / (2 T))",
    gradient="(T / 2) tanh((z_j - t_j) / (2 T))",
    source="Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
    temperature="temperature",
    engine=_term(terms.log_cosh),
    combination=_tempered,
    published="BinaryKLNorm's clamp at 1e-8 does nothing in fp32: inf for |s - t| / T > 17; here linear there",
)
def log_cosh(stats: WideRowStats, *, temperature: float = 2.0) -> Tensor:
    """DHKD's BinaryKLNorm, on the logits of the auxiliary head; cross entropy goes on the main head.

    L = cross entropy(main head) + alpha log_cosh(auxiliary head), alpha 1 (CIFAR-100) or 0.1 (ImageNet), T = 2.
    """
    return temperature**2 * stats.term


@catalogue.row(
    formula="-sum_j q_j log p_j",
    gradient="(p_j - q_j) / T",
    source="Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision; soft labels at large",
    statistics=("score_mean",),
    temperature="temperature",
)
def teacher_cross_entropy(stats: WideRowStats, *, temperature: float = 1.0) -> Tensor:
    """Cross entropy with the teacher's probabilities, one value a row."""
    return stats.teacher_nll


@catalogue.row(
    formula="-(1 - alpha) sum_j q_j log p_j - alpha sum_j p_j log q_j",
    gradient="((1 - alpha) + alpha E_p[t]) p_j - (1 - alpha) q_j - alpha p_j t_j",
    source="Robust Mean Teacher for Continual and Gradual Test-Time Adaptation",
    statistics=("teacher_lse", "score_mean", "teacher_mean"),
    published="log of a clamped softmax; here log q = t - lse_t",
)
def mean_teacher_cross_entropy(stats: WideRowStats, *, alpha: float = 0.5) -> Tensor:
    """RMT's symmetric cross entropy with a mean teacher (detached), one value a row."""
    return (1 - alpha) * stats.teacher_nll + alpha * stats.reverse_nll


@catalogue.row(
    formula="(1 - alpha) (-log p_y) + alpha T^2 KL(q, p)",
    gradient="(1 - alpha) cross entropy's + alpha T (p_j - q_j)",
    source="Hinton et al. 2015, Distilling the Knowledge in a Neural Network; BPKD (rows of boundary or body pixels)",
    temperature="temperature",
    engine=_term(terms.kl),
    combination=lambda alpha, temperature: (1 - alpha, alpha * temperature**2),
)
def knowledge_distillation(stats: WideRowStats, *, alpha: float = 0.5, temperature: float = 1.0) -> Tensor:
    """(1 - alpha) cross entropy with the target + alpha T^2 KL(q, p): one pass over student and teacher for both.

    The target's probability is that at temperature 1. For BPKD take pixels as rows for the edge term, channels as rows
    (a softmax over space) for the body term, and weight the rows by the masks under reduction="none".
    """
    return (1 - alpha) * -stats.logp + alpha * temperature**2 * stats.term


@catalogue.row(
    formula="sum_j softplus(z_j / T) - u_j z_j / T, u = sigmoid(t / T) or t itself",
    gradient="(sigmoid(z_j / T) - u_j) / T",
    source="Multi-aspect Knowledge Distillation with Large Language Model (BCE of aspects, beside CE of classes)",
    temperature="temperature",
    engine=lambda teacher_logits, **_: {"term": terms.binary_cross_entropy(logits=teacher_logits)},
    combination=lambda **_: (0.0, 1.0),
)
def binary_distillation(stats: WideRowStats, *, teacher_logits: bool = True, temperature: float = 1.0) -> Tensor:
    """Binary cross entropy of every column with the teacher's probability of it, summed over the columns.

    Multi-aspect KD: the aspects' logits with the large model's P(yes) as teacher (teacher_logits=False).
    """
    return stats.term
