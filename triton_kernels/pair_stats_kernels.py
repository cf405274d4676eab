"""Statistics of pairs: rows and columns of z_ij = a_i b_j <q_i, k_j> from one sweep over tiles that are never stored.

One exponential serves both directions. Rows need e_ij = e^(z_ij - m_i), m_i the row's running max; a column's sum is then
sum_i e_ij e^(m_i - T) with T = max_i m_i, one multiply-add an element. That is exact to fp32 unless a column lies some 60
nats below T: the sums themselves show it, and such a tile falls back to each column's own max.
"""

import triton
import triton.language as tl

from .common import INF, NAN, NEG_INF, exp, finite, wide
from .linear_row_stats_kernels import place
from .pair_tiles import count_negatives, negative_scores, pair_tile

# Bits of `want`, and planes of the tables and of the partial states, as in csrc/pair_stats.h. In a partial state a log-sum is
# still a sum, relative to its max, and the mean still a first moment.
COLUMNS, MEAN, SECOND = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
NUM_ROW_STATS, NUM_COLUMN_STATS = 9, 7
NEG_MAX, NEG_SUM, POS_MAX, POS_SUM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
POS_TOTAL, NEG_COUNT, POS_COUNT = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
NEG_MEAN, NEG_SECOND = tl.constexpr(7), tl.constexpr(8)


@triton.jit
def column_state(x):
    """(max, sum of e^(x - max)) of a tile's columns; x is -inf where absent."""
    m = tl.max(x, 0)
    return m, tl.sum(exp(x - finite(m)[None, :]), 0)


