"""Sums of phi(z - threshold) over negatives and phi(threshold - z) over positives of each row, and their gradient in <q, k>."""

import triton
import triton.language as tl

from .common import NEG_INF, wide
from .linear_row_stats_kernels import place
from .pair_tiles import count_negatives, negative_scores, pair_tile, scale_or_one, store_gradient
from .pointwise_loss import exponential, twice_atanh

SOFTPLUS, HINGE, SQUARED_HINGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # else sigmoid
#: The rows of the table, positives one after negatives: sum phi, sum phi', how many x >= 0, how many.
NUM_MAP_STATS = tl.constexpr(8)
VALUE, SLOPE, ACTIVE, COUNT = tl.constexpr(0), tl.constexpr(2), tl.constexpr(4), tl.constexpr(6)


@triton.jit
def value_and_slope(x, FUNCTION: tl.constexpr):
    """phi(x) and phi'(x), both 0 at -inf, which stands for a pair of another class; NaN stays."""
    if FUNCTION == HINGE:
        slope = tl.where(x > 0, 1.0, tl.where(x != x, x, 0.0))
        return tl.where(x <= 0, 0.0, x), slope
    elif FUNCTION == SQUARED_HINGE:
        above = tl.where(x <= 0, 0.0, x)
        return above * above, 2.0 * above
    else:
        e = exponential(-tl.abs(x))
        inverse = 1.0 / (1.0 + e)
        sigmoid = tl.where(x < 0, e * inverse, inverse)
        if FUNCTION == SOFTPLUS:
            return tl.where(x < 0, 0.0, x) + twice_atanh(e / (2.0 + e)), sigmoid
        else:
            return sigmoid, e * inverse * inverse


@triton.jit
def below(x, neg_threshold, i, M):
    if neg_threshold is not None:
        x = x - tl.load(neg_threshold + i, mask=i < M, other=0.0)[:, None]
    return x


@triton.jit
def above(z, positive, pos_threshold, i, M):
    """threshold - z of the positives, -inf elsewhere."""
    x = -z
    if pos_threshold is not None:
        x = tl.load(pos_threshold + i, mask=i < M, other=0.0)[:, None] - z
    return tl.where(positive, x, NEG_INF)


