"""The statistics of `row_terms`: one program a row, or several that share the columns of one row.

Pass 1 (row_terms_scan.py) finds maxima and log-sums; pass 2, where something wants it, sums over the columns. A program that
has a row to itself walks backwards in pass 2: the columns it read last are the likeliest to be in cache still. Ignored rows
are neither read nor written: the launcher fills the tables with what they hold.
"""

import triton
import triton.language as tl

from .common import ARGMAX, ENTROPY, INF, NEG_INF, SUM, SUMSQ, exp, finite, wide
from .row_stats_kernels import scores
from .row_terms_scan import (
    blocks_of,
    inverse_temperature,
    is_ignored,
    listed_columns,
    merge_splits,
    row_pointer,
    scan,
    teacher_scores,
)
from .term_functions import (
    LOG_COSH,
    SCORE_MEAN,
    SUBSET,
    TEACHER,
    TEACHER_MEAN,
    TERM_SUM,
    gauss_center,
    gauss_mass,
    nan_where,
    product,
    teacher_slope,
    term_slope,
    term_value,
)

# Rows of `stats`, as in csrc/row_terms.h.
ALL_MAX, ALL_LOGSUM, MEAN, TOTAL = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
SQUARES, TEACHER_MAX, TEACHER_LOGSUM = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
MEAN_OF_TEACHER, MEAN_OF_SCORE, OWN_MEAN = tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
TERM_ROW, SLOPE, TEACHER_SLOPE = tl.constexpr(12), tl.constexpr(13), tl.constexpr(14)
SUBSET_MAX, SUBSET_LOGSUM, LISTED = tl.constexpr(15), tl.constexpr(16), tl.constexpr(17)
SECOND_PASS = tl.constexpr(1 | 2 | 4 | 64 | 128 | 256)  # ENTROPY, SUM, SUMSQ, TEACHER_MEAN, SCORE_MEAN, TERM_SUM


@triton.jit
def write_log_sum(stats, n, at, m, total, keep):
    """Store (max, log-sum) in rows at, at + 1; returns them. The running maximum does not see a NaN, the sum does."""
    m = nan_where((total != total) & (m < INF), m)
    logsum = tl.log(total)
    tl.store(stats + at * n, m, mask=keep)
    tl.store(stats + (at + 1) * n, logsum, mask=keep)
    return m, logsum


@triton.jit
def with_listed(row, scores_row, listed, stats, n, m, total, inverse_t, V, ignore_index, scale, cap, keep,
                SOFTCAP: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr):  # fmt: skip
    """(max, sum of e^((z - max) / T)) of all columns from those of the rest; stores the listed scores."""
    if K == 0:
        return m, total
    else:
        k = tl.arange(0, K_BLOCK)
        column, beyond = listed_columns(listed, row, k, V, ignore_index, K)
        z = tl.where(column >= 0, scores(scores_row, column, column >= 0, scale, cap, SOFTCAP), NEG_INF)
        tl.store(stats + (LISTED + k) * n, nan_where(beyond, z), mask=k < tl.where(keep, K, 0))
        earlier = (column[:, None] == column[None, :]) & (k[:, None] > k[None, :])
        z = tl.where(tl.sum(earlier.to(tl.int32), 1) > 0, NEG_INF, z)
        top = tl.maximum(m, tl.max(z, 0))
        ref = finite(top)
        return top, total * exp((m - ref) * inverse_t) + tl.sum(exp((z - ref) * inverse_t), 0)


