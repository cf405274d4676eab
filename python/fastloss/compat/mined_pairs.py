"""The pairs that a miner of pytorch-metric-learning chose, and their similarities: a list, never a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pairs import edge_dot


def segment_logsumexp(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """log sum of e^values over the entries of each of `count` segments; -inf without a gradient where a segment has
    none."""
    largest = values.new_full((count,), -torch.inf).scatter_reduce(0, segments, values.detach(), "amax")
    some = largest > -torch.inf
    largest = torch.where(some, largest, 0.0)
    total = values.new_zeros(count).index_add(0, segments, (values - largest[segments]).exp())
    return torch.where(some, largest + torch.where(some, total, 1.0).log(), -torch.inf)


def _unique_pairs(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    return torch.unique(rows * width + columns)


@dataclass(frozen=True)
class MinedPairs:
    """Positive pairs (pos_anchors, positives) and negative pairs (neg_anchors, negatives) of q [M, D] with k [N, D]."""

    q: Tensor
    k: Tensor
    pos_anchors: Tensor
    positives: Tensor
    neg_anchors: Tensor
    negatives: Tensor

    @classmethod
    def of(cls, indices: Sequence[Tensor], q: Tensor, k: Tensor, normalize: bool) -> MinedPairs:
        """From triplets (anchors, positives, negatives) or pairs (anchors, positives, anchors, negatives).

        Raises ValueError for other tuples, TypeError for what is no tensor of integers.
        """
        if len(indices) not in (3, 4):
            raise ValueError(f"indices_tuple must hold 3 (triplets) or 4 (pairs) tensors, got {len(indices)}")
        for x in indices:
            if not isinstance(x, Tensor) or (x.is_floating_point() and x.numel()):
                raise TypeError(f"indices_tuple must hold integer tensors, got {getattr(x, 'dtype', type(x))}")
        ids = [x.to(q.device).long() for x in indices]
        pos_anchors, positives, neg_anchors, negatives = ids if len(ids) == 4 else (ids[0], ids[1], ids[0], ids[2])
        itself = q is k
        q = F.normalize(q, dim=1) if normalize else q
        k = q if itself else F.normalize(k, dim=1) if normalize else k
        return cls(q, k, pos_anchors, positives, neg_anchors, negatives)

    @property
    def rows(self) -> int:
        """M."""
        return len(self.q)

    def scores(self, scale: float) -> tuple[Tensor, Tensor]:
        """scale <q, k> of the positive and of the negative pairs."""
        positive = edge_dot(self.q, self.k, self.pos_anchors, self.positives)
        return scale * positive, scale * edge_dot(self.q, self.k, self.neg_anchors, self.negatives)

    def without_repetition(self) -> MinedPairs:
        """Each pair once. Raises ValueError where a pair is both positive and negative."""
        width = len(self.k)
        positive = _unique_pairs(self.pos_anchors, self.positives, width)
        negative = _unique_pairs(self.neg_anchors, self.negatives, width)
        if bool(torch.isin(positive, negative).any()):
            raise ValueError("indices_tuple names a pair as positive and as negative")
        return replace(
            self, pos_anchors=positive // width, positives=positive % width, neg_anchors=negative // width,
            negatives=negative % width,
        )  # fmt: skip