@triton.jit(do_not_specialize=["M", "N", "splits", "p0", "p1", "e0", "e1"])
def pair_map_kernel(q, k, row_scale, column_scale, row_valid, column_valid, positive_rows, positive_columns, excluded_rows,
                    excluded_columns, low, high, guide_q, guide_k, guide_limit, neg_threshold, pos_threshold, part, splits,
                    M, N, D, E, stride_q, stride_k, stride_guide_q, stride_guide_k, p0, p1, e0, e1, FUNCTION: tl.constexpr,
                    GENERAL: tl.constexpr, POSITIVE: tl.constexpr, PD: tl.constexpr, ED: tl.constexpr, BM: tl.constexpr,
                    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
                    PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """part [8, splits, M]: the table over each split of the columns; what tiles do not see of it is 0."""
    block, split = place(tl.program_id(0), tl.cdiv(M, BM), splits, GROUP)
    row0 = block * BM
    i = row0 + tl.arange(0, BM)
    zero = tl.zeros([BM], tl.float32)
    value, slope, active, negatives, own_value, own_slope, own_active, positives = (
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
    )
    tiles = tl.cdiv(N, BN)
    each = tl.cdiv(tiles, splits)
    for tile in range(split * each, tl.minimum((split + 1) * each, tiles)):
        column0 = tile * BN
        j = column0 + tl.arange(0, BN)
        z, negative, positive = pair_tile(
            q, k, row_scale, column_scale, row_valid, column_valid, positive_rows, positive_columns, excluded_rows,
            excluded_columns, low, high, guide_q, guide_k, guide_limit, i, j, row0, column0, M, N, D, E, stride_q, stride_k,
            stride_guide_q, stride_guide_k, p0, p1, e0, e1, GENERAL, POSITIVE, PD, ED, BM, BN, BK, EVEN_D, TMA, PRECISION,
            GUIDE_PRECISION, UPCAST
        )  # fmt: skip
        if POSITIVE:
            here = tl.sum(positive.to(tl.float32), 1)
            if tl.max(here, 0) > 0:
                positives += here
                x = above(z, positive, pos_threshold, i, M)
                a, b = value_and_slope(x, FUNCTION)
                own_value += tl.sum(a, 1)
                own_slope += tl.sum(b, 1)
                own_active += tl.sum(tl.where(x >= 0, 1.0, 0.0), 1)
        if GENERAL:
            negatives += tl.sum(negative.to(tl.float32), 1)
        x = below(negative_scores(z, negative, None, i, M, GENERAL), neg_threshold, i, M)
        a, b = value_and_slope(x, FUNCTION)
        value += tl.sum(a, 1)
        slope += tl.sum(b, 1)
        active += tl.sum(tl.where(x >= 0, 1.0, 0.0), 1)
    plane = wide(splits) * M
    out = part + wide(split) * M + i
    keep = i < M
    tl.store(out + VALUE * plane, value, mask=keep)
    tl.store(out + (VALUE + 1) * plane, own_value, mask=keep)
    tl.store(out + SLOPE * plane, slope, mask=keep)
    tl.store(out + (SLOPE + 1) * plane, own_slope, mask=keep)
    tl.store(out + ACTIVE * plane, active, mask=keep)
    tl.store(out + (ACTIVE + 1) * plane, own_active, mask=keep)
    tl.store(out + COUNT * plane, negatives, mask=keep)
    tl.store(out + (COUNT + 1) * plane, positives, mask=keep)


@triton.jit(do_not_specialize=["first", "count", "M", "N", "p0", "p1", "e0", "e1"])
def pair_map_gradient_kernel(q, k, row_scale, column_scale, row_valid, column_valid, positive_rows, positive_columns,
                             excluded_rows, excluded_columns, low, high, guide_q, guide_k, guide_limit, neg_threshold,
                             pos_threshold, grad, row_factor, column_factor, lift, scratch, first, count, M, N, D, E,
                             stride_q, stride_k, stride_guide_q, stride_guide_k, stride_grad, p0, p1, e0, e1,
                             FUNCTION: tl.constexpr, GENERAL: tl.constexpr, POSITIVE: tl.constexpr, PD: tl.constexpr,
                             ED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                             EVEN_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
                             GUIDE_PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """scratch [count, N] = the gradient of <q, k> of rows first : first + count, times *lift."""
    block, part = place(tl.program_id(0), tl.cdiv(count, BM), tl.cdiv(N, BN), GROUP)
    row0 = first + block * BM
    column0 = part * BN
    i = row0 + tl.arange(0, BM)
    j = column0 + tl.arange(0, BN)
    z, negative, positive = pair_tile(
        q, k, row_scale, column_scale, row_valid, column_valid, positive_rows, positive_columns, excluded_rows,
        excluded_columns, low, high, guide_q, guide_k, guide_limit, i, j, row0, column0, M, N, D, E, stride_q, stride_k,
        stride_guide_q, stride_guide_k, p0, p1, e0, e1, GENERAL, POSITIVE, PD, ED, BM, BN, BK, EVEN_D, TMA, PRECISION,
        GUIDE_PRECISION, UPCAST
    )  # fmt: skip
    x = below(negative_scores(z, negative, None, i, M, GENERAL), neg_threshold, i, M)
    _value, slope = value_and_slope(x, FUNCTION)
    dz = slope * tl.load(grad + i, mask=i < M, other=0.0)[:, None]
    if POSITIVE:
        if tl.max(tl.max(positive.to(tl.int32), 1), 0) > 0:
            _value, slope = value_and_slope(above(z, positive, pos_threshold, i, M), FUNCTION)
            dz = tl.where(positive, -slope * tl.load(grad + stride_grad + i, mask=i < M, other=0.0)[:, None], dz)
    store_gradient(scratch, dz, row_factor, column_factor, lift, i, j, row0, first, count, M, N)


@triton.jit
def above_one(z, positive, pos_threshold, i):
    """`above` of one pair a row."""
    x = -z
    if pos_threshold is not None:
        x = tl.load(pos_threshold + i, mask=positive, other=0.0) - z
    return tl.where(positive, x, NEG_INF)


@triton.jit(do_not_specialize=["M", "N", "splits", "r0", "r1", "r2", "r3"])
def pair_map_merge_kernel(part, table, scores, there, row_valid, column_valid, column_count, pos_threshold, splits, M, N, r0,
                          r1, r2, r3, FUNCTION: tl.constexpr, GENERAL: tl.constexpr, PD: tl.constexpr,
                          REMOVED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The table [8, M]: splits in order, the positives on diagonals, and the negatives counted as pair_merge_kernel does."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < M
    size, plane = wide(M), wide(splits) * M
    for row in tl.static_range(NUM_MAP_STATS):
        total = tl.zeros([BLOCK], tl.float32)
        for split in range(0, splits):
            total += tl.load(part + row * plane + wide(split) * M + i, mask=keep, other=0.0)
        if row == COUNT and not GENERAL:
            total = count_negatives(i, row_valid, column_valid, column_count, M, N, r0, r1, r2, r3, REMOVED)
        if row % 2 == 1:
            for diagonal in tl.static_range(PD):
                at = wide(diagonal) * M + i
                positive = tl.load(there + at, mask=keep, other=0.0) > 0
                x = above_one(tl.load(scores + at, mask=keep, other=0.0), positive, pos_threshold, i)
                value, slope = value_and_slope(x, FUNCTION)
                if row == VALUE + 1:
                    total += value
                elif row == SLOPE + 1:
                    total += slope
                elif row == ACTIVE + 1:
                    total += tl.where(x >= 0, 1.0, 0.0)
                else:
                    total += tl.where(positive, 1.0, 0.0)
        tl.store(table + row * size + i, total, mask=keep)


@triton.jit(do_not_specialize=["M", "p0", "p1"])
def pair_map_diagonal_kernel(scores, there, grad, pos_threshold, row_factor, column_factor, weight, M, stride_grad, p0, p1,
                             FUNCTION: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """weight [diagonals, M]: the gradient of <q_i, k_j> of the positives that pair_diagonal_kernel found."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = i + tl.where(tl.program_id(1) == 0, p0, p1)
    at = wide(tl.program_id(1)) * M + i
    positive = tl.load(there + at, mask=i < M, other=0.0) > 0
    x = above_one(tl.load(scores + at, mask=positive, other=0.0), positive, pos_threshold, i)
    _value, slope = value_and_slope(x, FUNCTION)
    dz = -slope * tl.load(grad + stride_grad + i, mask=positive, other=0.0)
    dz *= tl.load(row_factor + i, mask=positive, other=0.0) * scale_or_one(column_factor, j, positive)
    tl.store(weight + at, tl.where(positive, dz, 0.0), mask=i < M)
