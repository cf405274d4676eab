"""sentence-transformers' `MultipleNegativesRankingLoss` and `GISTEmbedLoss` without the matrices of similarities
(GISTEmbedLoss there holds B x N x D numbers).

Both are used in two ways: as a loss of a model, loss(sentence_features, labels), which a SentenceTransformerTrainer
calls, and as a loss of embeddings, `compute_loss_from_embeddings`, for which `model` may be left out.

    loss = MultipleNegativesRankingLoss(model, scale=20.0, directions=("query_to_doc", "doc_to_query"))

similarity_fct: cos_sim (the default) or dot_score, by these names or as sentence-transformers' own functions; any other
callable would need its matrix and is refused with TypeError. Each column of texts is embedded by a forward of its own
(sentence-transformers 6 joins columns of one shape): the same embeddings but for dropout.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..contrastive.distributed import gather_keys, place
from ..pairs import Diagonal, SameId, pair_stats
from ..pairs.statistics import logaddexp, softplus
from .gist_embed import GISTEmbedLoss, check_embeddings, embed, unit

__all__ = ["GISTEmbedLoss", "MultipleNegativesRankingLoss"]

logger = logging.getLogger(__name__)

_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
_SAME_TYPE = ("query_to_query", "doc_to_doc")
_PARTITIONS = ("joint", "per_direction")
_HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
_SIMILARITIES = {"cos_sim": True, "cosine": True, "dot_score": False, "dot": False}

_CITATION = """\
@misc{henderson2017efficient,
    title = {Efficient Natural Language Response Suggestion for Smart Reply},
    author = {Henderson, Matthew and Al-Rfou, Rami and Strope, Brian and Sung, Yun-hsuan and Lukacs, Laszlo and Guo, Ruiqi and
        Kumar, Sanjiv and Miklos, Balint and Kurzweil, Ray},
    year = {2017},
    eprint = {1705.00652},
    archivePrefix = {arXiv},
}
"""


def _similarity_name(function: Callable[..., Tensor] | str) -> str:
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    foreign = not isinstance(function, str) and not function.__module__.startswith("sentence_transformers.")
    if name not in _SIMILARITIES or foreign:
        raise TypeError(
            f"similarity_fct must be one of {', '.join(map(repr, _SIMILARITIES))}, or sentence_transformers.util.cos_sim "
            f"or dot_score; got {function!r}"
        )
    return name


class MultipleNegativesRankingLoss(nn.Module):
    """InfoNCE of queries with their documents, the documents of other queries and hard negatives.

    Logits are scale times similarities. Of the candidates of row i, `directions` chooses:

    - "query_to_doc" (required): query i with the positives and hard negatives of all rows.
    - "query_to_query": query i with the other queries.
    - "doc_to_query": positive i with all queries; its own query is in the denominator, too.
    - "doc_to_doc": positive i with the documents of other rows.

    Args:
        model: a SentenceTransformer, or None where only `compute_loss_from_embeddings` is called.
        scale: > 0, 1 / temperature.
        similarity_fct: see the module.
        gather_across_devices: candidates of all ranks, whose gradients are summed over the ranks; rows are the rank's
            own.
        directions: see above.
        partition_mode: "joint": one denominator over all directions; "per_direction": the mean of the losses of the
            directions, each with its own.
        hardness_mode: hardness_strength * similarity, without a gradient, is added to the logits of
            "in_batch_negatives" (documents of other rows), "hard_negatives" (a row's own), "all_negatives" (both),
            None; in "query_to_doc" only.
        hardness_strength: >= 0.

    Source: Efficient Natural Language Response Suggestion for Smart Reply; four directions: Towards General Text
    Embeddings with Multi-stage Contrastive Learning.
    """

    def __init__(
        self, model: Any = None, scale: float = 20.0, similarity_fct: Callable[..., Tensor] | str = "cos_sim",
        gather_across_devices: bool = False, directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint", hardness_mode: str | None = None, hardness_strength: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        if isinstance(directions, str) or not set(directions) <= set(_DIRECTIONS) or "query_to_doc" not in directions:
            raise ValueError(
                f"directions must be some of {', '.join(_DIRECTIONS)}, with query_to_doc among them; got {directions!r}"
            )
        if partition_mode not in _PARTITIONS:
            raise ValueError(f"partition_mode must be one of {', '.join(_PARTITIONS)}, got {partition_mode!r}")
        if partition_mode == "per_direction" and set(directions) & set(_SAME_TYPE):
            raise ValueError(
                f"partition_mode='per_direction' cannot have {' or '.join(_SAME_TYPE)}, which hold no positive; "
                f"got {directions}"
            )
        if hardness_mode not in _HARDNESS:
            raise ValueError(f"hardness_mode must be one of {', '.join(map(str, _HARDNESS))}, got {hardness_mode!r}")
        if not hardness_strength >= 0:
            raise ValueError(f"hardness_strength must be >= 0, got {hardness_strength}")
        if hardness_mode is not None and hardness_strength == 0:
            logger.warning("hardness_mode=%r has no effect: hardness_strength is 0", hardness_mode)
        self.model, self.scale, self.similarity_fct = model, scale, similarity_fct
        self.normalize = _SIMILARITIES[_similarity_name(similarity_fct)]
        self.gather_across_devices, self.directions = gather_across_devices, tuple(directions)
        self.partition_mode, self.hardness_mode = partition_mode, hardness_mode
        self.hardness_strength = hardness_strength

    @property
    def citation(self) -> str:
        """The paper, for the model card that sentence-transformers writes."""
        return _CITATION

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Any = None) -> Tensor:
        """The loss of columns of tokenised texts: (anchors, positives, negatives ...). Labels are not used."""
        return self.compute_loss_from_embeddings(embed(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Any = None) -> Tensor:
        """The loss of embeddings (anchors, positives, negatives ...), each [B, D]."""
        check_embeddings("embeddings", embeddings, 2)
        query, own_docs = embeddings[0], list(embeddings[1:])
        keys = [gather_keys(e) for e in embeddings] if self.gather_across_devices else list(embeddings)
        queries, docs = keys[0], torch.cat(keys[1:]) if len(keys) > 2 else keys[1]
        own = Diagonal(place().rank * len(query) if self.gather_across_devices else 0)
        row_of = torch.arange(len(queries), device=query.device)
        own_rows = row_of[own.offsets[0] :][: len(query)]
        same_row = SameId(own_rows, row_of.repeat(len(own_docs)))
        hard = SameId(own_rows, torch.cat((torch.full_like(row_of, -1), row_of.repeat(len(own_docs) - 1))))

        positive, negative, other_queries = self._query_to_doc(query, docs, own_docs, own, hard)
        options: dict[str, Any] = {"scale": self.scale, "normalize": self.normalize, "columns": False}
        if "doc_to_query" in self.directions:
            if other_queries is None:
                other_queries = pair_stats(own_docs[0], queries, positive=own, **options).neg_lse
            if self.partition_mode == "per_direction":
                return (softplus(negative - positive) + softplus(other_queries - positive)).mean() / 2
            negative = logaddexp(negative, logaddexp(other_queries, positive))
        if "query_to_query" in self.directions:
            key = None if queries is query else queries
            stats = pair_stats(query, key, positive=None, excluded=None if key is None else own, **options)
            negative = logaddexp(negative, stats.neg_lse)
        if "doc_to_doc" in self.directions:
            key = None if docs is own_docs[0] else docs
            stats = pair_stats(own_docs[0], key, positive=None, excluded=None if key is None else same_row, **options)
            negative = logaddexp(negative, stats.neg_lse)
        return softplus(negative - positive).mean()

    def _query_to_doc(
        self, query: Tensor, docs: Tensor, own_docs: list[Tensor], own: Diagonal, hard: SameId
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logit of the positive, log-sum-exp of the other documents, and where one matrix serves both directions that
        of a positive's other queries), [B] each."""
        mode = self.hardness_mode if self.hardness_strength > 0 else None
        options: dict[str, Any] = {"scale": self.scale, "normalize": self.normalize, "positive": own}
        # a row's own hard negatives are added one by one where only they have, or have not, the penalty
        split = len(own_docs) > 1 and mode in ("in_batch_negatives", "hard_negatives")
        if split:
            options["excluded"] = hard
        penalty = self.hardness_strength if mode in ("in_batch_negatives", "all_negatives") else 0.0
        # without a penalty, the first columns of this matrix are the rows of doc_to_query
        both = "doc_to_query" in self.directions and len(docs) == len(query) * len(own_docs) and not penalty
        stats = pair_stats(query, docs, hardness=penalty, columns=both, **options)
        negative = stats.neg_lse
        for doc in own_docs[1:] if split else ():
            similarity = self._rowwise(query, doc).to(negative.dtype)
            added = self.hardness_strength * similarity.detach() if mode == "hard_negatives" else 0.0
            negative = logaddexp(negative, self.scale * similarity + added)
        return stats.pos_sum, negative, stats.columns.neg_lse[: len(query)] if both else None

    def _rowwise(self, a: Tensor, b: Tensor) -> Tensor:
        if self.normalize:
            return (unit(a) * unit(b)).sum(1)
        return (a * b).sum(1, dtype=torch.promote_types(a.dtype, torch.float32))

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card shows."""
        names = (
            "scale", "gather_across_devices", "directions", "partition_mode", "hardness_mode", "hardness_strength",
        )  # fmt: skip
        return {"similarity_fct": _similarity_name(self.similarity_fct), **{n: getattr(self, n) for n in names}}

    @property
    def temperature(self) -> float:
        """1 / scale."""
        return 1 / self.scale
