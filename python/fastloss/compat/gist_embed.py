"""sentence-transformers' `GISTEmbedLoss`, and what the losses of that library share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contrastive.distributed import gather_keys, place
from ..pairs import Diagonal, Guide, pair_stats
from ..pairs.statistics import logaddexp, softplus

_STRATEGIES = ("absolute", "relative")

_CITATION = """\
@misc{solatorio2024gistembed,
    title = {GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning},
    author = {Solatorio, Aivin V.},
    year = {2024},
    eprint = {2402.16829},
    archivePrefix = {arXiv},
}
"""


def embed(model: Any, features: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The sentence embeddings of each column of texts."""
    if model is None:
        raise ValueError("loss(sentence_features, labels) needs a model: pass it to the constructor")
    return [model(column)["sentence_embedding"] for column in features]


def check_embeddings(name: str, embeddings: Sequence[Tensor], least: int, most: int | None = None) -> None:
    """Raise ValueError for what is not a list of so many tensors [B, D]."""
    if len(embeddings) < least or (most is not None and len(embeddings) > most):
        raise ValueError(f"{name} must be {least} to {most or 'any number of'} tensors, got {len(embeddings)}")
    shapes = [tuple(e.shape) for e in embeddings]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"{name} must all have one shape [B, D], got {shapes}")


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, at least in float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


class GISTEmbedLoss(nn.Module):
    """InfoNCE of anchors with all positives, negatives, other anchors and (from the positive) other positives, without
    the candidates that a guide model finds closer than the positive: those are false negatives.

    A candidate j of row i is dropped where guide_ij > limit_i, cosines of the guide; the row's own positive never is.
    limit_i = guide(anchor_i, positive_i) - margin ("absolute") or less |guide(anchor_i, positive_i)| margin
    ("relative").

    Args:
        model, guide: SentenceTransformers, or None where only `compute_loss_from_embeddings` is called.
        temperature: t > 0, of the cosines of the embeddings.
        margin_strategy: "absolute" or "relative".
        margin: see above.
        contrast_anchors: with the pairs of anchors. contrast_positives: with the pairs of positives.
        gather_across_devices: positives and negatives of all ranks, whose gradients are summed over the ranks.

    Differences from sentence-transformers: an anchor with itself and a positive with itself are never candidates
    (there, they are where limit_i >= 1, that is where the guide finds anchor and positive alike and the margin is 0),
    and a guide's similarity counts as above the limit from 8 units of rounding on, so that copies of the positive are
    kept as they are there.

    Source: GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning.
    """

    def __init__(
        self, model: Any = None, guide: Any = None, temperature: float = 0.01, margin_strategy: str = "absolute",
        margin: float = 0.0, contrast_anchors: bool = True, contrast_positives: bool = True,
        gather_across_devices: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if margin_strategy not in _STRATEGIES:
            raise ValueError(f"margin_strategy must be one of {', '.join(_STRATEGIES)}, got {margin_strategy!r}")
        if (model is None) != (guide is None):
            raise ValueError("model and guide come together, or both are None")
        self.model, self.guide, self.temperature = model, guide, temperature
        self.margin_strategy, self.margin = margin_strategy, margin
        self.contrast_anchors, self.contrast_positives = contrast_anchors, contrast_positives
        self.gather_across_devices = gather_across_devices
        self.must_retokenize = model is not None and self._tokenizers_differ()

    def _tokenizers_differ(self) -> bool:
        for name, x in (("model", self.model), ("guide", self.guide)):
            if not hasattr(getattr(x, "tokenizer", None), "get_vocab"):
                raise ValueError(f"the {name} must have a tokenizer with get_vocab(), got {type(x).__name__}")
        same = self.model.tokenizer.get_vocab() == self.guide.tokenizer.get_vocab()
        return not same or self.guide.max_seq_length < self.model.max_seq_length

    @property
    def citation(self) -> str:
        """The paper, for the model card that sentence-transformers writes."""
        return _CITATION

    def _guide_features(self, features: dict[str, Any]) -> dict[str, Any]:
        """The same texts for the guide, in a dict of their own: models write into theirs."""
        if not self.must_retokenize:
            return dict(features)
        if "input_ids" not in features or "cu_seq_lens_q" in features:
            raise ValueError(
                "a guide with another tokenizer needs input_ids [B, length] to read the texts back, "
                f"got features {', '.join(features)}"
            )
        texts = self.model.tokenizer.batch_decode(features["input_ids"], skip_special_tokens=True)
        tokenize = getattr(self.guide, "preprocess", None) or self.guide.tokenize
        device = self.guide.device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in tokenize(texts).items()}

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Any = None) -> Tensor:
        """The loss of columns of tokenised texts: (anchors, positives) or (anchors, positives, negatives). Labels are
        not used."""
        features = list(sentence_features)
        guide_features = [self._guide_features(column) for column in features]
        embeddings = embed(self.model, features)
        with torch.no_grad():
            guides = embed(self.guide, guide_features)
        return self.compute_loss_from_embeddings(embeddings, guides, labels)

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], guide_embeddings: Sequence[Tensor], labels: Any = None
    ) -> Tensor:
        """The loss of embeddings (anchors, positives) or (anchors, positives, negatives), each [B, D], and the guide's
        of the same texts, each [B, E]."""
        check_embeddings("embeddings", embeddings, 2, 3)
        check_embeddings("guide_embeddings", guide_embeddings, 2, 3)
        if len(embeddings) != len(guide_embeddings) or len(embeddings[0]) != len(guide_embeddings[0]):
            raise ValueError(
                f"guide_embeddings must be of the same texts as embeddings, got {len(guide_embeddings)} of "
                f"{len(guide_embeddings[0])} rows for {len(embeddings)} of {len(embeddings[0])}"
            )
        guides = [unit(g.detach()) for g in guide_embeddings]
        limit = self._limit(guides[0], guides[1])
        anchor, positive = embeddings[:2]
        keys, guide_keys, first = list(embeddings[1:]), guides[1:], 0
        if self.gather_across_devices:
            keys = [gather_keys(k) for k in keys]
            guide_keys = [gather_keys(g, gradient=False) for g in guide_keys]
            first = place().rank * len(anchor)
        own = Diagonal(first)
        options: dict[str, Any] = {"scale": 1 / self.temperature, "normalize": True, "columns": False}
        stats = pair_stats(anchor, keys[0], positive=own, guide=Guide(guides[0], guide_keys[0], limit), **options)
        negative, options["positive"] = stats.neg_lse, None
        if self.contrast_anchors:
            guide = Guide(guides[0], guides[0], limit)
            negative = logaddexp(negative, pair_stats(anchor, guide=guide, **options).neg_lse)
        if self.contrast_positives:
            guide = Guide(guides[1], guide_keys[0], limit)
            negative = logaddexp(negative, pair_stats(positive, keys[0], excluded=own, guide=guide, **options).neg_lse)
        if len(keys) == 2:
            guide = Guide(guides[0], guide_keys[1], limit)
            negative = logaddexp(negative, pair_stats(anchor, keys[1], guide=guide, **options).neg_lse)
        return softplus(negative - stats.pos_sum).mean()

    def _limit(self, anchor: Tensor, positive: Tensor) -> Tensor:
        guided = (anchor * positive).sum(1)
        limit = guided - self.margin * (guided.abs() if self.margin_strategy == "relative" else 1)
        return limit + 8 * torch.finfo(limit.dtype).eps

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card shows."""
        names = (
            "guide", "temperature", "margin_strategy", "margin", "contrast_anchors", "contrast_positives",
            "gather_across_devices",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}