@triton.jit(do_not_specialize=["M", "N", "first_block", "blocks", "splits", "p0", "p1", "e0", "e1"])
def pair_stats_kernel(q, k, row_scale, column_scale, row_valid, column_valid, positive_rows, positive_columns,
                      excluded_rows, excluded_columns, low, high, guide_q, guide_k, guide_limit, boost, margin, row_part,
                      column_part, first_block, blocks, splits, second, M, N, D, E, stride_q, stride_k, stride_guide_q,
                      stride_guide_k, p0, p1, e0, e1, WANT: tl.constexpr, GENERAL: tl.constexpr, POSITIVE: tl.constexpr,
                      PD: tl.constexpr, ED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                      GROUP: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
                      GUIDE_PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """`blocks` row blocks from first_block on: row_part [9, splits, M], column_part [7, blocks, N]."""
    block, split = place(tl.program_id(0), blocks, splits, GROUP)
    row0 = (first_block + block) * BM
    i = row0 + tl.arange(0, BM)
    m = tl.full([BM], NEG_INF, tl.float32)
    expsum = tl.zeros([BM], tl.float32)
    m_positive = m
    positive_sum, total, negatives, positives, moment, second_sum = expsum, expsum, expsum, expsum, expsum, expsum
    tiles = tl.cdiv(N, BN)
    each = tl.cdiv(tiles, splits)
    plane = wide(blocks) * N
    for tile in range(split * each, tl.minimum((split + 1) * each, tiles)):
        column0 = tile * BN
        j = column0 + tl.arange(0, BN)
        inside = j < N
        z, negative, positive = pair_tile(
            q, k, row_scale, column_scale, row_valid, column_valid, positive_rows, positive_columns, excluded_rows,
            excluded_columns, low, high, guide_q, guide_k, guide_limit, i, j, row0, column0, M, N, D, E, stride_q,
            stride_k, stride_guide_q, stride_guide_k, p0, p1, e0, e1, GENERAL, POSITIVE, PD, ED, BM, BN, BK, EVEN_D, TMA,
            PRECISION, GUIDE_PRECISION, UPCAST
        )  # fmt: skip
        out = column_part + wide(block) * N + j
        if GENERAL:
            one = tl.where(negative, 1.0, 0.0)
            negatives += tl.sum(one, 1)
            if COLUMNS & WANT:
                tl.store(out + NEG_COUNT * plane, tl.sum(one, 0), mask=inside)
        if POSITIVE:
            one = tl.where(positive, 1.0, 0.0)
            here = tl.sum(one, 0)
            if COLUMNS & WANT:
                tl.store(out + POS_COUNT * plane, here, mask=inside)
            if tl.max(here, 0) > 0:
                less = z
                if margin is not None:
                    less = z - tl.load(margin + i, mask=i < M, other=0.0)[:, None]
                positives += tl.sum(one, 1)
                own = tl.where(positive, less, 0.0)
                total += tl.sum(own, 1)
                if COLUMNS & WANT:
                    tl.store(out + POS_TOTAL * plane, tl.sum(own, 0), mask=inside)
                own = tl.where(positive, less, NEG_INF)
                higher = tl.maximum(m_positive, tl.max(own, 1))
                ref = finite(higher)
                positive_sum = positive_sum * exp(m_positive - ref) + tl.sum(exp(own - ref[:, None]), 1)
                m_positive = higher
                if COLUMNS & WANT:
                    column_max, column_sum = column_state(own)
                    tl.store(out + POS_MAX * plane, column_max, mask=inside)
                    tl.store(out + POS_SUM * plane, column_sum, mask=inside)
            elif COLUMNS & WANT:
                tl.store(out + POS_MAX * plane, tl.where(inside, NEG_INF, NEG_INF), mask=inside)
                tl.store(out + POS_SUM * plane, here, mask=inside)
                tl.store(out + POS_TOTAL * plane, here, mask=inside)
        x = negative_scores(z, negative, boost, i, M, GENERAL)
        higher = tl.maximum(m, tl.max(x, 1))
        ref = finite(higher)
        d = x - ref[:, None]
        e = exp(d)
        shrink = exp(m - ref)
        if MEAN & WANT:
            moment = shrink * (moment + (finite(m) - ref) * expsum) + tl.sum(e * tl.maximum(d, -1e20), 1)
        if SECOND & WANT:
            second_sum = second_sum * exp(second * (m - ref)) + tl.sum(exp(second * d), 1)
        expsum = expsum * shrink + tl.sum(e, 1)
        m = higher
        if COLUMNS & WANT:
            column_max = tl.max(x, 0)
            top = finite(tl.max(m, 0))
            column_sum = tl.sum(e * exp(m - top)[:, None], 0)
            seen = tl.where(column_max > NEG_INF, column_sum, 1.0)
            tl.store(out, column_max, mask=inside)
            if tl.min(seen, 0) > 1e-26:
                # An empty column has the sum 0, and e^(top - -inf) would make it NaN.
                column_sum = column_sum * exp(tl.where(column_max > NEG_INF, top - column_max, 0.0))
                tl.store(out + NEG_SUM * plane, column_sum, mask=inside)
            else:
                column_max, column_sum = column_state(x)
                tl.store(out + NEG_SUM * plane, column_sum, mask=inside)
    plane = wide(splits) * M
    out = row_part + wide(split) * M + i
    keep = i < M
    tl.store(out, m, mask=keep)
    tl.store(out + NEG_SUM * plane, expsum, mask=keep)
    if GENERAL:
        tl.store(out + NEG_COUNT * plane, negatives, mask=keep)
    if POSITIVE:
        tl.store(out + POS_MAX * plane, m_positive, mask=keep)
        tl.store(out + POS_SUM * plane, positive_sum, mask=keep)
        tl.store(out + POS_TOTAL * plane, total, mask=keep)
        tl.store(out + POS_COUNT * plane, positives, mask=keep)
    if MEAN & WANT:
        tl.store(out + NEG_MEAN * plane, moment, mask=keep)
    if SECOND & WANT:
        tl.store(out + NEG_SECOND * plane, second_sum, mask=keep)


@triton.jit
def joined(m, expsum, m_more, sum_more):
    """(max, sum) of a union, and by what its two sums were multiplied."""
    higher = tl.maximum(m, m_more)
    ref = finite(higher)
    shrink, shrink_more = exp(m - ref), exp(m_more - ref)
    return higher, expsum * shrink + sum_more * shrink_more, shrink, shrink_more


@triton.jit(do_not_specialize=["SIZE", "OTHER", "M", "parts", "s0", "s1", "r0", "r1", "r2", "r3"])
def pair_merge_kernel(part, table, scores, there, valid, other_valid, other_count, parts, second, SIZE, OTHER, M, s0, s1, r0,
                      r1, r2, r3, ROWS: tl.constexpr, WANT: tl.constexpr, GENERAL: tl.constexpr, POSITIVE: tl.constexpr,
                      PD: tl.constexpr, REMOVED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
                      BLOCK: tl.constexpr):  # fmt: skip
    """part [9 or 7, parts, SIZE] into the table [9 or 7, SIZE] of rows, or of columns, in a fixed order: reruns are bit-equal.

    FIRST: the table holds nothing yet. LAST: take the logs, add the positives on diagonals from `scores` and `there`
    [diagonals, M], at a shift of s0 and s1, and count the negatives where validity and diagonals alone decide: other_count,
    the size of the other side, less what lies at distance r0..r3.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < SIZE
    size = wide(SIZE)
    plane = wide(parts) * SIZE
    out = table + at
    m = tl.full([BLOCK], NEG_INF, tl.float32)
    expsum = tl.zeros([BLOCK], tl.float32)
    m_positive = m
    positive_sum, total, negatives, positives, moment, second_sum = expsum, expsum, expsum, expsum, expsum, expsum
    if not FIRST:
        m = tl.load(out, mask=keep, other=NEG_INF)
        expsum = tl.load(out + NEG_SUM * size, mask=keep, other=0.0)
        if GENERAL:
            negatives = tl.load(out + NEG_COUNT * size, mask=keep, other=0.0)
        if POSITIVE:
            m_positive = tl.load(out + POS_MAX * size, mask=keep, other=NEG_INF)
            positive_sum = tl.load(out + POS_SUM * size, mask=keep, other=0.0)
            total = tl.load(out + POS_TOTAL * size, mask=keep, other=0.0)
            positives = tl.load(out + POS_COUNT * size, mask=keep, other=0.0)
    for n in range(0, parts):
        p = part + wide(n) * SIZE + at
        m_more = tl.load(p, mask=keep, other=NEG_INF)
        sum_more = tl.load(p + NEG_SUM * plane, mask=keep, other=0.0)
        higher, sum_of_both, shrink, shrink_more = joined(m, expsum, m_more, sum_more)
        if ROWS and (MEAN & WANT):
            ref = finite(higher)
            more = tl.load(p + NEG_MEAN * plane, mask=keep, other=0.0)
            moment = shrink * (moment + (finite(m) - ref) * expsum) + shrink_more * (
                more + (finite(m_more) - ref) * sum_more
            )
        if ROWS and (SECOND & WANT):
            more = tl.load(p + NEG_SECOND * plane, mask=keep, other=0.0)
            ref = finite(higher)
            second_sum = second_sum * exp(second * (m - ref)) + more * exp(second * (m_more - ref))
        m, expsum = higher, sum_of_both
        if GENERAL:
            negatives += tl.load(p + NEG_COUNT * plane, mask=keep, other=0.0)
        if POSITIVE:
            m_more = tl.load(p + POS_MAX * plane, mask=keep, other=NEG_INF)
            sum_more = tl.load(p + POS_SUM * plane, mask=keep, other=0.0)
            m_positive, positive_sum, shrink, shrink_more = joined(m_positive, positive_sum, m_more, sum_more)
            total += tl.load(p + POS_TOTAL * plane, mask=keep, other=0.0)
            positives += tl.load(p + POS_COUNT * plane, mask=keep, other=0.0)
    if LAST:
        if not GENERAL:
            negatives = count_negatives(at, valid, other_valid, other_count, SIZE, OTHER, r0, r1, r2, r3, REMOVED)
        for diagonal in tl.static_range(PD):
            source = at - (s0 if diagonal == 0 else s1)
            real = keep & (source >= 0) & (source < M)
            source = wide(diagonal) * M + source
            one = tl.load(there + source, mask=real, other=0.0)
            z = tl.load(scores + source, mask=real, other=0.0)
            own = tl.where(one > 0, z, NEG_INF)
            m_positive, positive_sum, shrink, shrink_more = joined(m_positive, positive_sum, own, one)
            total += z
            positives += one
        if ROWS:
            mean = tl.where(expsum == 0, 0.0, moment / expsum)
            tl.store(out + NEG_MEAN * size, mean, mask=keep)
            if SECOND & WANT:
                second_sum = tl.log(second_sum)
            tl.store(out + NEG_SECOND * size, second_sum, mask=keep)
        m = tl.where((expsum != expsum) & (m < INF), NAN, m)  # the running max does not see a NaN
        m_positive = tl.where((positive_sum != positive_sum) & (m_positive < INF), NAN, m_positive)
        expsum, positive_sum = tl.log(expsum), tl.log(positive_sum)
    tl.store(out, m, mask=keep)
    tl.store(out + NEG_SUM * size, expsum, mask=keep)
    tl.store(out + POS_MAX * size, m_positive, mask=keep)
    tl.store(out + POS_SUM * size, positive_sum, mask=keep)
    tl.store(out + POS_TOTAL * size, total, mask=keep)
    tl.store(out + NEG_COUNT * size, negatives, mask=keep)
    tl.store(out + POS_COUNT * size, positives, mask=keep)
