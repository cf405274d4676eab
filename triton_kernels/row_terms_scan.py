"""Pass 1 of `row_terms`: maxima and log-sums of a row, online; and the merge of a row that several programs shared."""

import triton
import triton.language as tl

from .common import ARGMAX, NEG_INF, NOWHERE, exp, finite, wide
from .row_stats_kernels import scores
from .term_functions import SUBSET, TEACHER, TEACHER_MEAN

# Rows of `part`, the state of one row over one split of the columns; each maximum stands before its sum.
NUM_PARTS = 8
P_MAX, P_SUM, P_TEACHER, P_SUBSET = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
P_WARM, P_BEST = tl.constexpr(6), tl.constexpr(7)


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
