"""Kernels over rows of logits that exist. Memory-bound: what they cost is how often they touch the logits.

Statistics read a row once, its columns split over programs when there are few rows; the gradient reads and writes once;
cross_entropy does both in one program a row, so that its second read finds the row in L2.
"""

import triton
import triton.language as tl

from .common import (
    ARG,
    ARGMAX,
    COLUMN,
    ENTROPY,
    LINEAR,
    NAN,
    NEG_INF,
    NOWHERE,
    OWN,
    P_BASE,
    P_BEST,
    P_COUNT,
    P_MASS,
    P_MAX,
    P_MOMENT,
    P_PLAIN,
    P_SQUARES,
    P_SUM,
    P_TARGET,
    P_TEMPERED,
    P_WEIGHT,
    P_WEIGHTED,
    REST,
    REST_T,
    REST_Z,
    STAT_LOGSUM,
    STAT_LOGSUM_T,
    STAT_MAX,
    SUM,
    SUMSQ,
    TEMPERED,
    absent_if_empty,
    capped,
    exp,
    finite,
    read_targets,
    rest_terms,
    shifted_squares,
    wide,
    write_statistics,
)


@triton.jit
def scores(row, c, inside, scale, cap, SOFTCAP: tl.constexpr):
    """z of the columns c; what lies outside is 0, not read, and masked by the caller."""
    z = tl.load(row + c, mask=inside, other=0.0).to(tl.float32) * scale
    if SOFTCAP:
        z = capped(z, cap)
    return z


@triton.jit
def column_weights(column_weight, c, inside):
    if column_weight is None:
        return tl.where(inside, 1.0, 0.0)
    else:
        return tl.load(column_weight + c, mask=inside, other=0.0)


