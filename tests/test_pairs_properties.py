"""Properties of the pair functions that hold for any input (hypothesis)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dense_pairs import ROWS_AND_COLUMNS, equal, values
from fastloss import PairMask, SameId, edge_dot, pair_histogram, pair_map, pair_stats
from fastloss import row_topk as top

quick = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 20))
SEEDS = st.integers(0, 10**6)


def problem(sizes: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor, SameId, Tensor, dict[str, Any]]:
    """q, k, ids of the positives, a mask of what is excluded, and both as arguments."""
    (m, n, d), g = sizes, torch.Generator().manual_seed(seed)
    ids = SameId(torch.randint(0, 4, (m,), generator=g), torch.randint(0, 4, (n,), generator=g))
    mask = torch.rand(m, n, generator=g) < 0.2
    sets = {"positive": ids, "excluded": PairMask(mask)}
    return torch.randn(m, d, generator=g), torch.randn(n, d, generator=g), ids, mask, sets


@quick
@given(SIZES, SEEDS)
def test_permuting_columns_permutes(sizes: tuple[int, int, int], seed: int) -> None:
    q, k, ids, mask, sets = problem(sizes, seed)
    order = torch.randperm(len(k), generator=torch.Generator().manual_seed(seed))
    a = values(pair_stats(q, k, **sets), ROWS_AND_COLUMNS)
    permuted = {"positive": SameId(ids.rows, ids.columns[order]), "excluded": PairMask(mask[:, order])}
    b = values(pair_stats(q, k[order], **permuted), ROWS_AND_COLUMNS)
    for name in ROWS_AND_COLUMNS:
        equal(a[name][order] if "columns" in name else a[name], b[name], 2e-5)


@quick
@given(SIZES, SEEDS, st.floats(0, 1))
def test_merging_the_parts_gives_the_whole(sizes: tuple[int, int, int], seed: int, share: float) -> None:
    q, k, ids, mask, sets = problem(sizes, seed)
    cut = round(share * len(k))
    whole = pair_stats(q, k, **sets)
    parts = [
        pair_stats(q, k[s], positive=SameId(ids.rows, ids.columns[s]), excluded=PairMask(mask[:, s]))
        for s in (slice(0, cut), slice(cut, None))
    ]
    for name in ("neg_lse", "pos_lse"):
        both = torch.stack([getattr(p, name) for p in parts])
        equal(torch.logsumexp(both, 0), getattr(whole, name), 2e-5)
    for name in ("pos_sum", "neg_count", "pos_count"):
        equal(getattr(parts[0], name) + getattr(parts[1], name), getattr(whole, name), 5e-5)
    for name in ("neg_lse", "pos_lse", "pos_sum"):
        equal(torch.cat([getattr(p.columns, name) for p in parts]), getattr(whole.columns, name), 2e-5)


@quick
@given(SIZES, SEEDS)
def test_transposing_exchanges_rows_and_columns(sizes: tuple[int, int, int], seed: int) -> None:
    q, k, ids, mask, sets = problem(sizes, seed)
    a = pair_stats(q, k, scale=1.5, **sets)
    b = pair_stats(k, q, scale=1.5, positive=SameId(ids.columns, ids.rows), excluded=PairMask(mask.t()))
    for name in ("neg_lse", "pos_lse", "pos_sum", "nll", "neg_count", "pos_count"):
        equal(getattr(a, name), getattr(b.columns, name), 2e-5)
        equal(getattr(a.columns, name), getattr(b, name), 2e-5)


@quick
@given(SIZES, SEEDS)
def test_the_siblings_agree(sizes: tuple[int, int, int], seed: int) -> None:
    """A histogram's total is the count, its first moment the sum; the best of row_topk is the maximum."""
    q, k, _, _, sets = problem(sizes, seed)
    stats = pair_stats(q, k, normalize=True, **sets)
    histogram = pair_histogram(q, k, bins=9, low=-1.1, high=1.1, normalize=True, **sets)
    for member, count in ((histogram.neg, stats.neg_count), (histogram.pos, stats.pos_count)):
        equal(member.sum(), count.sum(), 1e-3)
    equal((histogram.pos * histogram.centers).sum(), stats.pos_sum.sum(), 1e-3)
    best = top(q, k, 1, normalize=True, **sets)
    equal(best.values[:, 0], stats.neg_max, 1e-5)
    some = best.columns[:, 0] >= 0
    assert torch.equal(some, stats.neg_count > 0)
    rows, columns = some.nonzero()[:, 0], best.columns[some, 0]
    equal(edge_dot(F.normalize(q, dim=1), F.normalize(k, dim=1), rows, columns), best.values[some, 0], 1e-5)
    hinge = pair_map(q, k, "hinge", neg_threshold=-2.0, pos_threshold=2.0, normalize=True, **sets)
    equal(2 * stats.pos_count - hinge.pos, stats.pos_sum, 1e-4)
    equal(hinge.neg_count, stats.neg_count)