@triton.jit
def sums(out, n, scores_row, teacher_row, value, center, inverse_t, ref, logsum, ref_t, logsum_t, first, last, V, scale, cap,
         a, b, c, SOFTCAP: tl.constexpr, WANT: tl.constexpr, TERM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Pass 2 over blocks first..last, the last one first: the sums over the columns, stored in their rows of the table."""
    mean = tl.zeros([BLOCK], tl.float32)
    total, squares, teacher_mean, score_mean, own_mean, term, slope, slope_t = (
        mean, mean, mean, mean, mean, mean, mean, mean,
    )  # fmt: skip
    for i in range(first, last):
        column = (first + last - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = column < V
        z = tl.where(inside, scores(scores_row, column, inside, scale, cap, SOFTCAP), NEG_INF)
        t = teacher_scores(teacher_row, column, inside)
        d, d_t = z - ref, t - ref_t
        log_p, log_q = d * inverse_t - logsum, d_t * inverse_t - logsum_t
        p, q = exp(log_p), exp(log_q)
        if value is not None:
            q = tl.where(inside, gauss_mass(column, column + 1, center, a, b, c) * exp(-logsum_t), 0.0)
        if ENTROPY & WANT:
            mean += product(p, d)
        if SUM & WANT:
            total += tl.where(inside, d, 0.0)
        if SUMSQ & WANT:
            squares += tl.where(inside, d * d, 0.0)
        if TEACHER_MEAN & WANT:
            teacher_mean += product(p, d_t)
        if SCORE_MEAN & WANT:
            score_mean += product(q, d)
            if value is None:
                own_mean += product(q, d_t)
        if TERM_SUM & WANT:
            if TERM < LOG_COSH:
                f = term_value(log_p, log_q, p, q, t, a, b, c, TERM)
                slope += tl.where(inside, term_slope(log_p, log_q, p, q, t, a, b, c, TERM), 0.0)
                slope_t += tl.where(inside, teacher_slope(log_p, log_q, p, q, a, b, c, TERM), 0.0)
            else:
                f = term_value(z * inverse_t, t * inverse_t, p, q, t, a, b, c, TERM)
            term += tl.where(inside, f, 0.0)
    if ENTROPY & WANT:
        tl.store(out + MEAN * n, tl.sum(mean, 0))
    if SUM & WANT:
        tl.store(out + TOTAL * n, tl.sum(total, 0))
    if SUMSQ & WANT:
        tl.store(out + SQUARES * n, tl.sum(squares, 0))
    if TEACHER_MEAN & WANT:
        tl.store(out + MEAN_OF_TEACHER * n, tl.sum(teacher_mean, 0))
    if SCORE_MEAN & WANT:
        tl.store(out + MEAN_OF_SCORE * n, tl.sum(score_mean, 0))
        tl.store(out + OWN_MEAN * n, tl.sum(own_mean, 0))
    if TERM_SUM & WANT:
        tl.store(out + TERM_ROW * n, tl.sum(term, 0))
        tl.store(out + SLOPE * n, tl.sum(slope, 0))
        tl.store(out + TEACHER_SLOPE * n, tl.sum(slope_t, 0))


@triton.jit(do_not_specialize=["N", "ignore_index"])
def row_terms_kernel(logits, listed, teacher, value, subset, temperature, part, part_index, stats, argmax, sum_part, N, V,
                     stride_logits, stride_teacher, ignore_index, scale, cap, a, b, c, SOFTCAP: tl.constexpr,
                     WANT: tl.constexpr, TERM: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr,
                     SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Both passes of a row; with SPLITS > 1 pass 1 has been made by row_terms_scan_kernel, and pass 2 leaves partial sums."""
    row, split = tl.program_id(0), tl.program_id(1)
    if is_ignored(row_pointer(listed, row, K), row, ignore_index):
        return
    z, t = row_pointer(logits, row, stride_logits), row_pointer(teacher, row, stride_teacher)
    inverse_t = inverse_temperature(temperature, row)
    first, last = blocks_of(split, SPLITS, V, BLOCK)
    if SPLITS == 1:
        m, expsum, warm, m_t, expsum_t, m_s, expsum_s, _top, top_index = scan(
            row, z, listed, t, value, subset, temperature, inverse_t, first, last, V, ignore_index, scale, cap, SOFTCAP,
            WANT, K, BLOCK
        )  # fmt: skip
    else:
        m, expsum, warm, m_t, expsum_t, m_s, expsum_s, _top, top_index = merge_splits(
            part, part_index, row, N, temperature, inverse_t, WANT, SPLITS
        )
    n, o, keep = wide(N), stats + row, wide(split) == 0
    write_log_sum(o, n, 0, m, expsum, keep)
    if temperature is None:
        warm = expsum
    m, total = with_listed(
        row, z, listed, o, n, m, warm, inverse_t, V, ignore_index, scale, cap, keep, SOFTCAP, K, K_BLOCK
    )
    m, logsum = write_log_sum(o, n, ALL_MAX, m, total, keep)
    center, logsum_t = 0.0, 0.0
    if value is not None:
        center = gauss_center(tl.load(value + row), a, b, V)
        m_t, logsum_t = write_log_sum(o, n, TEACHER_MAX, 0.0, gauss_mass(0, V, center, a, b, c), keep)
    elif TEACHER & WANT:
        m_t, logsum_t = write_log_sum(o, n, TEACHER_MAX, m_t, expsum_t, keep)
    elif TEACHER_MEAN & WANT:
        tl.store(o + TEACHER_MAX * n, m_t, mask=keep)
    if SUBSET & WANT:
        write_log_sum(o, n, SUBSET_MAX, m_s, expsum_s, keep)
    if ARGMAX & WANT:
        tl.store(argmax + row, top_index.to(tl.int64), mask=keep)
    if SECOND_PASS & WANT:
        sums(
            sum_part + wide(split) * N + row, n * SPLITS, z, t, value, center, inverse_t, finite(m), logsum, finite(m_t),
            logsum_t, first, last, V, scale, cap, a, b, c, SOFTCAP, WANT, TERM, BLOCK
        )  # fmt: skip
