"""The candidates of `info_nce`, direction by direction: log-sum-exps over the negatives, with all that may be masked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pairs import Diagonal, PairStats, SameId, pair_stats
from ..pairs.arguments import Temperature
from ..pairs.classes import PairSet
from ..pairs.statistics import logaddexp
from .dots import masked_lse, private_similarity, unit
from .false_negatives import Limits


def _labelled(known: Tensor, *others: tuple[Tensor | None, int]) -> Tensor:
    """The ids `known`, then those of others; where one has none, `length` times an id that nothing has."""
    nothing = known.max() + 1
    for ids, _ in others:
        if ids is not None and ids.numel():
            nothing = torch.maximum(nothing, ids.max() + 1)
    return torch.cat((known, *(nothing.expand(n) if ids is None else ids.flatten() for ids, n in others)))


@dataclass(frozen=True)
class Candidates:
    """A batch of queries and keys with their further negatives. What of it is a negative of row i in a direction is what is not
    its positive, not its own hard negative (those are added apart), not excluded by ids and not false by the limits."""

    q: Tensor  # [B, D]
    k: Tensor
    scale: Temperature
    normalize: bool
    limits: Limits
    negatives: Tensor | None  # [B, M, D]
    share: bool  # whether they are negatives of the other rows too
    shared: Tensor | None  # [N, D]
    shared_valid: Tensor | None
    query_ids: Tensor | None
    document_ids: Tensor | None
    negative_ids: Tensor | None
    shared_ids: Tensor | None
    in_batch_hardness: float
    hard_hardness: float

    @property
    def _spread(self) -> Tensor | None:
        """Hard negatives as columns for all, or None."""
        return None if self.negatives is None or not self.share else self.negatives.flatten(0, 1)

    @property
    def columns(self) -> Tensor:
        """What q meets: keys, hard negatives, shared ones."""
        return torch.cat([t for t in (self.k, self._spread, self.shared) if t is not None])

    def _sets(self, hard: bool, shared: bool) -> tuple[list[PairSet] | None, list[PairSet]]:
        """(positive, excluded) of rows against keys, then hard negatives, then shared ones. What has the document of the row's
        positive is put among the positives, whose statistics nobody reads: two relations, one in each set."""
        spread = self._spread if hard else None
        hard_count = 0 if spread is None else spread.shape[0]
        shared_count = 0 if not shared or self.shared is None else self.shared.shape[0]
        excluded: list[PairSet] = [Diagonal()]
        if self.query_ids is not None or hard_count:
            b = self.q.shape[0]
            rows = torch.arange(b, device=self.q.device) if self.query_ids is None else self.query_ids
            owner = None
            if hard_count:
                owner = rows[torch.arange(hard_count, device=rows.device) // (hard_count // b)]
            excluded.append(SameId(rows, _labelled(rows, (owner, hard_count), (None, shared_count))))
        if self.document_ids is None:
            return None, excluded
        parts = ((self.negative_ids, hard_count), (self.shared_ids if shared else None, shared_count))
        known = _labelled(self.document_ids, *((ids if n else None, n) for ids, n in parts))
        return [SameId(self.document_ids, known)], excluded

    def _guide_columns(self, hard: bool, shared: bool) -> Tensor | None:
        guide = self.limits.guide
        if guide is None:
            return None
        parts = [guide.k]
        for wanted, given, told, name in (
            (hard, self._spread, guide.negatives, "negatives"),
            (shared, self.shared, guide.shared, "shared"),
        ):
            if wanted and given is not None:
                if told is None:
                    raise ValueError(f"the guide has no {name}, but there are such candidates")
                parts.append(told.flatten(0, -2))
        return torch.cat(parts)

    @property
    def plain(self) -> bool:
        """Whether the statistics of the columns are those of the direction k -> q."""
        one_scale = not isinstance(self.scale, Tensor) or self.scale.numel() == 1
        masked = self.limits.own is not None or self.limits.guide is not None
        return one_scale and not masked and not self.in_batch_hardness

    def q_to_k(self, columns: bool) -> PairStats:
        """q against keys, hard negatives of others, shared ones."""
        positive, excluded = self._sets(hard=True, shared=True)
        guide = self.limits.guide
        valid = None
        if self.shared_valid is not None and self.shared is not None:
            ahead = self.shared_valid.new_ones(self.columns.shape[0] - self.shared.shape[0])
            valid = torch.cat((ahead, self.shared_valid))
        return pair_stats(
            self.q, self.columns, scale=self.scale, positive=positive, excluded=excluded, column_valid=valid,
            window=self.limits.window(), hardness=self.in_batch_hardness, normalize=self.normalize, columns=columns,
            guide=self.limits.guided(None if guide is None else guide.q, self._guide_columns(True, True)),
        )  # fmt: skip

    def own_negatives(self) -> Tensor | None:
        """lse over the hard negatives of each row's own, [B]."""
        if self.negatives is None:
            return None
        similarity = private_similarity(self.q, self.negatives, self.normalize)
        keep = self.limits.keep_private(similarity)
        if self.document_ids is not None and self.negative_ids is not None:
            other = self.negative_ids != self.document_ids[:, None]
            keep = other if keep is None else keep & other
        scale = self.scale[:, None] if isinstance(self.scale, Tensor) and self.scale.dim() else self.scale
        return masked_lse(scale * similarity + self.hard_hardness * similarity.detach(), keep)

    def _lse(self, rows: Tensor, columns: Tensor, guide: tuple[Tensor | None, Tensor | None], hard: bool) -> Tensor:
        positive, excluded = self._sets(hard=hard, shared=False)
        return pair_stats(
            rows, columns, scale=self.scale, positive=positive, excluded=excluded, window=self.limits.window(),
            guide=self.limits.guided(*guide), normalize=self.normalize, columns=False,
        ).neg_lse  # fmt: skip

    def k_to_q(self) -> Tensor:
        """Each key against the other queries."""
        guide = self.limits.guide
        return self._lse(self.k, self.q, (None, None) if guide is None else (guide.k, guide.q), hard=False)

    def q_to_q(self) -> Tensor:
        """Each query against the other queries."""
        guide = self.limits.guide
        return self._lse(self.q, self.q, (None, None) if guide is None else (guide.q, guide.q), hard=False)

    def k_to_k(self, hard: bool) -> Tensor:
        """Each key against the other keys, and the hard negatives of other rows."""
        guide = self.limits.guide
        columns = self.k if not hard or self._spread is None else torch.cat((self.k, self._spread))
        rows = None if guide is None else guide.k
        return self._lse(self.k, columns, (rows, self._guide_columns(hard, False)), hard=hard)

    def mean_logit(self, k_to_q: bool) -> tuple[Tensor, int]:
        """(mean of z, count) over all candidates of a row, own ones included: s <q_i, mean c>, which needs no matrix."""
        rows, columns = (self.k, self.q) if k_to_q else (self.q, self.columns)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        rows, columns = rows.to(dtype), columns.to(dtype)
        if self.normalize:
            rows, columns = unit(rows), unit(columns)
        total = rows @ columns.sum(0)
        count = columns.shape[0]
        if not k_to_q and self.negatives is not None and not self.share:
            total = total + private_similarity(self.q, self.negatives, self.normalize).sum(1)
            count += self.negatives.shape[1]
        return self.scale * total / count, count


def together(parts: list[Tensor | None]) -> Tensor:
    """log of the sum of what the log-sum-exps `parts` stand for."""
    found = [p for p in parts if p is not None]
    total = found[0]
    for part in found[1:]:
        total = logaddexp(total, part)
    return total
