"""The gradient of `row_terms`: one program a row and block of columns; the row's numbers are scalars."""

import triton
import triton.language as tl

from .common import ARGMAX, ENTROPY, SUM, SUMSQ, absent_if_empty, exp, finite
from .row_stats_kernels import scores
from .row_terms_kernels import ALL_LOGSUM, ALL_MAX, SUBSET_MAX, TEACHER_LOGSUM, TEACHER_MAX
from .row_terms_scan import inverse_temperature, is_ignored, listed_columns, row_pointer, teacher_scores
from .term_functions import (
    LOG_COSH,
    SCORE_MEAN,
    SUBSET,
    TEACHER_MEAN,
    TERM_SUM,
    gauss_center,
    gauss_mass,
    nan_where,
    product,
    term_slope,
)

# Rows of `coef`, as in csrc/row_terms.h.
REST, ALL, ALL_Z, ALL_T, OF_TEACHER = (
    tl.constexpr(0),
    tl.constexpr(1),
    tl.constexpr(2),
    tl.constexpr(3),
    tl.constexpr(4),
)
OF_TERM, OF_SUBSET, COLUMN, LINEAR = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
ARG, LISTED = tl.constexpr(9), tl.constexpr(10)


@triton.jit
def shares(x, stats, stride, at):
    """e^(x - max - logsum), 0 everywhere where there is nothing; max and logsum in rows at, at + 1 of the table."""
    return exp(x - finite(tl.load(stats + at * stride)) - absent_if_empty(tl.load(stats + (at + 1) * stride)))


@triton.jit(do_not_specialize=["N", "ignore_index"])
def row_terms_gradient_kernel(coef, stats, argmax, logits, listed, teacher, value, subset, temperature, dlogits, N, V,
                              stride_coef, stride_stats, stride_logits, stride_teacher, stride_out, ignore_index, scale, cap,
                              a, b, c, SOFTCAP: tl.constexpr, WANT: tl.constexpr, TERM: tl.constexpr, K: tl.constexpr,
                              BLOCK: tl.constexpr):  # fmt: skip
    """`dlogits` may be `logits`: a program reads its columns before it writes them, and no others."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    out = row_pointer(dlogits, row, stride_out) + column
    if is_ignored(row_pointer(listed, row, K), row, ignore_index):
        tl.store(out, tl.zeros([BLOCK], dlogits.dtype.element_ty), mask=inside)
        return
    s, k = stats + row, coef + row
    z = scores(row_pointer(logits, row, stride_logits), column, inside, scale, cap, SOFTCAP)
    inverse_t = inverse_temperature(temperature, row)
    d = z - finite(tl.load(s + ALL_MAX * stride_stats))
    logsum = tl.load(s + ALL_LOGSUM * stride_stats)
    p = exp(d * inverse_t - absent_if_empty(logsum))
    rest, all_columns = tl.load(k + REST * stride_coef), tl.load(k + ALL * stride_coef)
    if K == 0 and temperature is None:  # the rest is all
        g = product(rest + all_columns, p)
    else:
        pi = shares(z, s, stride_stats, 0)
        own = tl.zeros([BLOCK], tl.float32)
        if K > 0:
            for i in range(K):
                place, _beyond = listed_columns(listed, row, i, V, ignore_index, K)
                here = column == place
                pi = tl.where(here, 0.0, pi)
                own += tl.where(here, tl.load(k + (LISTED + i) * stride_coef), 0.0)
        g = product(rest, pi) + product(all_columns, p) + own
    if ENTROPY & WANT:
        g += product(tl.load(k + ALL_Z * stride_coef), product(p, d))
    t = teacher_scores(row_pointer(teacher, row, stride_teacher), column, inside)
    d_t = t - finite(tl.load(s + TEACHER_MAX * stride_stats))
    log_q = d_t * inverse_t - tl.load(s + TEACHER_LOGSUM * stride_stats)
    q = exp(log_q)
    if TEACHER_MEAN & WANT:
        g += product(tl.load(k + ALL_T * stride_coef), product(p, d_t))
    if SCORE_MEAN & WANT:
        if value is not None:
            center = gauss_center(tl.load(value + row), a, b, V)
            q = gauss_mass(column, column + 1, center, a, b, c) * exp(-tl.load(s + TEACHER_LOGSUM * stride_stats))
        g += product(tl.load(k + OF_TEACHER * stride_coef), q)
    if TERM_SUM & WANT:
        if TERM < LOG_COSH:
            slope = term_slope(d * inverse_t - logsum, log_q, p, q, t, a, b, c, TERM)
        else:
            slope = term_slope(z * inverse_t, t * inverse_t, p, q, t, a, b, c, TERM)
        g += product(tl.load(k + OF_TERM * stride_coef), slope)
    if SUBSET & WANT:
        chosen = tl.load(subset + column, mask=inside, other=0) != 0
        g += product(
            tl.load(k + OF_SUBSET * stride_coef), tl.where(chosen, shares(z, s, stride_stats, SUBSET_MAX), 0.0)
        )
    if SUM & WANT:
        g += tl.load(k + COLUMN * stride_coef)
    if SUMSQ & WANT:
        g += product(tl.load(k + LINEAR * stride_coef), d)
    if ARGMAX & WANT:
        top = tl.load(argmax + row).to(tl.int32)
        g += tl.where(column == top, tl.load(k + ARG * stride_coef), 0.0)
    if SOFTCAP:
        g *= 1.0 - (z * (1.0 / cap)) * (z * (1.0 / cap))
    if K > 0:
        for i in range(K):
            _place, beyond = listed_columns(listed, row, i, V, ignore_index, K)
            g = nan_where(beyond, g)
    tl.store(out, (g * scale).to(dlogits.dtype.element_ty), mask=inside)
