"""Pairs as users call them: `pair_stats`, `pair_map`, `pair_histogram`, `row_topk`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import NUM_PAIR_COLUMN_STATS, PairClasses, PairFunction, PairMapStat, PairWant
from . import autograd
from .arguments import INF, Temperature, make_pairing, number, vector
from .batch import batched_pair_stats
from .classes import Diagonal, Guide, PairSets
from .pairing import Pairing
from .self_similarity import is_symmetric, self_stats
from .small import MOST_PAIRS, dense_nll
from .statistics import PairStats

#: Row i belongs to column i; without k, where that would be a row with itself, it stands for no positives.
DIAGONAL = Diagonal(0)
_FUNCTIONS = {f.name.lower(): f for f in PairFunction}
_CLASSES = {"negative": PairClasses.NEGATIVE, "positive": PairClasses.POSITIVE, "both": PairClasses.BOTH}


class PairMap(NamedTuple):
    """Sums of phi over the pairs of each row; every field [M]. The counts have no gradient."""

    neg: Tensor  # sum over the negatives of phi(z - neg_threshold)
    pos: Tensor  # sum over the positives of phi(pos_threshold - z)
    neg_active: Tensor  # negatives with z >= neg_threshold
    pos_active: Tensor  # positives with z <= pos_threshold
    neg_count: Tensor
    pos_count: Tensor


class PairHistogram(NamedTuple):
    """Counts [bins] of negatives and of positives around the `centers` [bins], each pair shared by its two neighbours."""

    neg: Tensor
    pos: Tensor
    centers: Tensor


class TopPairs(NamedTuple):
    """The best columns of each row, [M, count]: z falling; -inf and column -1 where there are fewer. No gradient."""

    values: Tensor
    columns: Tensor


def pair_stats(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: Temperature = 1.0,
    column_scale: Tensor | None = None,
    bias: float | Tensor | None = None,
    positive: PairSets = DIAGONAL,
    excluded: PairSets = None,
    row_valid: Tensor | None = None,
    column_valid: Tensor | None = None,
    window: tuple[Tensor | float | None, Tensor | float | None] | None = None,
    guide: Guide | None = None,
    hardness: float = 0.0,
    margin: float | Tensor | None = None,
    second_scale: float | None = None,
    mean: bool = False,
    columns: bool = True,
    normalize: bool = False,
    max_kept_bytes: int | None = None,
) -> PairStats:
    """Log-sum-exps, sums and counts of the negatives and the positives of each row and column of a similarity matrix that
    is never stored.

        s_ij = <q_i, k_j> (cosines with `normalize`),   z_ij = scale_i column_scale_j s_ij + bias

    Every pair is excluded, else positive, else negative; so a loss is a few lines on vectors:

        stats = fastloss.pair_stats(image, text, scale=logit_scale, normalize=True)
        clip = (stats.nll.mean() + stats.columns.nll.mean()) / 2

    Args:
        q: [M, D], or a batch [B, M, D] (then every other tensor has B in front); float32, float16, bfloat16, float64.
        k: [N, D]; None for q itself: then each pair of a row with itself is excluded, `positive` defaults to none, and
            a symmetric matrix costs three quarters.
        scale: > 0, a number, a tensor [] or [M] (1 / temperature; its gradient is computed).
        column_scale: [N] > 0, or None. `window` and `hardness` then are not taken.
        bias: added to every z; its gradient is computed.
        positive, excluded: `Diagonal`, `SameId`, `PairMask`, several of them (their union), or None.
        row_valid, column_valid: bool [M], [N]; what is not valid may hold anything and is not used (a queue half filled).
        window: (low, high), numbers, [M] or None: a negative counts only where low_i <= s_ij <= high_i.
        guide: a `Guide`, whose similarity says which negatives are false.
        hardness: alpha: hardness * s_ij without gradient is added to the z of negatives.
        margin: subtracted from the z of positives, a number or [M]; no gradient.
        second_scale: r > 0: also the log-sum-exp of r z over the negatives (`second_neg_lse`).
        mean: also E[z] under the softmax of the negatives (`neg_mean`).
        columns: also the statistics of the columns.
        normalize: divide q and k by their norms, inside: s are cosines. A zero vector has cosine 0.
        max_kept_bytes: memory that a CPU kernel may fill with similarities for its backward, None for its own choice.

    Saved for the backward: q, k, the classes as they were given, a few float32 per row and column, and on a CPU, for float32 with
    D >= 512, up to 64 MiB of similarities (`max_kept_bytes`). Deterministic on every backend.

    Raises ValueError for shapes that do not match, temperatures that are not positive (seen on a CPU), unknown options;
    TypeError for dtypes that do not match. NaN in an embedding makes every number NaN that it counts for.
    """
    if q.dim() == 3:
        return batched_pair_stats(
            pair_stats, q, k, scale=scale, column_scale=column_scale, bias=bias, positive=positive, excluded=excluded,
            row_valid=row_valid, column_valid=column_valid, window=window, guide=guide, hardness=hardness, margin=margin,
            second_scale=second_scale, mean=mean, columns=columns, normalize=normalize, max_kept_bytes=max_kept_bytes,
        )  # fmt: skip
    if k is None and positive is DIAGONAL:
        positive = None
    made = make_pairing(
        q, k, scale, column_scale, positive, excluded, row_valid, column_valid, window, guide, normalize, hardness, margin
    )  # fmt: skip
    want = PairWant.NOTHING
    if mean:
        want |= PairWant.MEAN
    if second_scale is not None:
        if not 0 < second_scale < INF:
            raise ValueError(f"second_scale must be finite and > 0, got {second_scale}")
        want |= PairWant.SECOND
    added = None if bias is None else number(bias, made.pairing.statistic_dtype, q.device)
    if added is not None and added.numel() != 1:
        raise ValueError(f"bias must be one number, got {list(added.shape)}")
    added = None if added is None else added.reshape(())
    keep = _kept(made.pairing, max_kept_bytes)
    if k is None and not want and is_symmetric(made, scale, positive, excluded):
        table = self_stats(made)
        side = PairStats(table[:NUM_PAIR_COLUMN_STATS], added) if columns else None
        return PairStats(table, added, column_stats=side)
    if columns:
        want |= PairWant.COLUMNS
    rows, column_table = autograd.pair_stats(made.pairing, made.boost, made.margin, want, second_scale or 1.0, keep)
    side = PairStats(column_table, added) if columns else None
    return PairStats(rows, added, second_scale, mean, side)


def pair_nll(
    q: Tensor, k: Tensor | None = None, *, scale: Temperature = 1.0, positive: PairSets = DIAGONAL, excluded: PairSets = None,
    normalize: bool = False, columns: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`nll` of the rows and of the columns (empty unless asked for): what `pair_stats(...).nll` is, and nothing else. A matrix
    of a few thousand pairs is made as a whole, where that is faster than a kernel. Arguments and errors: as `pair_stats`.
    """
    positive = None if k is None and positive is DIAGONAL else positive
    if q.dim() == 2 and q.shape[0] * (q if k is None else k).shape[0] <= MOST_PAIRS:
        made = make_pairing(q, k, scale, None, positive, excluded, None, None, None, None, normalize)
        dense = dense_nll(made)
        if dense is not None:
            return dense.along(1), dense.along(0) if columns else q.new_empty(0)
    stats = pair_stats(
        q, k, scale=scale, positive=positive, excluded=excluded, normalize=normalize, columns=columns
    )  # fmt: skip
    return stats.nll, stats.columns.nll if columns else q.new_empty(0)


