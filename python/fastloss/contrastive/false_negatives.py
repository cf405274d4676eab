"""Which in-batch negatives are false: those too similar to the query by the model's own score, or by a guide's.

A similarity counts as above a limit from 8 units of rounding on: exact copies of the positive are at the limit of a margin of 0,
and are kept, as in sentence-transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..pairs import Guide
from .arguments import unit, wide
from .dots import own_similarity, private_similarity


@dataclass(frozen=True)
class GuideEmbeddings:
    """What a guide model says of the same texts; no gradient flows into it. (GISTEmbed: Guided In-sample Selection of Training
    Negatives for Text Embedding Fine-tuning.)

    q, k: [B, E]; negatives: [B, M, E] of the rows' own hard negatives; shared: [N, E] of the shared ones.
    margin: a negative is false where its guide similarity exceeds that of the row's positive g_ii less the margin:
        strategy "absolute": g_ii - margin;  "relative": g_ii - |g_ii| margin.
    """

    q: Tensor
    k: Tensor
    negatives: Tensor | None = None
    shared: Tensor | None = None
    margin: float = 0.0
    strategy: str = "absolute"

    def __post_init__(self) -> None:
        if self.strategy not in ("absolute", "relative"):
            raise ValueError(f"strategy must be absolute or relative, got {self.strategy!r}")
        if not math.isfinite(self.margin):
            raise ValueError(f"margin must be finite, got {self.margin}")


class Limits(NamedTuple):
    """The thresholds of each row [B], without gradient; None where nothing is masked."""

    own: Tensor | None  # of the model's own similarity
    guide: GuideEmbeddings | None  # normalised if cosines are wanted
    guide_limit: Tensor | None

    def window(self) -> tuple[None, Tensor] | None:
        """The window of `pair_stats`."""
        return None if self.own is None else (None, self.own)

    def guided(self, rows: Tensor | None, columns: Tensor | None) -> Guide | None:
        """The `Guide` of a matrix of these guide embeddings."""
        if rows is None or columns is None or self.guide_limit is None:
            return None
        return Guide(rows, columns, self.guide_limit)

    def keep_private(self, similarity: Tensor) -> Tensor | None:
        """bool [B, M]: the hard negatives of a row's own that are kept."""
        keep = None
        if self.own is not None:
            keep = similarity.detach() <= self.own[:, None]
        if self.guide is not None and self.guide_limit is not None:
            if self.guide.negatives is None:
                raise ValueError("the guide has no negatives, but there are hard negatives")
            told = private_similarity(self.guide.q, self.guide.negatives, False) <= self.guide_limit[:, None]
            keep = told if keep is None else keep & told
        return keep


def _slack(q: Tensor, k: Tensor, normalize: bool) -> Tensor:
    """What rounding may add to the similarity of q_i with a copy of k_i, [B]."""
    q, k = wide(q), wide(k)
    norms = torch.ones_like(q[:, 0]) if normalize else q.norm(dim=1) * k.norm(dim=1)
    return 8 * torch.finfo(q.dtype).eps * norms


@torch.no_grad()
def limits(
    q: Tensor, k: Tensor, positive: Tensor, own_margin: float | None, guide: GuideEmbeddings | None, normalize: bool
) -> Limits:
    """The thresholds of rows q, k [B, D] from the similarity [B] of each row with its positive."""
    own = None
    if own_margin is not None:
        if not math.isfinite(own_margin):
            raise ValueError(f"own_margin must be finite, got {own_margin}")
        own = positive + own_margin + _slack(q, k, normalize)
    if guide is None:
        return Limits(own, None, None)

    def prepared(x: Tensor) -> Tensor:
        return unit(x) if normalize else x

    if guide.q.dim() != 2 or guide.q.shape != guide.k.shape or guide.q.shape[0] != q.shape[0]:
        raise ValueError(
            f"the guide's q and k must be [{q.shape[0]}, E], got {list(guide.q.shape)} and {list(guide.k.shape)}"
        )
    guide_q, guide_k = prepared(guide.q), prepared(guide.k)
    negatives, shared = (None if x is None else prepared(x) for x in (guide.negatives, guide.shared))
    level = own_similarity(guide_q, guide_k, False)
    margin = guide.margin * (level.abs() if guide.strategy == "relative" else 1.0)
    ready = GuideEmbeddings(guide_q, guide_k, negatives, shared, guide.margin, guide.strategy)
    return Limits(own, ready, level - margin + _slack(guide_q, guide_k, normalize))
