"""Teachers of which only a few columns are known: top-k probabilities, and rankings (PLD)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import INF
from ..wide_statistics import WideRowStats
from . import catalogue

_LOWEST = -1e30  # stands for the LSE of no columns where its gradient would be NaN


@catalogue.row(
    formula="sum_k q_k (log q_k - log p_k), + q_rest (log q_rest - log p_rest) with the tail; q_rest = 1 - sum q_k",
    gradient="q_sum p_j - q_j on the list; with the tail q_rest (p_j - pi_j) more on every column of the rest",
    source="Sparse (top-k) teacher, e.g. Raman et al. 2023, For Distillation, Tokens Are Not All You Need",
    published="renormalising the top k makes the student overconfident; the tail is one more class here",
)
def sparse_forward_kl(stats: WideRowStats, *, probabilities: Tensor, tail: bool = True) -> Tensor:
    """KL(q, p) of a teacher known on its listed columns only, one value a row.

    `listed=ids` goes to the statistics (without a target); probabilities [..., K] are the teacher's on these ids. With
    `tail` what is left of the teacher's mass is compared with the student's mass on all other columns.
    """
    q = probabilities.to(stats.table.dtype)
    if q.shape != stats.listed_logits.shape:
        raise ValueError(f"probabilities must have shape {tuple(stats.listed_logits.shape)}, got {tuple(q.shape)}")
    known = q > 0
    log_p = torch.where(known, stats.listed_logp, 0.0)
    rows = torch.where(known, q * (torch.where(known, q, 1.0).log() - log_p), 0.0).sum(-1)
    if not tail:
        return rows
    left = (1 - q.sum(-1)).clamp(min=0)
    some = (left > 0) & (stats.rest_logp.detach() != -INF)
    log_rest = torch.where(some, stats.rest_logp, 0.0)
    return rows + torch.where(some, left * (torch.where(some, left, 1.0).log() - log_rest), 0.0)


@catalogue.row(
    formula="sum_k alpha_k (LSE(z_k, z_k+1, ..., z_K, rest) - z_k), columns in the order y, then the teacher's",
    gradient="p-like: e^z_j sum_{k <= pos(j)} alpha_k e^-suf_k - alpha_pos(j); off the list e^z_j A_K",
    source="PLD: A Choice-Theoretic List-Wise Knowledge Distillation",
    published="sorts and scans all V columns; the first K of the list and the LSE of the rest are exact for their terms",
)
def plackett_luce(stats: WideRowStats, *, weights: Tensor) -> Tensor:
    """The first K terms of PLD, one value a row; with K = V all of it. `plackett_luce_order` gives list and weights.

    No further cross entropy: the first term is the target's.
    """
    z = stats.listed_logits
    if weights.shape != z.shape:
        raise ValueError(f"weights must have shape {tuple(z.shape)}, got {tuple(weights.shape)}")
    m = torch.maximum(stats.rest_lse.detach(), z.detach().amax(-1))
    rest = stats.rest_lse - m
    rest = torch.where(rest == -INF, _LOWEST, rest)
    gaps = torch.where(z == -INF, _LOWEST, z - m[..., None])
    suffix = torch.logcumsumexp(torch.cat((rest[..., None], gaps.flip(-1)), -1), -1)[..., 1:].flip(-1)
    weights = weights.to(z.dtype)
    return torch.where(weights > 0, weights * (suffix - gaps), 0.0).sum(-1)


def plackett_luce_order(teacher: Tensor, target: Tensor, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(ids [..., k - 1] to pass as `listed` beside the target, weights [..., k] of `plackett_luce`).

    The order is the target, then the teacher's other columns by descending logit; the weights are
    softmax(teacher / temperature) in that order. Once per batch of a teacher: top-k of its logits is all that is needed.
    """
    vocab = teacher.shape[-1]
    if not 1 <= k <= vocab:
        raise ValueError(f"k must be from 1 to the {vocab} columns, got {k}")
    ids = target.clamp(min=0)[..., None]  # ignored rows get some order: they count nothing
    above = teacher.clamp(min=torch.finfo(teacher.dtype).min)  # so that a column of -inf comes before the target again
    others = above.scatter(-1, ids, -INF).topk(k - 1, -1).indices
    order = torch.cat((ids, others), -1)
    log_q = torch.log_softmax(teacher.float() if teacher.dtype != torch.float64 else teacher, -1)
    if temperature != 1:
        log_q = torch.log_softmax(log_q / temperature, -1)
    return others, log_q.gather(-1, order).exp()
