"""The gradient of pair_stats in <q, k>: tiles of it to a scratch, and the pairs on diagonals, one a row, apart in fp32."""

import triton
import triton.language as tl

from .common import INF, NEG_INF, absent_if_empty, exp, finite, wide
from .linear_row_stats_kernels import place
from .pair_stats_kernels import (
    COLUMNS,
    MEAN,
    NEG_MAX,
    NEG_MEAN,
    NEG_SECOND,
    NEG_SUM,
    POS_MAX,
    POS_SUM,
    POS_TOTAL,
    SECOND,
)
from .pair_tiles import negative_scores, pair_tile, scale_or_one, store_gradient


@triton.jit
def reference(table, stride, at, inside, MAX: tl.constexpr, LOG_SUM: tl.constexpr):
    """Max and log-sum of each row, made safe: e^(z - max - log-sum) is 0 where the set is empty."""
    m = tl.load(table + MAX * stride + at, mask=inside, other=NEG_INF)
    logsum = tl.load(table + LOG_SUM * stride + at, mask=inside, other=NEG_INF)
    return finite(m), absent_if_empty(logsum)


@triton.jit
def upstream(grad, stride, at, inside, ROW: tl.constexpr):
    return tl.load(grad + ROW * stride + at, mask=inside, other=0.0)


@triton.jit
def upstream_of_set(grad, stride, at, inside, logsum, ROW: tl.constexpr):
    """0 for an empty set, whatever is upstream of its -inf."""
    return tl.where(logsum == INF, 0.0, upstream(grad, stride, at, inside, ROW))


@triton.jit
def negative_gradient(x, rows, row_grad, columns, column_grad, i, j, M, N, stride_rows, stride_row_grad, stride_columns,
                      stride_column_grad, second, WANT: tl.constexpr):  # fmt: skip
    """d loss / d x of the negatives; x is -inf where there is none, and the result 0."""
    inside = i < M
    m, logsum = reference(rows, stride_rows, i, inside, NEG_MAX, NEG_SUM)
    g = upstream_of_set(row_grad, stride_row_grad, i, inside, logsum, NEG_SUM)
    if MEAN & WANT:
        g_mean = upstream_of_set(row_grad, stride_row_grad, i, inside, logsum, NEG_MEAN)
        g += g_mean * (1.0 - tl.load(rows + NEG_MEAN * stride_rows + i, mask=inside, other=0.0))
        moved = tl.maximum(x - m[:, None], -1e20)  # 0 * -inf would be NaN
    if COLUMNS & WANT:
        counted = j < N
        column_max, column_logsum = reference(columns, stride_columns, j, counted, NEG_MAX, NEG_SUM)
        h = upstream_of_set(column_grad, stride_column_grad, j, counted, column_logsum, NEG_SUM)
        # e^(x - top) times one factor a row and one a column: one exponential for both. top bounds every negative of the tile.
        # Exact while all log-sum-exps of the tile lie within 40 nats of it: what lies below e^-40 of its own may be flushed.
        of_row, of_column = m + logsum, column_max + column_logsum  # +inf where empty
        top = tl.minimum(tl.max(tl.where(of_row == INF, NEG_INF, of_row), 0),
                         tl.max(tl.where(of_column == INF, NEG_INF, of_column), 0))  # fmt: skip
        bottom = tl.minimum(tl.min(of_row, 0), tl.min(of_column, 0))
        if top - bottom < 40.0:
            top = finite(top)
            row_share = exp((top - m) - logsum)
            shares = (g * row_share)[:, None] + (h * exp((top - column_max) - column_logsum))[None, :]
            if MEAN & WANT:
                shares += (g_mean * row_share)[:, None] * moved
            dz = exp(x - top) * shares
        else:
            dz = exp((x - m[:, None]) - logsum[:, None])
            if MEAN & WANT:
                dz = dz * (g[:, None] + g_mean[:, None] * moved)
            else:
                dz = dz * g[:, None]
            dz += h[None, :] * exp((x - column_max[None, :]) - column_logsum[None, :])
    else:
        dz = exp((x - m[:, None]) - logsum[:, None])
        if MEAN & WANT:
            dz = dz * (g[:, None] + g_mean[:, None] * moved)
        else:
            dz = dz * g[:, None]
    if SECOND & WANT:
        log_second = absent_if_empty(tl.load(rows + NEG_SECOND * stride_rows + i, mask=inside, other=NEG_INF))
        g_second = second * upstream_of_set(row_grad, stride_row_grad, i, inside, log_second, NEG_SECOND)
        dz += g_second[:, None] * exp(second * (x - m[:, None]) - log_second[:, None])
    return dz