#: Memory that a CPU kernel fills with similarities for its backward unless the user says otherwise, where D is so large that
#: making them again costs more than reading them.
KEPT_BYTES = (64 << 20) + 64
KEPT_FROM = (2048, 512)  # features, of 16-bit and of float32 embeddings
KEPT_HEADER = 16  # floats, of csrc/cpu/pair_problem.h


def _kept(p: Pairing, max_bytes: int | None) -> int:
    """How many float32 the forward may keep for its backward."""
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"max_kept_bytes must be >= 0, got {max_bytes}")
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in p[:4])
    pays = max_bytes is not None or p.q.shape[1] >= KEPT_FROM[p.q.dtype == torch.float32]
    if p.device.type != "cpu" or not needed or not pays:
        return 0
    (m, n), limit = p.shape, KEPT_BYTES if max_bytes is None else max_bytes
    return min(limit // 4, KEPT_HEADER + -(-m // 32) * -(-n // 32) * 32 * 32)


def pair_map(
    q: Tensor, k: Tensor | None = None, function: str = "softplus", *,
    neg_threshold: float | Tensor | None = None, pos_threshold: float | Tensor | None = None,
    scale: Temperature = 1.0, column_scale: Tensor | None = None, positive: PairSets = DIAGONAL,
    excluded: PairSets = None, row_valid: Tensor | None = None, column_valid: Tensor | None = None,
    window: tuple[Tensor | float | None, Tensor | float | None] | None = None, guide: Guide | None = None,
    normalize: bool = False,
) -> PairMap:  # fmt: skip
    """Sums of phi(z_ij - neg_threshold_i) over the negatives and of phi(pos_threshold_i - z_ij) over the positives of each row,
    of a similarity matrix that is never stored.

    phi: "softplus" log(1 + e^x), "hinge" max(x, 0), "squared_hinge" max(x, 0)^2, "sigmoid" 1 / (1 + e^-x). The sigmoid loss of
    SigLIP is `pair_map(image, text, scale=t, neg_threshold=-b, pos_threshold=-b)`: softplus(t s + b) of the negatives and
    softplus(-(t s + b)) of the positives.

    Args:
        neg_threshold, pos_threshold: numbers, [] or [M], None for 0; their gradients are computed.
        The others, and the errors, are those of `pair_stats`.
    """
    if function not in _FUNCTIONS:
        raise ValueError(f"unknown pair function {function!r}: one of {', '.join(_FUNCTIONS)}")
    if k is None and positive is DIAGONAL:
        positive = None
    p = make_pairing(
        q, k, scale, column_scale, positive, excluded, row_valid, column_valid, window, guide, normalize
    ).pairing
    thresholds = [
        None if t is None else vector(name, t, p.shape[0], q, p.statistic_dtype).contiguous()
        for name, t in (("neg_threshold", neg_threshold), ("pos_threshold", pos_threshold))
    ]
    table = autograd.pair_map(p, thresholds[0], thresholds[1], int(_FUNCTIONS[function]))
    counts = table.detach()
    return PairMap(
        table[PairMapStat.NEG], table[PairMapStat.POS], counts[PairMapStat.NEG_ACTIVE], counts[PairMapStat.POS_ACTIVE],
        counts[PairMapStat.NEG_COUNT], counts[PairMapStat.POS_COUNT],
    )  # fmt: skip


def pair_histogram(
    q: Tensor, k: Tensor | None = None, *, bins: int, low: float, high: float, scale: Temperature = 1.0,
    column_scale: Tensor | None = None, positive: PairSets = DIAGONAL, excluded: PairSets = None,
    row_valid: Tensor | None = None, column_valid: Tensor | None = None,
    window: tuple[Tensor | float | None, Tensor | float | None] | None = None, guide: Guide | None = None,
    normalize: bool = False,
) -> PairHistogram:  # fmt: skip
    """The distribution of the z of negatives and positives, differentiable: each z in [low, high] is shared linearly by the two
    of `bins` centers beside it, what lies beyond counts for the last one and has no gradient.

    So sum(histogram.neg * f(centers)) is the sum over all negatives of f, interpolated linearly between the centers, and has that
    function's exact gradient. The other arguments and the errors are those of `pair_stats`.
    """
    if not isinstance(bins, int) or bins < 2:
        raise ValueError(f"bins must be an integer >= 2, got {bins!r}")
    if not -INF < low < high < INF:
        raise ValueError(f"low must be below high, both finite; got {low} and {high}")
    if k is None and positive is DIAGONAL:
        positive = None
    p = make_pairing(
        q, k, scale, column_scale, positive, excluded, row_valid, column_valid, window, guide, normalize
    ).pairing
    step = (high - low) / (bins - 1)
    table = autograd.pair_histogram(p, bins, low, step)
    return PairHistogram(table[0], table[1], low + step * torch.arange(bins, device=q.device, dtype=table.dtype))


def row_topk(
    q: Tensor, k: Tensor | None = None, count: int = 1, *, among: str = "negative", scale: Temperature = 1.0,
    column_scale: Tensor | None = None, positive: PairSets = DIAGONAL, excluded: PairSets = None,
    row_valid: Tensor | None = None, column_valid: Tensor | None = None,
    window: tuple[Tensor | float | None, Tensor | float | None] | None = None, guide: Guide | None = None,
    normalize: bool = False,
) -> TopPairs:  # fmt: skip
    """The `count` largest z of each row and their columns, among the "negative", "positive" or "both" pairs, without the
    matrix. Equal ones in the order of their columns.

    Has no gradient: `edge_dot(q, k, rows, columns)` of what was found carries it. The other arguments and the errors are those of
    `pair_stats`.
    """
    if among not in _CLASSES:
        raise ValueError(f"among must be one of {', '.join(_CLASSES)}, got {among!r}")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count must be an integer >= 1, got {count!r}")
    if k is None and positive is DIAGONAL:
        positive = None
    with torch.no_grad():
        p = make_pairing(
            q, k, scale, column_scale, positive, excluded, row_valid, column_valid, window, guide, normalize
        ).pairing
        return TopPairs(*torch.ops.fastloss.row_topk.default(*p, count, int(_CLASSES[among])))
