"""What the pair kernels share: the scores of a tile, the classes of its pairs, and the pairs along a diagonal.

docs/design.md, "The pair contract", says what each class is. What is rare is decided by a branch on the tile and not by a
select on each element: does a diagonal cross it, does it hold a row or a column that does not count?
"""

import triton
import triton.language as tl

from .common import NEG_INF, wide
from .linear_row_stats_kernels import tile_product


@triton.jit
def crosses(row0, column0, offset, BM: tl.constexpr, BN: tl.constexpr):
    """Does the diagonal j = i + offset pass through this tile?"""
    away = column0 - row0
    return (offset > away - BM) & (offset < away + BN)


@triton.jit
def cross(row0, column0, offset, second_offset, DIAGONALS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Does one of the diagonals?"""
    hit = crosses(row0, column0, offset, BM, BN)
    if DIAGONALS == 2:
        hit = hit | crosses(row0, column0, second_offset, BM, BN)
    return hit


@triton.jit
def on_diagonals(i, j, offset, second_offset, DIAGONALS: tl.constexpr):
    """Which pairs of the tile lie on one of the diagonals?"""
    away = j[None, :] - i[:, None]
    hit = away == offset
    if DIAGONALS == 2:
        hit = hit | (away == second_offset)
    return hit


@triton.jit
def listed(rows, columns, i, j, column0, M, N, BN: tl.constexpr):
    """Which pairs of the tile have equal ids, or, without `columns`, their bit set? column0 is a multiple of 32."""
    if columns is not None:
        a = tl.load(rows + i, mask=i < M, other=0)
        b = tl.load(columns + j, mask=j < N, other=0)
        return a[:, None] == b[None, :]
    else:
        # A few words a row, spread by selects: a load for each element would need an address for each.
        words = tl.cdiv(N, 32)
        first = column0 // 32
        place = j // 32 - first
        word = tl.zeros([1, BN], tl.int32)
        for n in tl.static_range(BN // 32):
            next_word = tl.load(
                rows + wide(i) * words + (first + n), mask=(i < M) & (i * 0 + first + n < words), other=0
            )
            word = tl.where((place == n)[None, :], next_word[:, None], word)
        return ((word >> (j % 32)[None, :]) & 1) != 0


@triton.jit
def counts(valid, i, M):
    """Is there such a row (or column), and is it valid?"""
    inside = i < M
    if valid is not None:
        inside = inside & (tl.load(valid + i, mask=inside, other=0) != 0)
    return inside


@triton.jit
def all_count(valid, inside, row0, M, BM: tl.constexpr):
    """Do all rows (or columns) of the tile count? Without `valid` no vector is looked at."""
    if valid is not None:
        return tl.min(inside.to(tl.int32), 0) > 0
    else:
        return row0 + BM <= M


@triton.jit
def pair_tile(q, k, row_scale, column_scale, row_valid, column_valid, positive_rows, positive_columns, excluded_rows,
              excluded_columns, low, high, guide_q, guide_k, guide_limit, i, j, row0, column0, M, N, D, E, stride_q,
              stride_k, stride_guide_q, stride_guide_k, p0, p1, e0, e1, GENERAL: tl.constexpr, POSITIVE: tl.constexpr,
              PD: tl.constexpr, ED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
              EVEN_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr,
              UPCAST: tl.constexpr):  # fmt: skip
    """One tile: (z, negative, positive); `negative_scores` makes of the first two what the sums over negatives take.

    PD and ED count the diagonals p0, p1 of positives and e0, e1 of exclusions. GENERAL: more than diagonals and validity decides.
    Then `negative` is a mask, else it is not made and z is -inf where no negative is. POSITIVE: `positive` is a mask too. Else
    positives lie on diagonals, which are only left out here (pair_diagonal_kernel reads them).
    """
    z = tile_product(q, k, row0, column0, M, N, D, stride_q, stride_k, BM, BN, BK, EVEN_D, TMA, PRECISION, UPCAST)
    z = z * tl.load(row_scale + i, mask=i < M, other=0.0)[:, None]
    if column_scale is not None:
        z = z * tl.load(column_scale + j, mask=j < N, other=0.0)[None, :]
    row_counts, column_counts = counts(row_valid, i, M), counts(column_valid, j, N)
    if GENERAL:
        allowed = row_counts[:, None] & column_counts[None, :]
        if excluded_rows is not None:
            allowed = allowed & (listed(excluded_rows, excluded_columns, i, j, column0, M, N, BN) == 0)
        if ED:
            if cross(row0, column0, e0, e1, ED, BM, BN):
                allowed = allowed & (on_diagonals(i, j, e0, e1, ED) == 0)
        negative = allowed
        positive = allowed
        if POSITIVE:
            positive = tl.zeros([BM, BN], tl.int1)
            if positive_rows is not None:
                positive = listed(positive_rows, positive_columns, i, j, column0, M, N, BN)
            if PD:
                if cross(row0, column0, p0, p1, PD, BM, BN):
                    positive = positive | on_diagonals(i, j, p0, p1, PD)
            negative = allowed & (positive == 0)
            positive = allowed & positive
        elif PD:
            if cross(row0, column0, p0, p1, PD, BM, BN):
                negative = negative & (on_diagonals(i, j, p0, p1, PD) == 0)
        if low is not None:  # what is not below is kept, so that a NaN stays and is seen
            negative = negative & ((z < tl.load(low + i, mask=i < M, other=0.0)[:, None]) == 0)
        if high is not None:
            negative = negative & ((z > tl.load(high + i, mask=i < M, other=0.0)[:, None]) == 0)
        if guide_q is not None:
            guide = tile_product(guide_q, guide_k, row0, column0, M, N, E, stride_guide_q, stride_guide_k, BM, BN, BK, False,
                                 False, GUIDE_PRECISION, UPCAST)  # fmt: skip
            negative = negative & ((guide > tl.load(guide_limit + i, mask=i < M, other=0.0)[:, None]) == 0)
        return z, negative, positive
    else:
        if ED:
            if cross(row0, column0, e0, e1, ED, BM, BN):
                z = tl.where(on_diagonals(i, j, e0, e1, ED), NEG_INF, z)
        if PD:
            if cross(row0, column0, p0, p1, PD, BM, BN):
                z = tl.where(on_diagonals(i, j, p0, p1, PD), NEG_INF, z)
        whole = all_count(row_valid, row_counts, row0, M, BM) & all_count(column_valid, column_counts, column0, N, BN)
        if whole == 0:  # a select and not an added -inf: what does not count may be NaN
            z = tl.where(row_counts[:, None] & column_counts[None, :], z, NEG_INF)
        return z, z, z


@triton.jit
def negative_scores(z, negative, boost, i, M, GENERAL: tl.constexpr):
    """z of the negatives, times `boost` of their rows; -inf elsewhere."""
    x = z
    if boost is not None:
        f = tl.load(boost + i, mask=i < M, other=1.0)[:, None]
        x = z * f
    if GENERAL:
        x = tl.where(negative, x, NEG_INF)
    elif boost is not None:
        x = tl.where(z == NEG_INF, NEG_INF, x)  # whatever the sign of the boost
    return x


@triton.jit
def count_negatives(at, valid, other_valid, other_count, SIZE, OTHER, r0, r1, r2, r3, REMOVED: tl.constexpr):
    """Negatives of each row (or column) where validity and diagonals alone decide: those of the other side that count, less the
    REMOVED ones at distance r0..r3."""
    counted = counts(valid, at, SIZE)
    total = tl.where(counted, tl.load(other_count), 0.0)
    for n in tl.static_range(REMOVED):
        other = at + (r0 if n == 0 else (r1 if n == 1 else (r2 if n == 2 else r3)))
        taken = counted & counts(other_valid, tl.where(other < 0, OTHER, other), OTHER)
        total -= tl.where(taken, 1.0, 0.0)
    return total


@triton.jit
def store_gradient(scratch, dz, row_factor, column_factor, lift, i, j, row0, first, count, M, N):
    """dz to rows first : first + count of the scratch, which holds the gradient of <q, k>, times *lift, in its own dtype."""
    by = tl.load(row_factor + i, mask=i < M, other=0.0)
    if lift is not None:
        by *= tl.load(lift)
    dz = dz * by[:, None]
    if column_factor is not None:
        dz = dz * tl.load(column_factor + j, mask=j < N, other=0.0)[None, :]
    out = scratch + wide(row0 - first) * N + ((i - row0)[:, None] * N + j[None, :])
    tl.store(out, dz.to(scratch.dtype.element_ty), mask=(i < first + count)[:, None] & (j < N)[None, :])


@triton.jit
def scale_or_one(scale, j, inside):
    if scale is not None:
        return tl.load(scale + j, mask=inside, other=0.0)
    else:
        return tl.where(inside, 1.0, 0.0)


@triton.jit(do_not_specialize=["M", "N", "p0", "p1", "e0", "e1"])
def pair_diagonal_kernel(q, k, row_scale, column_scale, row_valid, column_valid, excluded_rows, excluded_columns, margin,
                         scores, there, M, N, D, stride_q, stride_k, p0, p1, e0, e1, ED: tl.constexpr, BM: tl.constexpr,
                         BK: tl.constexpr):  # fmt: skip
    """The pairs (i, i + p0) and (i, i + p1): scores [diagonals, M], 0 where there is none, and 1 or 0 in `there`. One
    pair a row is vector work."""
    offset = tl.where(tl.program_id(1) == 0, p0, p1)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = i + offset
    inside = (i < M) & (j >= 0) & (j < N)
    positive = inside
    if row_valid is not None:
        positive = positive & (tl.load(row_valid + i, mask=inside, other=0) != 0)
    if column_valid is not None:
        positive = positive & (tl.load(column_valid + j, mask=inside, other=0) != 0)
    if ED:
        positive = positive & (j - i != e0)
    if ED == 2:
        positive = positive & (j - i != e1)
    if excluded_rows is not None:
        if excluded_columns is not None:
            row_id = tl.load(excluded_rows + i, mask=inside, other=0)
            positive = positive & (row_id != tl.load(excluded_columns + j, mask=inside, other=0))
        else:
            word = tl.load(excluded_rows + wide(i) * tl.cdiv(N, 32) + j // 32, mask=inside, other=0)
            positive = positive & (((word >> (j % 32)) & 1) == 0)
    total = tl.zeros([BM], tl.float32)
    d = tl.arange(0, BK)
    for d0 in range(0, D, BK):
        some = positive[:, None] & (d[None, :] < D - d0)
        a = tl.load(q + wide(i)[:, None] * stride_q + (d0 + d)[None, :], mask=some, other=0.0).to(tl.float32)
        b = tl.load(k + wide(j)[:, None] * stride_k + (d0 + d)[None, :], mask=some, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 1)
    z = total * tl.load(row_scale + i, mask=positive, other=0.0) * scale_or_one(column_scale, j, positive)
    if margin is not None:
        z -= tl.load(margin + i, mask=positive, other=0.0)
    out = wide(tl.program_id(1)) * M + i
    tl.store(scores + out, tl.where(positive, z, 0.0), mask=i < M)
    tl.store(there + out, tl.where(positive, 1.0, 0.0), mask=i < M)