@triton.jit(do_not_specialize=["first", "count", "M", "N", "p0", "p1", "e0", "e1"])
def pair_gradient_kernel(q, k, row_scale, column_scale, row_valid, column_valid, positive_rows, positive_columns,
                         excluded_rows, excluded_columns, low, high, guide_q, guide_k, guide_limit, boost, margin, rows,
                         row_grad, columns, column_grad, row_factor, column_factor, lift, scratch, first, count, second, M,
                         N, D, E, stride_q, stride_k, stride_guide_q, stride_guide_k, stride_rows, stride_row_grad,
                         stride_columns, stride_column_grad, p0, p1, e0, e1, WANT: tl.constexpr, GENERAL: tl.constexpr,
                         POSITIVE: tl.constexpr, PD: tl.constexpr, ED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                         BK: tl.constexpr, GROUP: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
                         PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """scratch [count, N] = the gradient of <q, k> of rows first : first + count, times *lift. One tile a program and no state
    carried: the plain shape of a GEMM."""
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
    x = negative_scores(z, negative, boost, i, M, GENERAL)
    dz = negative_gradient(x, rows, row_grad, columns, column_grad, i, j, M, N, stride_rows, stride_row_grad,
                           stride_columns, stride_column_grad, second, WANT)  # fmt: skip
    if POSITIVE:
        if tl.max(tl.max(positive.to(tl.int32), 1), 0) > 0:
            if margin is not None:
                z = z - tl.load(margin + i, mask=i < M, other=0.0)[:, None]
            m, logsum = reference(rows, stride_rows, i, i < M, POS_MAX, POS_SUM)
            g = upstream(row_grad, stride_row_grad, i, i < M, POS_SUM)
            own = g[:, None] * exp((z - m[:, None]) - logsum[:, None])
            own += upstream(row_grad, stride_row_grad, i, i < M, POS_TOTAL)[:, None]
            if COLUMNS & WANT:
                m, logsum = reference(columns, stride_columns, j, j < N, POS_MAX, POS_SUM)
                h = upstream(column_grad, stride_column_grad, j, j < N, POS_SUM)
                own += h[None, :] * exp((z - m[None, :]) - logsum[None, :])
                own += upstream(column_grad, stride_column_grad, j, j < N, POS_TOTAL)[None, :]
            dz = tl.where(positive, own, dz)
    store_gradient(scratch, dz, row_factor, column_factor, lift, i, j, row0, first, count, M, N)


@triton.jit
def positive_gradient(z, table, grad, stride, stride_grad, at, inside):
    m, logsum = reference(table, stride, at, inside, POS_MAX, POS_SUM)
    share = exp((z - m) - logsum)
    return upstream(grad, stride_grad, at, inside, POS_SUM) * share + upstream(grad, stride_grad, at, inside, POS_TOTAL)


@triton.jit(do_not_specialize=["M", "N", "p0", "p1"])
def pair_diagonal_gradient_kernel(scores, there, rows, row_grad, columns, column_grad, row_factor, column_factor, weight, M,
                                  N, stride_rows, stride_row_grad, stride_columns, stride_column_grad, p0, p1,
                                  WANT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """weight [diagonals, M]: the gradient of <q_i, k_j> of the positives that pair_diagonal_kernel found."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = i + tl.where(tl.program_id(1) == 0, p0, p1)
    at = wide(tl.program_id(1)) * M + i
    positive = tl.load(there + at, mask=i < M, other=0.0) > 0
    z = tl.load(scores + at, mask=positive, other=0.0)
    dz = positive_gradient(z, rows, row_grad, stride_rows, stride_row_grad, i, positive)
    if COLUMNS & WANT:
        dz += positive_gradient(z, columns, column_grad, stride_columns, stride_column_grad, j, positive)
    dz *= tl.load(row_factor + i, mask=positive, other=0.0) * scale_or_one(column_factor, j, positive)
    tl.store(weight + at, tl.where(positive, dz, 0.0), mask=i < M)
