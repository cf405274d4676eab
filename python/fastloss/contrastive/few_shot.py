"""Losses of few-shot episodes, of some tens of samples: dense, in plain PyTorch (SuSana)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import catalogue
from .arguments import check_labels, check_weight, wide
from .reduction import check_reduction, reduce

_SOURCE = (
    "SuSana Distancia is all you need: Enforcing class separability in metric learning via two novel distance-based "
    "loss functions for few-shot image classification"
)
#: Under the root of squared distances, and in the denominators of the score.
_ROOT_EPS, _EPS = 1e-6, 1e-7


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j| [M, N], from the differences themselves: nothing cancels."""
    return ((wide(x)[:, None] - wide(y)[None]).square().sum(2) + _ROOT_EPS).sqrt()


@catalogue.entry(
    formula="max(d(q, own prototype) - min over the others of d(q, prototype) + margin, 0)",
    gradient="of the two distances, where the margin is not met",
    source=_SOURCE,
    published="margin 0.5; a distance of exactly 0 to another prototype is taken for none",
)
def proto_triplet_loss(
    queries: Tensor, labels: Tensor, prototypes: Tensor, prototype_labels: Tensor, *, margin: float = 0.5,
    reduction: str = "mean_valid",
) -> Tensor:  # fmt: skip
    """Each query is nearer to its class's prototype than to any other, by a margin; Euclidean distances.

    Args:
        queries: [Q, D]; labels: integers [Q]; prototypes: [C, D]; prototype_labels: [C]. Of several prototypes of the own class
            the farthest counts.
        reduction: "mean_valid" over queries with an own prototype and another one, "mean", "sum", "none" ([Q]).

    Raises ValueError and TypeError for shapes and dtypes that do not match. Dense: [Q, C, D].
    """
    check_reduction(reduction)
    check_weight("margin", margin)
    check_labels(queries, labels)
    check_labels(prototypes, prototype_labels, "prototype_labels")
    if queries.shape[1] != prototypes.shape[1]:
        raise ValueError(f"queries and prototypes must have one D, got {queries.shape[1]} and {prototypes.shape[1]}")
    distances = _distances(queries, prototypes)
    same = labels[:, None] == prototype_labels[None, :]
    valid = same.any(1) & (~same).any(1)
    infinity = float("inf")
    own = torch.where(same, distances, -infinity).amax(1)
    other = torch.where(same, infinity, distances).amin(1)
    gap = torch.where(valid, own, 0.0) - torch.where(valid, other, 0.0)
    return reduce((gap + margin).relu(), reduction, valid)


def icnn_score(x: Tensor, labels: Tensor, *, neighbours: int = 4, looked_at: int | None = None) -> Tensor:
    """(lambda + gamma) / 2 of `icnn_loss`, in [0, 1], []."""
    check_labels(x, labels)
    batch = x.shape[0]
    if batch < 3:
        raise ValueError(f"the score needs three samples or more, got {batch}")
    if neighbours < 1:
        raise ValueError(f"neighbours must be >= 1, got {neighbours}")
    few = neighbours + 2 >= batch
    k = max(1, batch - 2) if few else neighbours
    looked_at = min(k + 1 if looked_at is None else max(looked_at, k), batch - 1)
    alone = torch.eye(batch, dtype=torch.bool, device=x.device)
    near = _distances(x, x).masked_fill(alone, float("inf")).topk(looked_at, dim=1, largest=False)
    distance, same = near.values, labels[:, None] == labels[near.indices]
    nearest_other = torch.where(same, float("inf"), distance).amin(1)
    standard = (distance / (nearest_other + _EPS)[:, None])[:, :k]
    standard = standard / standard.amax(1, keepdim=True).clamp(min=1)
    same, distance = same[:, :k], distance[:, :k]
    compact = 1 - _mean_of_rows(standard, same)
    apart = torch.where(same, 0.0, distance)
    apart = _mean_of_rows(apart / (apart.amax() + _EPS), ~same)
    apart = torch.where(same.all(), 1 - apart, apart)
    gamma = torch.ones_like(apart) if few else same.to(apart.dtype).mean()
    return ((compact + apart) / 2 + gamma) / 2


def _mean_of_rows(values: Tensor, member: Tensor) -> Tensor:
    """The mean over rows that have members of the mean over these; both means with eps in their denominators."""
    counts = member.sum(1).to(values.dtype)  # an integer with eps would be float32
    means = torch.where(member, values, 0.0).sum(1) / (counts + _EPS)
    return means.sum() / ((counts > 0).to(values.dtype).sum() + _EPS)


@catalogue.entry(
    formula="-log((lambda + gamma) / 2); of each sample's k nearest: lambda = (1 - mean d_same / d_nearest other + "
    "mean d_other / max d_other) / 2, gamma = share of the same class",
    gradient="of the distances through lambda; gamma has none",
    source=_SOURCE,
    published="k 4, neighbours looked at: shots + queries; the variance term omega is switched off in the code",
)
def icnn_loss(x: Tensor, labels: Tensor, *, neighbours: int = 4, looked_at: int | None = None) -> Tensor:
    """-log of the ICNN score: neighbours of the same class near, of other classes far, and many of the former.

    Args:
        x: [B, D] of an episode; labels: integers [B].
        neighbours: k. looked_at: among how many nearest the nearest of another class is sought, k + 1 if None.

    Raises ValueError and TypeError for shapes and dtypes that do not match, ValueError for fewer than three samples.
    Dense: [B, B, D].
    """
    return -icnn_score(x, labels, neighbours=neighbours, looked_at=looked_at).log()
