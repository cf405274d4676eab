"""Losses of a query's own list of documents, [B, K] scores: BlockRank, and AR2's retriever."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import catalogue
from ..pairs.arguments import positive_numbers
from ..pairs.statistics import softplus
from .arguments import wide
from .reduction import check_reduction, reduce


def _masked_lse(z: Tensor, member: Tensor) -> Tensor:
    """log sum over the members of e^z; -inf with zero gradient where there is none."""
    inside = torch.where(member, z, -float("inf"))
    largest = inside.detach().amax(1)
    shift = torch.where(largest == -float("inf"), 0.0, largest)
    total = torch.where(member, (inside - shift[:, None]).exp(), 0.0).sum(1)
    return torch.where(total != 0, torch.where(total != 0, total, 1.0).log() + shift, -float("inf"))


@catalogue.entry(
    formula="lse over all documents of s a - lse over the relevant ones of s a",
    gradient="s (softmax over all - softmax over the relevant) / B",
    source="Scalable In-context Ranking with Generative Models",
    published="BlockRank: a = mean over heads and two tokens of the attention on each document, temperature 0.05 (0.1 "
    "in the trainer), weight 0.1, layer 20",
)
def blockrank_loss(
    attention: Tensor, relevant: Tensor, valid: Tensor | None = None, *, scale: float = 20.0, reduction: str = "mean_valid"
) -> Tensor:  # fmt: skip
    """The share of the attention's softmax that goes to relevant documents, -log: MIL-NCE of scores.

    Args:
        attention: scores [B, K]; relevant: bool [B, K]; valid: bool [B, K], False for padding.
        scale: 1 / temperature > 0. reduction: "mean_valid" over rows with a relevant document, "mean", "sum", "none" ([B]).

    NaN scores that are not padding make the loss NaN.
    Raises ValueError for other shapes and a scale that is not positive, TypeError for masks that are not bool.
    Dense: K is a list's length.
    Source: Scalable In-context Ranking with Generative Models.
    """
    check_reduction(reduction)
    for name, mask in (("relevant", relevant), ("valid", valid)):
        if mask is not None and mask.shape != attention.shape:
            raise ValueError(f"{name} must have shape {list(attention.shape)}, got {list(mask.shape)}")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"{name} must be torch.bool, got {mask.dtype}")
    if attention.dim() != 2:
        raise ValueError(f"attention must be [B, K], got {list(attention.shape)}")
    positive_numbers("scale", scale)
    z = scale * wide(attention)
    allowed = torch.ones_like(relevant) if valid is None else valid
    good, bad = _masked_lse(z, relevant & allowed), _masked_lse(z, allowed & ~relevant)
    some = good != -float("inf")  # NaN is some: it makes the loss NaN
    return reduce(softplus(torch.where(some, bad - torch.where(some, good, 0.0), 0.0)), reduction, some)


@catalogue.entry(
    formula="-(1 - l) sum_j q_j log p_j + l sum_j log sigmoid(r_1 - r_j) log p_j, q = softmax(r / T), p = softmax(z)",
    gradient="with c = -(1 - l) q + l log sigmoid(r_1 - r_j): c_j - p_j sum c; none to r",
    source="Adversarial Retriever-Ranker for dense text retrieval",
    published="log(softmax + eps); sums the second part over the batch and averages the first: mean of both here",
)
def ar2_retriever_loss(
    scores: Tensor, ranker_scores: Tensor, *, adversarial_weight: float = 0.5, temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """AR2's loss of the retriever: distillation from the ranker, and the ranker's reward for documents it finds hard.

    Args:
        scores: the retriever's [B, K], the positive first; ranker_scores: the ranker's [B, K], no gradient.
        adversarial_weight: l; temperature: T of the ranker. reduction: "mean", "sum", "none" ([B]).

    Raises ValueError for other shapes, l not in [0, 1], T not > 0. Dense: K is a list's length.
    Source: Adversarial Retriever-Ranker for dense text retrieval.
    """
    check_reduction(reduction)
    if scores.dim() != 2 or scores.shape != ranker_scores.shape or scores.shape[1] < 1:
        raise ValueError(
            f"scores and ranker_scores must be [B, K], got {list(scores.shape)} and {list(ranker_scores.shape)}"
        )
    if not 0 <= adversarial_weight <= 1:
        raise ValueError(f"adversarial_weight must be in [0, 1], got {adversarial_weight}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    log_p, ranker = F.log_softmax(wide(scores), dim=1), wide(ranker_scores).detach()
    distilled = -(F.softmax(ranker / temperature, dim=1) * log_p).sum(1)
    reward = (F.logsigmoid(ranker[:, :1] - ranker) * log_p).sum(1)
    return reduce((1 - adversarial_weight) * distilled + adversarial_weight * reward, reduction)
