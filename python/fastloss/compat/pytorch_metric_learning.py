"""pytorch-metric-learning's `NTXentLoss`, `SupConLoss` and `ThresholdConsistentMarginLoss` (TCM) without the matrix of
distances, and without the list of positive pairs times negatives that its NTXentLoss holds.

All are called as loss(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None):

- embeddings [B, D] with integer labels [B]: pairs of one label are positive, others negative, a row with itself is no
  pair.
- ref_emb [N, D], ref_labels [N]: pairs of a row with a reference. ref_labels None or the very tensor `labels` says that
  the references are the rows themselves: then row i and reference i are no pair.
- indices_tuple: what a miner returns, triplets (anchors, positives, negatives) or pairs (anchors, positives, anchors,
  negatives): only these are pairs. Costs O(number of pairs).

distance: None, or pytorch-metric-learning's CosineSimilarity, DotProductSimilarity, or LpDistance(p=2, power=2) of
normalised embeddings, which is 2 - 2 cosine. Any other is refused with TypeError, and so is an embedding_regularizer.

Differences from pytorch-metric-learning: TCM looks its references up in ref_emb (there: in embeddings). One positive
and one negative pair alone have a loss (there: 0). NTXentLoss has no floor under its logarithm (there, float32 losses
stop at 87). A float32 loss that rounding makes 0 there, and so leaves out of AvgNonZeroReducer's mean, is a small
number here and counts. `.distance` and `.reducer` are what was passed, None where nothing was (there: the default
objects).
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..pairs import Diagonal, SameId, pair_map, pair_stats
from ..pairs.arguments import positive_numbers
from ..pairs.statistics import softplus
from .mined_pairs import MinedPairs, segment_logsumexp

_INF = float("inf")
_PAIR_REDUCERS = ("MeanReducer", "SumReducer", "AvgNonZeroReducer")


def _of_library(x: Any) -> str:
    """The class name of an object of pytorch-metric-learning, "" of a class that only derives from one of them."""
    return type(x).__name__ if type(x).__module__.startswith("pytorch_metric_learning.") else ""


class _PairLoss(nn.Module, abc.ABC):
    """What the losses share: their keywords, the classes of their pairs, and how their values become one."""

    def __init__(
        self, *, distance: Any = None, reducer: Any = None, embedding_regularizer: None = None,
        embedding_reg_weight: float = 1, collect_stats: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if embedding_regularizer is not None:
            raise TypeError(f"embedding_regularizer must be None, got {embedding_regularizer!r}: add it to the loss")
        if reducer is not None and not callable(reducer):
            raise TypeError(f"reducer must be None or a reducer of pytorch-metric-learning, got {reducer!r}")
        self.distance, self.reducer = distance, copy.deepcopy(reducer)
        self.embedding_reg_weight, self.collect_stats = embedding_reg_weight, collect_stats
        self.normalize, self.similarity_factor = self._similarity(distance)

    def _similarity(self, distance: Any) -> tuple[bool, float]:
        """(whether cosines, the factor of the similarity) that stand for a distance."""
        name = _of_library(distance)
        if distance is None:
            return True, 1.0
        if name in ("CosineSimilarity", "DotProductSimilarity") and distance.power == 1:
            if not distance.normalize_embeddings or distance.p == 2:
                return bool(distance.normalize_embeddings), 1.0
        if name == "LpDistance" and distance.p == distance.power == 2 and distance.normalize_embeddings:
            return True, 2.0  # -|a - b|^2 = 2 <a, b> - 2, and a softmax does not see the 2
        p, power = getattr(distance, "p", None), getattr(distance, "power", None)
        raise TypeError(
            "distance must be None, CosineSimilarity(), DotProductSimilarity() or LpDistance(p=2, power=2) of "
            f"normalised embeddings, all of p=2; got {distance!r} with p={p} and power={power}"
        )

    def forward(
        self, embeddings: Tensor, labels: Tensor | None = None, indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """The loss; see the module for its arguments. ValueError and TypeError for what does not fit."""
        ref, ref_labels = (embeddings, None) if ref_emb is None else (ref_emb, ref_labels)
        if embeddings.dim() != 2 or ref.dim() != 2:
            raise ValueError(f"embeddings must be [B, D], got {list(embeddings.shape)} and {list(ref.shape)}")
        if indices_tuple is not None:
            pairs = MinedPairs.of(indices_tuple, embeddings, ref, self.normalize)
            return self._of_mined(pairs, embeddings, labels)
        if labels is None:
            raise ValueError("labels and indices_tuple cannot both be None")
        return self._of_labels(self._pairing(embeddings, labels, ref, ref_labels), embeddings, labels)

    def _pairing(self, embeddings: Tensor, labels: Tensor, ref: Tensor, ref_labels: Tensor | None) -> dict[str, Any]:
        """The arguments that all pair ops share."""
        itself = ref_labels is None or ref_labels is labels
        ref_labels = labels if ref_labels is None else ref_labels
        for name, x, rows in (("labels", labels, embeddings), ("ref_labels", ref_labels, ref)):
            if x.shape != (len(rows),):
                raise ValueError(f"{name} must have shape [{len(rows)}], got {list(x.shape)}")
        ids = (labels.to(embeddings.device), ref_labels.to(embeddings.device))
        given: dict[str, Any] = {"q": embeddings, "normalize": self.normalize, "positive": SameId(*ids)}
        if ref is embeddings and itself:
            return {**given, "positive": SameId(ids[0])}
        return {**given, "k": ref, "excluded": Diagonal(0) if itself else None}

    @abc.abstractmethod
    def _of_labels(self, pairing: dict[str, Any], embeddings: Tensor, labels: Tensor) -> Any:
        """The loss of all pairs that labels make."""

    @abc.abstractmethod
    def _of_mined(self, pairs: MinedPairs, embeddings: Tensor, labels: Tensor | None) -> Any:
        """The loss of the pairs that a miner has chosen."""

    def _reduced(
        self, values: Tensor, indices: Tensor | None, kind: str, embeddings: Tensor, labels: Tensor | None
    ) -> Any:
        """What the given reducer makes of the values, in the words that it understands."""
        return self.reducer(
            {"loss": {"losses": values, "indices": indices, "reduction_type": kind}}, embeddings, labels
        )


class NTXentLoss(_PairLoss):
    """mean over the positive pairs (i, p) of -log( e^(s_ip / t) / (e^(s_ip / t) + sum over the negatives of i of
    e^(s_ij / t)) ).

    The denominator holds one positive, not all: the decoupled softmax. A pair whose anchor has no negatives has a loss
    of 0 and counts. 0 where there is no positive pair.

    Args:
        temperature: t > 0.
        reducer: None or MeanReducer (over pairs), SumReducer, AvgNonZeroReducer (over the pairs whose anchor has
            negatives).
        distance: see the module.
    """

    def __init__(self, temperature: float = 0.07, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        positive_numbers("temperature", temperature)
        if self.reducer is not None and _of_library(self.reducer) not in _PAIR_REDUCERS:
            raise TypeError(
                f"the reducer of NTXentLoss must be None or one of {', '.join(_PAIR_REDUCERS)}, got {self.reducer!r}"
            )
        self.temperature = temperature

    def _mean(self, total: Tensor, pairs: Tensor, with_negatives: Tensor) -> Tensor:
        name = _of_library(self.reducer)
        if name == "SumReducer":
            return total
        return total / (with_negatives if name == "AvgNonZeroReducer" else pairs).clamp(min=1)

    def _of_labels(self, pairing: dict[str, Any], embeddings: Tensor, labels: Tensor) -> Tensor:
        scale = self.similarity_factor / self.temperature
        stats = pair_stats(**pairing, scale=scale, columns=False)
        some = stats.neg_count > 0
        # softplus(lse - z) of every positive: a second sweep, where a list of the pairs would grow as B^2 / classes
        lowest = torch.finfo(stats.neg_lse.dtype).min
        limit = torch.where(some, stats.neg_lse, lowest)
        sums = pair_map(**pairing, function="softplus", scale=scale, pos_threshold=limit)
        return self._mean(sums.pos.sum(), sums.pos_count.sum(), sums.pos_count[some].sum())

    def _of_mined(self, pairs: MinedPairs, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        positive, negative = pairs.scores(self.similarity_factor / self.temperature)
        limit = segment_logsumexp(negative, pairs.neg_anchors, pairs.rows)[pairs.pos_anchors]
        values = softplus(limit - positive)
        count = torch.tensor(float(len(values)), device=values.device)
        return self._mean(values.sum(), count, (limit > -_INF).sum())


class SupConLoss(_PairLoss):
    """L_i = -mean over the positives p of i of log( e^(s_ip / t) / sum over all pairs of i of e^(s_ij / t) ), then the
    mean over the rows with L_i > 0. 0 where there is no positive or no negative pair at all.

    Args:
        temperature: t > 0.
        reducer: None (AvgNonZeroReducer), or any reducer of pytorch-metric-learning: it is called with the values of
            the rows.
        distance: see the module.

    Source: Supervised Contrastive Learning.
    """

    def __init__(self, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        positive_numbers("temperature", temperature)
        self.temperature = temperature

    def _of_rows(
        self, neg_lse: Tensor, pos_lse: Tensor, pos_sum: Tensor, pos_count: Tensor, embeddings: Tensor,
        labels: Tensor | None,
    ) -> Any:  # fmt: skip
        some = pos_count > 0
        both = some.any() & (neg_lse > -_INF).any()
        positive = torch.where(some, pos_lse, 0.0)
        # lse - mean z in two parts: -log of the positives' share, in which nothing cancels, and their spread
        share = softplus(torch.where(some, neg_lse, 0.0) - positive)
        spread = torch.where(pos_count > 1, positive - pos_sum / pos_count.clamp(min=1), 0.0)
        values = torch.where(some & both, share + spread, 0.0)
        if self.reducer is not None:
            return self._reduced(values, torch.arange(len(values), device=values.device), "element", embeddings, labels)
        return values.sum() / (values > 0).sum().clamp(min=1)

    def _of_labels(self, pairing: dict[str, Any], embeddings: Tensor, labels: Tensor) -> Any:
        stats = pair_stats(**pairing, scale=self.similarity_factor / self.temperature, columns=False)
        return self._of_rows(stats.neg_lse, stats.pos_lse, stats.pos_sum, stats.pos_count, embeddings, labels)

    def _of_mined(self, pairs: MinedPairs, embeddings: Tensor, labels: Tensor | None) -> Any:
        pairs = pairs.without_repetition()
        positive, negative = pairs.scores(self.similarity_factor / self.temperature)
        zeros = positive.new_zeros(pairs.rows)
        return self._of_rows(
            segment_logsumexp(negative, pairs.neg_anchors, pairs.rows),
            segment_logsumexp(positive, pairs.pos_anchors, pairs.rows),
            zeros.index_add(0, pairs.pos_anchors, positive),
            zeros.index_add(0, pairs.pos_anchors, torch.ones_like(positive)), embeddings, labels,
        )  # fmt: skip


class ThresholdConsistentMarginLoss(_PairLoss):
    """lambda_plus mean of (margin_plus - s) over the positive pairs with s <= margin_plus, plus lambda_minus mean of
    (s - margin_minus) over the negative pairs with s >= margin_minus, s cosines. A mean over no pairs is 0.

    reducer: None, or any reducer of pytorch-metric-learning: it is called with the loss. distance: None or
        CosineSimilarity().
    Source: Threshold-Consistent Margin Loss for Open-World Deep Metric Learning.
    """

    def __init__(
        self, lambda_plus: float = 1.0, lambda_minus: float = 1.0, margin_plus: float = 0.9, margin_minus: float = 0.5,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        if self.distance is not None and _of_library(self.distance) != "CosineSimilarity":
            raise TypeError(f"distance must be None or CosineSimilarity(), got {self.distance!r}")
        self.lambda_plus, self.lambda_minus = lambda_plus, lambda_minus
        self.margin_plus, self.margin_minus = margin_plus, margin_minus

    def _total(self, pos: Tensor, pos_active: Tensor, neg: Tensor, neg_active: Tensor) -> Tensor:
        positive, negative = pos.sum() / pos_active.sum().clamp(min=1), neg.sum() / neg_active.sum().clamp(min=1)
        return self.lambda_plus * positive + self.lambda_minus * negative

    def _of_labels(self, pairing: dict[str, Any], embeddings: Tensor, labels: Tensor) -> Any:
        m = pair_map(**pairing, function="hinge", neg_threshold=self.margin_minus, pos_threshold=self.margin_plus)
        return self._end(self._total(m.pos, m.pos_active, m.neg, m.neg_active), embeddings, labels)

    def _of_mined(self, pairs: MinedPairs, embeddings: Tensor, labels: Tensor | None) -> Any:
        positive, negative = pairs.scores(1.0)
        below, above = self.margin_plus - positive, negative - self.margin_minus
        return self._end(self._total(below.relu(), below >= 0, above.relu(), above >= 0), embeddings, labels)

    def _end(self, total: Tensor, embeddings: Tensor, labels: Tensor | None) -> Any:
        return total if self.reducer is None else self._reduced(total, None, "already_reduced", embeddings, labels)