@triton.jit
def scan(row, prob, column_weight, column, inverse_t, first, last, V, scale, cap, SOFTCAP: tl.constexpr,
         WANT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Fold blocks first..last of one row. Only the max crosses lanes inside the loop; the sums are reduced once, after it."""
    m = NEG_INF
    base = 0.0
    expsum = tl.zeros([BLOCK], tl.float32)
    moment, picked, mass, weighted, weight, squares, plain, count, tempered = (
        expsum,
        expsum,
        expsum,
        expsum,
        expsum,
        expsum,
        expsum,
        expsum,
        expsum,
    )
    best = tl.full([BLOCK], NEG_INF, tl.float32)
    best_index = tl.full([BLOCK], 0, tl.int32)
    for b in range(first, last):
        c = b * BLOCK + tl.arange(0, BLOCK)
        inside = c < V
        z = scores(row, c, inside, scale, cap, SOFTCAP)
        rest = tl.where(inside & (c != column), z, NEG_INF)
        higher = tl.maximum(m, tl.max(rest, 0))
        ref = finite(higher)
        base = tl.where(b == first, ref, base)
        shrink = exp(m - ref)
        d = rest - ref
        e = exp(d)
        if ENTROPY & WANT:
            moment = shrink * (moment + (finite(m) - ref) * expsum) + e * tl.maximum(d, -1e20)  # 0 * -inf would be NaN
        if TEMPERED & WANT:
            tempered = tempered * exp((m - ref) * inverse_t) + exp(d * inverse_t)
        expsum = expsum * shrink + e
        m = higher
        if (SUM & WANT) or (prob is not None):
            w = column_weights(column_weight, c, inside)
        if prob is not None:
            q = tl.load(prob + c, mask=inside, other=0.0).to(tl.float32) * w
            picked += tl.where(inside, q * (z - base), 0.0)
            mass += q
        if SUM & WANT:
            weighted += tl.where(inside, w * (z - base), 0.0)
            weight += w
        if SUMSQ & WANT:
            x = tl.where(inside, z - base, 0.0)
            plain += x
            squares += x * x
            count += tl.where(inside, 1.0, 0.0)
        if ARGMAX & WANT:
            better = inside & (z > best)  # strict: each lane keeps its lowest column
            best = tl.where(better, z, best)
            best_index = tl.where(better, c, best_index)
    top = tl.max(best, 0)
    top_index = tl.min(tl.where(best == top, best_index, NOWHERE), 0)
    return (m, base, tl.sum(expsum, 0), tl.sum(moment, 0), tl.sum(picked, 0), tl.sum(mass, 0), tl.sum(weighted, 0),
            tl.sum(weight, 0), tl.sum(squares, 0), tl.sum(plain, 0), tl.sum(count, 0), tl.sum(tempered, 0), top,
            top_index)  # fmt: skip


@triton.jit
def target_score(row, column, scale, cap, SOFTCAP: tl.constexpr):
    z = tl.load(row + column, mask=column >= 0, other=0.0).to(tl.float32) * scale
    if SOFTCAP:
        z = capped(z, cap)
    return z


@triton.jit(do_not_specialize=["N", "splits", "ignore_index"])
def row_stats_kernel(logits, target, prob, column_weight, temperature, part, part_index, N, V, splits, stride_logits,
                     stride_prob, ignore_index, scale, cap, SOFTCAP: tl.constexpr, WANT: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """One program a row and split of its columns; merge_kernel puts the splits together. Ignored rows are not read."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    z = logits + wide(row) * stride_logits
    column, ignored, _bad = read_targets(target, row, row < N, V, ignore_index)
    blocks = tl.cdiv(V, BLOCK)
    each = tl.cdiv(blocks, splits)
    first = split * each
    last = tl.where(ignored, first, tl.minimum(first + each, blocks))
    q = prob
    if prob is not None:
        q = prob + wide(row) * stride_prob
    inverse_t = 1.0
    if TEMPERED & WANT:
        inverse_t = 1.0 / tl.load(temperature + row)
    m, base, expsum, moment, picked, mass, weighted, weight, squares, plain, count, tempered, top, top_index = scan(
        z, q, column_weight, column, inverse_t, first, last, V, scale, cap, SOFTCAP, WANT, BLOCK
    )
    n = wide(splits) * N
    o = part + wide(split) * N + row
    if prob is None:
        picked = tl.where(split == 0, target_score(z, column, scale, cap, SOFTCAP), 0.0)
    tl.store(o + P_MAX * n, m)
    tl.store(o + P_SUM * n, expsum)
    tl.store(o + P_TARGET * n, picked)
    tl.store(o + P_BASE * n, base)
    if prob is not None:
        tl.store(o + P_MASS * n, mass)
    if ENTROPY & WANT:
        tl.store(o + P_MOMENT * n, moment)
    if SUM & WANT:
        tl.store(o + P_WEIGHTED * n, weighted)
        tl.store(o + P_WEIGHT * n, weight)
    if SUMSQ & WANT:
        tl.store(o + P_SQUARES * n, squares)
        tl.store(o + P_PLAIN * n, plain)
        tl.store(o + P_COUNT * n, count)
    if TEMPERED & WANT:
        tl.store(o + P_TEMPERED * n, tempered)
    if ARGMAX & WANT:
        tl.store(o + P_BEST * n, top)
        tl.store(part_index + wide(split) * N + row, top_index)


@triton.jit
def gradient(z, c, inside, column, q, column_weight, top, ref, logsum, logsum_t, inverse_t, own, rest, rest_z, weighted,
             linear, rest_t, arg, scale, cap, SOFTCAP: tl.constexpr, WANT: tl.constexpr):  # fmt: skip
    """d loss / d logits of some columns of one row; q are the target probabilities, if any."""
    d = z - ref
    g = rest_terms(d, logsum, logsum_t, inverse_t, rest, rest_z, rest_t, WANT)
    g = tl.where(c == column, own, g)
    if (SUM & WANT) or (q is not None):
        w = column_weights(column_weight, c, inside)
    if q is not None:
        g += own * (tl.load(q + c, mask=inside, other=0.0).to(tl.float32) * w)
    if SUM & WANT:
        g += weighted * w
    if SUMSQ & WANT:
        g += linear * d
    if ARGMAX & WANT:
        g += tl.where(c == top, arg, 0.0)
    if SOFTCAP:
        g *= 1.0 - (z * (1.0 / cap)) * (z * (1.0 / cap))
    return g * scale


@triton.jit(do_not_specialize=["N", "ignore_index"])
def row_gradient_kernel(coef, stats, argmax, logits, target, prob, column_weight, temperature, dlogits, upstream, N, V,
                        stride_coef, stride_stats, stride_logits, stride_prob, stride_out, ignore_index, scale, cap,
                        SOFTCAP: tl.constexpr, WANT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program a row and block of columns; the row's numbers are scalars. `dlogits` may be `logits`.

    upstream: one number on the device, or None; where it is 1, dlogits holds this gradient already.
    """
    if upstream is not None:
        if tl.load(upstream) == 1.0:
            return
    row = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column, ignored, bad = read_targets(target, row, row < N, V, ignore_index)
    inside = c < V
    read = inside & (c * 0 + ignored.to(tl.int32) == 0)
    z = scores(logits + wide(row) * stride_logits, c, read, scale, cap, SOFTCAP)
    s = stats + row
    k = coef + row
    rest = tl.where(bad, NAN, tl.load(k + REST * stride_coef))
    rest_z, weighted, linear, rest_t, arg, top, logsum_t, inverse_t = rest, rest, rest, rest, rest, column, rest, rest
    q = prob
    if prob is not None:
        q = prob + wide(row) * stride_prob
    if ENTROPY & WANT:
        rest_z = tl.load(k + REST_Z * stride_coef)
    if SUM & WANT:
        weighted = tl.load(k + COLUMN * stride_coef)
    if SUMSQ & WANT:
        linear = tl.load(k + LINEAR * stride_coef)
    if TEMPERED & WANT:
        rest_t = tl.load(k + REST_T * stride_coef)
        logsum_t = absent_if_empty(tl.load(s + STAT_LOGSUM_T * stride_stats))
        inverse_t = 1.0 / tl.load(temperature + row)
    if ARGMAX & WANT:
        arg = tl.load(k + ARG * stride_coef)
        top = tl.load(argmax + row).to(tl.int32)
    g = gradient(z, c, inside, column, q, column_weight, top, finite(tl.load(s + STAT_MAX * stride_stats)),
                 absent_if_empty(tl.load(s + STAT_LOGSUM * stride_stats)), logsum_t, inverse_t,
                 tl.load(k + OWN * stride_coef), rest, rest_z, weighted, linear, rest_t, arg, scale, cap, SOFTCAP,
                 WANT)  # fmt: skip
    g = tl.where(ignored, 0.0, g)
    tl.store(dlogits + wide(row) * stride_out + c, g.to(dlogits.dtype.element_ty), mask=inside)


@triton.jit
def epilogue_coefficients(epilogue, stride, m, logsum, picked, mass, SOFT: tl.constexpr):
    """(own, rest, column) of L = b nll + e lse + t lse^2 + s sum c_j z_j, in the margin form: nothing cancels at p_y -> 1."""
    b = tl.load(epilogue)
    t = tl.load(epilogue + 2 * stride)
    if SOFT:
        lse = m + logsum
    else:
        d = (picked - finite(m)) - logsum
        softplus = tl.maximum(d, 0.0) + tl.log(1.0 + exp(-tl.abs(d)))
        lse = tl.where(logsum == NEG_INF, picked, finite(m) + logsum + softplus)
    h = tl.load(epilogue + stride) + tl.where(t == 0.0, 0.0, 2.0 * t * lse)
    if SOFT:
        rest = b * mass + h
        own = -b
    else:
        rest = (b + h) / (1.0 + exp(d))
        own = h - rest
    return own, rest, tl.load(epilogue + 3 * stride)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def row_cross_entropy_kernel(logits, target, prob, column_weight, epilogue, stats, argmax, dlogits, N, V, stride_epilogue,
                             stride_logits, stride_prob, stride_out, ignore_index, scale, cap, SOFTCAP: tl.constexpr,
                             WANT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program a row: statistics, the coefficients they give, and the gradient. `dlogits` may be `logits`: each element
    is read before its own column is written, and the statistics need a barrier that comes before the first write."""
    SOFT: tl.constexpr = prob is not None
    row = tl.program_id(0)
    z = logits + wide(row) * stride_logits
    column, ignored, bad = read_targets(target, row, row < N, V, ignore_index)
    blocks = tl.cdiv(V, BLOCK)
    last = tl.where(ignored, 0, blocks)
    q = prob
    if SOFT:
        q = prob + wide(row) * stride_prob
    m, base, expsum, moment, picked, mass, weighted, weight, squares, plain, count, tempered, _top, top_index = scan(
        z, q, column_weight, column, 1.0, 0, last, V, scale, cap, SOFTCAP, WANT, BLOCK
    )
    delta = base - finite(m)
    if SOFT:
        picked += mass * delta
    else:
        picked = target_score(z, column, scale, cap, SOFTCAP)
    squares = shifted_squares(squares, plain, count, delta)
    m, logsum, picked = write_statistics(stats, row, row < N, N, column, ignored, bad, m, expsum, moment, picked, mass,
                                         weighted + weight * delta, squares, tempered, WANT, SOFT)  # fmt: skip
    if ARGMAX & WANT:
        tl.store(argmax + row, tl.where(ignored, -1, top_index).to(tl.int64))
    own, rest, weighted = epilogue_coefficients(epilogue + row, stride_epilogue, m, logsum, picked, mass, SOFT)
    rest = tl.where(bad, NAN, rest)
    ref = finite(m)
    logsum = absent_if_empty(logsum)
    for i in range(0, blocks):
        # Backwards: the columns that were read last are the likeliest to be in cache still.
        c = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = c < V
        read = inside & (c * 0 + ignored.to(tl.int32) == 0)
        x = scores(z, c, read, scale, cap, SOFTCAP)
        g = gradient(x, c, inside, column, q, column_weight, column, ref, logsum, logsum, 1.0, own, rest, rest, weighted,
                     rest, rest, rest, scale, cap, SOFTCAP, SUM & WANT)  # fmt: skip
        g = tl.where(ignored, 0.0, g)
        tl.store(dlogits + wide(row) * stride_out + c, g.to(dlogits.dtype.element_ty), mask=inside)
