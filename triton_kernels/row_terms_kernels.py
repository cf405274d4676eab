"""The statistics of `row_terms`: one program a row, or several that share the columns of one row.

Pass 1 finds maxima and log-sums online; pass 2, where something wants it, sums over the columns. A program that has a row to
itself walks backwards in pass 2: the columns it read last are the likeliest to be in cache still. Ignored rows are neither
read nor written: the launcher fills the tables with what they hold.
"""

import triton
import triton.language as tl

from .common import ARGMAX, ENTROPY, INF, NEG_INF, NOWHERE, SUM, SUMSQ, exp, finite, wide
from .row_stats_kernels import scores
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

# Rows of `part`, the state of one row over one split of the columns; each maximum stands before its sum.
NUM_PARTS = 8
P_MAX, P_SUM, P_TEACHER, P_SUBSET = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
P_WARM, P_BEST = tl.constexpr(6), tl.constexpr(7)

# Rows of `stats`, as in csrc/row_terms.h.
ALL_MAX, ALL_LOGSUM, MEAN, TOTAL = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
SQUARES, TEACHER_MAX, TEACHER_LOGSUM = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
MEAN_OF_TEACHER, MEAN_OF_SCORE, OWN_MEAN = tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
TERM_ROW, SLOPE, TEACHER_SLOPE = tl.constexpr(12), tl.constexpr(13), tl.constexpr(14)
SUBSET_MAX, SUBSET_LOGSUM, LISTED = tl.constexpr(15), tl.constexpr(16), tl.constexpr(17)
SECOND_PASS = tl.constexpr(1 | 2 | 4 | 64 | 128 | 256)  # ENTROPY, SUM, SUMSQ, TEACHER_MEAN, SCORE_MEAN, TERM_SUM


@triton.jit
def listed_columns(listed, row, k, V, ignore_index, K: tl.constexpr):
    """(column or -1, out of range) of listed ids. Judged in int64: a wrapped id would be a wrong column."""
    y = tl.load(listed + wide(row) * K + k, mask=k < K, other=-1)
    given = (y >= 0) & (y != ignore_index)
    return tl.where(given & (y < V), y, -1).to(tl.int32), given & (y >= V)


@triton.jit
def is_ignored(listed, row, ignore_index):
    if listed is None:
        return row < 0
    else:
        return tl.load(listed) == ignore_index


@triton.jit
def teacher_scores(teacher, c, inside):
    """The teacher's scores of some columns, all equal where there is none; outside -inf."""
    if teacher is None:
        t = tl.where(inside, 0.0, NEG_INF)
    else:
        t = tl.where(inside, tl.load(teacher + c, mask=inside, other=0.0).to(tl.float32), NEG_INF)
    return t


@triton.jit
def fold(m, total, x, inverse_t):
    """A running maximum, and each lane's sum of e^((x - maximum) / T)."""
    higher = tl.maximum(m, tl.max(x, 0))
    ref = finite(higher)
    return higher, total * exp((m - ref) * inverse_t) + exp((x - ref) * inverse_t)


