"""Losses for labels that are wrong or weak: early-learning regularisation, weak-to-strong confidence and product losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..wide_statistics import WideRowStats
from . import catalogue


@catalogue.row(
    formula="-log p_y + lam log(1 - <T_i, p>)",
    gradient="(1 + k s) p_j - [j = y] - k T_ij p_j, s = <T_i, p>, k = lam / (1 - s)",
    source="Early-Learning Regularization Prevents Memorization of Noisy Labels",
    statistics=("teacher_mean",),
    published="clamps p to [1e-4, 1 - 1e-4], which cuts the gradient there; here only s is kept below 1",
)
def early_learning(stats: WideRowStats, *, lam: float = 3.0, limit: float = 1 - 1e-4) -> Tensor:
    """ELR, one value a row: cross entropy, and a pull towards the running average T of the model's own predictions.

    teacher=T_i, the rows' targets as probabilities: `EarlyLearningTargets` keeps and updates them. lam 3 (CIFAR-10,
    WebVision, Clothing1M), 7 (CIFAR-100), 1 (asymmetric noise). s is capped at `limit`, with zero gradient beyond.
    """
    return -stats.logp + lam * torch.log1p(-stats.teacher_mean.clamp(max=limit))


class EarlyLearningTargets(torch.nn.Module):
    """ELR's table of targets, one row for each training example: T_i <- beta T_i + (1 - beta) softmax(z_i).

    beta 0.7 (CIFAR-10), 0.9 (CIFAR-100). The table is a buffer: it moves and is saved with the module.

    >>> targets = EarlyLearningTargets(len(dataset), classes)  # doctest: +SKIP
    >>> loss = fastloss.row_loss(logits, labels, losses.early_learning, teacher=targets(logits, index))  # doctest: +SKIP
    """

    table: Tensor

    def __init__(self, examples: int, classes: int, *, beta: float = 0.7, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {beta}")
        self.beta = beta
        self.register_buffer("table", torch.zeros(examples, classes, dtype=dtype))

    @torch.no_grad()
    def forward(self, logits: Tensor, index: Tensor) -> Tensor:
        """Update the rows `index` [B] with logits [B, C] and return them. An example may be in a batch once."""
        if logits.shape != (len(index), self.table.shape[1]):
            raise ValueError(
                f"logits must have shape {(len(index), self.table.shape[1])} for these indices, got {tuple(logits.shape)}"
            )
        rows = self.table[index].lerp_(torch.softmax(logits, -1, dtype=self.table.dtype), 1 - self.beta)
        self.table[index] = rows
        return rows


@catalogue.row(
    formula="-(1 - c) sum_j q_j log p_j - c log max_j p_j",
    gradient="p_j - (1 - c) q_j - c [j = argmax]",
    source="Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision",
    statistics=("score_mean", "argmax"),
    published="the coefficient jumps from 0.05 to 0.5 at the end of the warm-up (frac for frac / warm-up); see confidence_warmup",
)
def weak_to_strong_confidence(stats: WideRowStats, *, coefficient: float = 0.5) -> Tensor:
    """The auxiliary confidence loss: cross entropy with the weak labels mixed with the model's own hard prediction.

    teacher: the weak model's logits (log-probabilities). The published two-class form takes the class over a threshold;
    with any number of classes it is the argmax.
    """
    return (1 - coefficient) * stats.teacher_nll + coefficient * (stats.lse - stats.max)


@catalogue.entry(
    formula="c min(1, frac / warmup)",
    gradient="none",
    source="Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision",
    published="c * frac during the warm-up, then a jump to c",
)
def confidence_warmup(fraction: float, *, coefficient: float = 0.5, warmup: float = 0.1) -> float:
    """The coefficient of `weak_to_strong_confidence` after this fraction of the training, growing linearly at first."""
    return coefficient * min(1.0, fraction / warmup) if warmup > 0 else coefficient


@catalogue.row(
    formula="-sum_j w_j log p_j, w = softmax(beta z + alpha log q), detached",
    gradient="p_j - w_j",
    source="Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision (product loss)",
    statistics=("score_mean",),
)
def product(stats: WideRowStats) -> Tensor:
    """Cross entropy with the product of student and weak teacher; `product_teacher` makes the teacher to pass."""
    return stats.teacher_nll


def product_teacher(logits: Tensor, teacher: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """beta z + alpha t, detached: the scores of the product's weights w. With two heads pass instead
    TeacherHead(cat(beta x, alpha x_t), cat(W, W_t)), each joined along the features: the logits are then never stored.
    """
    return beta * logits.detach() + alpha * teacher.detach().to(logits.dtype)
