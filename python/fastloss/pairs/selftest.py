"""The pair ops in the self-test of `fastloss info`: cross entropy of q kᵀ, the sum over the rows, by each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .classes import SameId
from .edges import edge_dot
from .engine import pair_histogram, pair_map, pair_stats, row_topk

#: No |<q, k>| of the self-test is as large.
BOUND = 32.0


def _classes(q: Any, k: Any, target: Any) -> SameId:
    """Row i is positive with column target_i."""
    return SameId(target, torch.arange(len(k), device=q.device))


def _lse(q: Any, k: Any, target: Any) -> Any:
    return pair_stats(q, k, positive=_classes(q, k, target), columns=False).lse.sum()


def _without_positives(q: Any, k: Any, target: Any) -> Any:
    """Sum of the negatives' <q, k>, by a matrix product."""
    z = q.float() @ k.float().T
    return z.sum() - z[torch.arange(len(q), device=q.device), target].sum()


def by_stats(q: Any, k: Any, target: Any) -> Any:
    """-log of the share of the positive, of the rows; and the sum over the columns' positives twice, to cancel."""
    stats = pair_stats(q, k, positive=_classes(q, k, target))
    return stats.nll.sum() + stats.pos_sum.sum() - stats.columns.pos_sum.sum()


def by_map(q: Any, k: Any, target: Any) -> Any:
    """max(BOUND - z, 0) and max(z + BOUND, 0) are linear here: the positive's z, and a sum of the negatives' that is known."""
    sums = pair_map(
        q, k, "hinge", neg_threshold=-BOUND, pos_threshold=BOUND, positive=_classes(q, k, target)
    )  # fmt: skip
    own = BOUND * len(q) - sums.pos.sum()
    others = sums.neg.sum() - BOUND * sums.neg_count.sum()
    return _lse(q, k, target) - own + (others - _without_positives(q, k, target)) / len(k)


def by_histogram(q: Any, k: Any, target: Any) -> Any:
    """The first moments of the histograms: the positive's z, and a sum of the negatives' that is known."""
    h = pair_histogram(q, k, bins=65, low=-BOUND, high=BOUND, positive=_classes(q, k, target))
    own, others = (h.pos * h.centers).sum(), (h.neg * h.centers).sum()
    return _lse(q, k, target) - own + (others - _without_positives(q, k, target)) / len(k)


def by_edges(q: Any, k: Any, target: Any) -> Any:
    """The positives as a list of edges."""
    return _lse(q, k, target) - edge_dot(q, k, torch.arange(len(q), device=q.device), target).sum()


def by_topk(q: Any, k: Any, target: Any) -> Any:
    """by_edges, and by how much the three best differ from torch's."""
    best = row_topk(q, k, 3, among="both")
    with torch.no_grad():
        z = q.float() @ k.float().T
        off = (best.values - z.topk(3).values).abs().sum() + (best.values - z.gather(1, best.columns)).abs().sum()
    return by_edges(q, k, target) + off


def cases() -> dict[str, tuple[tuple[str, ...], Callable[..., Any]]]:
    """Name -> (the ops it runs through, the loss of q, k and the column of each row's positive)."""
    stats = ("pair_stats", "pair_stats_backward")
    edges = ("edge_dot", "edge_sum")
    return {
        "pair_stats": (stats, by_stats),
        "pair_map": (("pair_map", "pair_map_backward", *stats), by_map),
        "pair_histogram": (("pair_histogram", "pair_histogram_backward", *stats), by_histogram),
        "edges": ((*edges, *stats), by_edges),
        "row_topk": (("row_topk", *edges, *stats), by_topk),
    }