@triton.jit
def scan(row, scores_row, listed, teacher_row, value, subset, temperature, inverse_t, first, last, V, ignore_index, scale,
         cap, SOFTCAP: tl.constexpr, WANT: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Pass 1 over blocks first..last. Listed columns are left out; they join when all else is known."""
    m = tl.cast(NEG_INF, tl.float32)
    m_t, m_s = m, m
    expsum = tl.zeros([BLOCK], tl.float32)
    warm, expsum_t, expsum_s = expsum, expsum, expsum
    best = tl.full([BLOCK], NEG_INF, tl.float32)
    best_index = tl.full([BLOCK], 0, tl.int32)
    for i in range(first, last):
        c = i * BLOCK + tl.arange(0, BLOCK)
        inside = c < V
        z = scores(scores_row, c, inside, scale, cap, SOFTCAP)
        rest = tl.where(inside, z, NEG_INF)
        if K > 0:
            for k in range(K):
                column, _beyond = listed_columns(listed, row, k, V, ignore_index, K)
                rest = tl.where(c == column, NEG_INF, rest)
        before = m
        m, expsum = fold(m, expsum, rest, 1.0)
        if temperature is not None:
            ref = finite(m)
            warm = warm * exp((before - ref) * inverse_t) + exp((rest - ref) * inverse_t)
        if value is None:
            if TEACHER & WANT:
                m_t, expsum_t = fold(m_t, expsum_t, teacher_scores(teacher_row, c, inside), inverse_t)
            elif TEACHER_MEAN & WANT:
                m_t = tl.maximum(m_t, tl.max(teacher_scores(teacher_row, c, inside), 0))
        if SUBSET & WANT:
            chosen = tl.load(subset + c, mask=inside, other=0) != 0
            m_s, expsum_s = fold(m_s, expsum_s, tl.where(chosen, z, NEG_INF), 1.0)
        if ARGMAX & WANT:
            better = inside & (z > best)  # strict: each lane keeps its lowest column
            best = tl.where(better, z, best)
            best_index = tl.where(better, c, best_index)
    top = tl.max(best, 0)
    top_index = tl.min(tl.where(best == top, best_index, NOWHERE), 0)
    return (m, tl.sum(expsum, 0), tl.sum(warm, 0), m_t, tl.sum(expsum_t, 0), m_s, tl.sum(expsum_s, 0), top,
            top_index)  # fmt: skip


@triton.jit
def blocks_of(split, splits, V, BLOCK: tl.constexpr):
    """Blocks first..last of a split."""
    blocks = tl.cdiv(V, BLOCK)
    each = tl.cdiv(blocks, splits)
    return split * each, tl.minimum(split * each + each, blocks)


@triton.jit
def row_pointer(base, row, stride):
    if base is None:
        return None
    else:
        return base + wide(row) * stride


@triton.jit
def inverse_temperature(temperature, row):
    if temperature is None:
        return 1.0
    else:
        return 1.0 / tl.load(temperature + row)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def row_terms_scan_kernel(logits, listed, teacher, value, subset, temperature, part, part_index, N, V, stride_logits,
                          stride_teacher, ignore_index, scale, cap, SOFTCAP: tl.constexpr, WANT: tl.constexpr,
                          K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Pass 1 of one row and split, for row_terms_kernel."""
    row, split = tl.program_id(0), tl.program_id(1)
    if is_ignored(row_pointer(listed, row, K), row, ignore_index):
        return
    first, last = blocks_of(split, SPLITS, V, BLOCK)
    m, expsum, warm, m_t, expsum_t, m_s, expsum_s, top, top_index = scan(
        row, row_pointer(logits, row, stride_logits), listed, row_pointer(teacher, row, stride_teacher), value, subset,
        temperature, inverse_temperature(temperature, row), first, last, V, ignore_index, scale, cap, SOFTCAP, WANT, K, BLOCK
    )  # fmt: skip
    n = wide(N) * SPLITS
    o = part + wide(split) * N + row
    tl.store(o + P_MAX * n, m)
    tl.store(o + P_SUM * n, expsum)
    if temperature is not None:
        tl.store(o + P_WARM * n, warm)
    if (TEACHER | TEACHER_MEAN) & WANT:
        tl.store(o + P_TEACHER * n, m_t)
        tl.store(o + (P_TEACHER + 1) * n, expsum_t)
    if SUBSET & WANT:
        tl.store(o + P_SUBSET * n, m_s)
        tl.store(o + (P_SUBSET + 1) * n, expsum_s)
    if ARGMAX & WANT:
        tl.store(o + P_BEST * n, top)
        tl.store(part_index + wide(split) * N + row, top_index)


@triton.jit
def merge_pair(part, n, inverse_t):
    """The whole row's maximum and sum from those of its splits."""
    m = tl.load(part)
    top = tl.max(m, 0)
    return top, tl.sum(tl.load(part + n) * exp((m - finite(top)) * inverse_t), 0)


@triton.jit
def merge_splits(part, part_index, row, N, temperature, inverse_t, WANT: tl.constexpr, SPLITS: tl.constexpr):
    """What `scan` returns, from the splits of a row."""
    n = wide(N) * SPLITS
    at = wide(tl.arange(0, SPLITS)) * N + row
    m, expsum = merge_pair(part + at, n, 1.0)
    warm, m_t, expsum_t, m_s, expsum_s, top = expsum, m, expsum, m, expsum, m
    top_index = row
    if temperature is not None:
        shrink = exp((tl.load(part + at) - finite(m)) * inverse_t)
        warm = tl.sum(tl.load(part + at + P_WARM * n) * shrink, 0)
    if (TEACHER | TEACHER_MEAN) & WANT:
        m_t, expsum_t = merge_pair(part + at + P_TEACHER * n, n, inverse_t)
    if SUBSET & WANT:
        m_s, expsum_s = merge_pair(part + at + P_SUBSET * n, n, 1.0)
    if ARGMAX & WANT:
        best = tl.load(part + at + P_BEST * n)
        top = tl.max(best, 0)
        top_index = tl.min(tl.where(best == top, tl.load(part_index + at), NOWHERE), 0)
    return m, expsum, warm, m_t, expsum_t, m_s, expsum_s, top, top_index


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
