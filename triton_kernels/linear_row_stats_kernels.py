"""Kernels over rows of z = softcap(scale (x Wᵀ + b)), which is never stored: statistics, and the gradient of some columns.

Each tile of logits lives in registers between its matrix product and its sums. What is rare is decided by a branch on the
tile, not by a select on each element: does it hold a target, an ignored row?
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
    wide,
)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b in fp32. UPCAST is for the interpreter only: its bf16 dot multiplies bit patterns."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_product(x, w, row0, column0, N, V, D, stride_x, stride_w, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 EVEN_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """x[row0 : row0+BM] @ w[column0 : column0+BN].T. With TMA, x and w are descriptors with blocks [BM, BK] and [BN, BK]."""
    acc = tl.zeros([BM, BN], tl.float32)
    if TMA:
        for k in range(0, D, BK):
            acc = dot(x.load([row0, k]), tl.trans(w.load([column0, k])), acc, PRECISION, UPCAST)
    else:
        # Rows are clamped, not masked: the inner loop then carries no row predicate at all. One 64-bit scalar base and
        # 32-bit offsets inside the tile: 64-bit pointers for each element would cost the registers.
        r = tl.minimum(tl.arange(0, BM), N - 1 - row0)
        c = tl.minimum(tl.arange(0, BN), V - 1 - column0)
        k = tl.arange(0, BK)
        x_tile = x + wide(row0) * stride_x + (r[:, None] * stride_x + k[None, :])
        w_tile = w + wide(column0) * stride_w + (c[:, None] * stride_w + k[None, :])
        for k0 in range(0, D, BK):
            if EVEN_D:
                a = tl.load(x_tile)
                b = tl.load(w_tile)
            else:
                a = tl.load(x_tile, mask=k[None, :] < D - k0, other=0.0)
                b = tl.load(w_tile, mask=k[None, :] < D - k0, other=0.0)
            acc = dot(a, tl.trans(b), acc, PRECISION, UPCAST)
            x_tile += BK
            w_tile += BK
    return acc


@triton.jit
def tile_scores(product, bias, columns, V, scale, cap, SOFTCAP: tl.constexpr):
    """z of a tile, one multiply-add an element without a softcap; columns past V come out as -inf, from the added vector."""
    if bias is None:
        shift = tl.zeros_like(columns).to(tl.float32)
    else:
        shift = tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32) * scale
    absent = tl.where(columns < V, 0.0, NEG_INF)
    if SOFTCAP:
        return capped(product * scale + shift[None, :], cap) + absent[None, :]
    else:
        return product * scale + (shift + absent)[None, :]


@triton.jit
def holds(column, column0, BN: tl.constexpr):
    """Is any of these columns in the tile that starts at column0? Usually not."""
    return tl.max(((column >= column0) & (column < column0 + BN)).to(tl.int32), 0) > 0


@triton.jit
def place(program, row_blocks, splits, GROUP: tl.constexpr):
    """Program -> (row block, split). A wave covers GROUP row blocks x all splits: its rows of x stay in L2 while the splits
    stream W side by side. In row-major order every step would cycle all of x through L2."""
    group = program // (GROUP * splits)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = program - group * GROUP * splits
    return first + inside % size, inside // size


@triton.jit(do_not_specialize=["N", "splits", "ignore_index"])
def linear_row_stats_kernel(x, w, bias, target, column_weight, temperature, part, part_index, N, V, D, splits, stride_x,
                            stride_w, ignore_index, scale, cap, SOFTCAP: tl.constexpr, WANT: tl.constexpr,
                            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                            EVEN_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
                            UPCAST: tl.constexpr):  # fmt: skip
    """One program a block of rows and split of the columns; merge_kernel puts the splits together."""
    block, split = place(tl.program_id(0), tl.cdiv(N, BM), splits, GROUP)
    row0 = block * BM
    rows = row0 + tl.arange(0, BM)
    keep = rows < N
    column, _ignored, _bad = read_targets(target, rows, keep, V, ignore_index)
    m = tl.full([BM], NEG_INF, tl.float32)
    expsum = tl.zeros([BM], tl.float32)
    moment, picked, base, weighted, squares, plain, tempered = expsum, expsum, expsum, expsum, expsum, expsum, expsum
    weight = 0.0
    count = 0.0
    best = m
    best_index = tl.zeros([BM], tl.int32)
    inverse_t = expsum
    if TEMPERED & WANT:
        inverse_t = 1.0 / tl.load(temperature + rows, mask=keep, other=1.0)
    tiles = tl.cdiv(V, BN)
    each = tl.cdiv(tiles, splits)
    first = split * each
    for tile in range(first, tl.minimum(first + each, tiles)):
        column0 = tile * BN
        columns = column0 + tl.arange(0, BN)
        product = tile_product(
            x, w, row0, column0, N, V, D, stride_x, stride_w, BM, BN, BK, EVEN_D, TMA, PRECISION, UPCAST
        )
        z = tile_scores(product, bias, columns, V, scale, cap, SOFTCAP)
        rest = z
        if holds(column, column0, BN):
            own = columns[None, :] == column[:, None]
            picked += tl.sum(tl.where(own, z, 0.0), 1)
            rest = tl.where(own, NEG_INF, z)
        higher = tl.maximum(m, tl.max(rest, 1))
        ref = finite(higher)
        if (SUM & WANT) or (SUMSQ & WANT):
            base = tl.where(column * 0 + tile == first, ref, base)
            inside = columns < V
            away = tl.where(inside[None, :], z - base[:, None], 0.0)
            if SUM & WANT:
                if column_weight is None:
                    c = tl.where(inside, 1.0, 0.0)
                    weighted += tl.sum(away, 1)
                else:
                    c = tl.load(column_weight + columns, mask=inside, other=0.0)
                    weighted += tl.sum(away * c[None, :], 1)
                weight += tl.sum(c, 0)
            if SUMSQ & WANT:
                plain += tl.sum(away, 1)
                squares += tl.sum(away * away, 1)
                count += tl.sum(tl.where(inside, 1.0, 0.0), 0)
        if ARGMAX & WANT:
            top = tl.max(z, 1)
            index = tl.min(tl.where(z == top[:, None], columns[None, :], NOWHERE), 1)
            best_index = tl.where(top > best, index, best_index)
            best = tl.where(top > best, top, best)
        d = rest - ref[:, None]
        e = exp(d)
        shrink = exp(m - ref)
        if ENTROPY & WANT:
            moment = shrink * (moment + (finite(m) - ref) * expsum) + tl.sum(e * tl.maximum(d, -1e20), 1)
        if TEMPERED & WANT:
            warm = exp(d * inverse_t[:, None])
            tempered = tempered * exp((m - ref) * inverse_t) + tl.sum(warm, 1)
        expsum = expsum * shrink + tl.sum(e, 1)
        m = higher
    n = wide(splits) * N
    o = part + wide(split) * N + rows
    tl.store(o + P_MAX * n, m, mask=keep)
    tl.store(o + P_SUM * n, expsum, mask=keep)
    tl.store(o + P_TARGET * n, picked, mask=keep)
    if ENTROPY & WANT:
        tl.store(o + P_MOMENT * n, moment, mask=keep)
    if (SUM & WANT) or (SUMSQ & WANT):
        tl.store(o + P_BASE * n, base, mask=keep)
    if SUM & WANT:
        tl.store(o + P_WEIGHTED * n, weighted, mask=keep)
        tl.store(o + P_WEIGHT * n, expsum * 0.0 + weight, mask=keep)
    if SUMSQ & WANT:
        tl.store(o + P_SQUARES * n, squares, mask=keep)
        tl.store(o + P_PLAIN * n, plain, mask=keep)
        tl.store(o + P_COUNT * n, expsum * 0.0 + count, mask=keep)
    if TEMPERED & WANT:
        tl.store(o + P_TEMPERED * n, tempered, mask=keep)
    if ARGMAX & WANT:
        tl.store(o + P_BEST * n, best, mask=keep)
        tl.store(part_index + wide(split) * N + rows, best_index, mask=keep)


@triton.jit
def coefficient(coef, index, stride, rows, keep):
    """One coefficient of each row of a tile, as a column."""
    return tl.load(coef + index * stride + rows, mask=keep, other=0.0)[:, None]


@triton.jit(do_not_specialize=["N", "first_column", "ignore_index"])
def linear_gradient_kernel(x, w, bias, target, column_weight, temperature, stats, coef, argmax, lift, dz, dbias, N, V, D,
                           first_column, width, stride_x, stride_w, stride_stats, stride_coef, ignore_index, scale, cap,
                           SOFTCAP: tl.constexpr, WANT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                           BK: tl.constexpr, GROUP: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
                           PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Columns first_column : +width of d loss / d logits, times *lift, to a scratch [N, width] in x's dtype. One tile a
    program and no state carried: the plain shape of a GEMM. dbias [row blocks, V] takes the column sums in fp32."""
    block, part = place(tl.program_id(0), tl.cdiv(N, BM), tl.cdiv(width, BN), GROUP)
    row0 = block * BM
    rows = row0 + tl.arange(0, BM)
    keep = rows < N
    local = part * BN + tl.arange(0, BN)
    column0 = first_column + part * BN
    columns = first_column + local
    product = tile_product(x, w, row0, column0, N, V, D, stride_x, stride_w, BM, BN, BK, EVEN_D, TMA, PRECISION, UPCAST)
    z = tile_scores(product, bias, columns, V, scale, cap, SOFTCAP)
    column, ignored, bad = read_targets(target, rows, keep, V, ignore_index)
    logsum = tl.load(stats + STAT_LOGSUM * stride_stats + rows, mask=keep, other=NEG_INF)
    d = z - finite(tl.load(stats + STAT_MAX * stride_stats + rows, mask=keep, other=0.0))[:, None]
    rest = tl.where(bad[:, None], NAN, coefficient(coef, REST, stride_coef, rows, keep))
    rest_z, rest_t, logsum_t, inverse_t = rest, rest, rest, rest
    if ENTROPY & WANT:
        rest_z = coefficient(coef, REST_Z, stride_coef, rows, keep)
    if TEMPERED & WANT:
        rest_t = coefficient(coef, REST_T, stride_coef, rows, keep)
        logsum_t = absent_if_empty(tl.load(stats + STAT_LOGSUM_T * stride_stats + rows, mask=keep, other=NEG_INF))[
            :, None
        ]
        inverse_t = 1.0 / tl.load(temperature + rows, mask=keep, other=1.0)[:, None]
    g = rest_terms(d, absent_if_empty(logsum)[:, None], logsum_t, inverse_t, rest, rest_z, rest_t, WANT)
    if holds(column, column0, BN):
        g = tl.where(columns[None, :] == column[:, None], coefficient(coef, OWN, stride_coef, rows, keep), g)
    if SUM & WANT:
        if column_weight is None:
            g += coefficient(coef, COLUMN, stride_coef, rows, keep)
        else:
            c = tl.load(column_weight + columns, mask=columns < V, other=0.0)
            g += coefficient(coef, COLUMN, stride_coef, rows, keep) * c[None, :]
    if SUMSQ & WANT:
        g += coefficient(coef, LINEAR, stride_coef, rows, keep) * d
    if ARGMAX & WANT:
        top = tl.load(argmax + rows, mask=keep, other=-1).to(tl.int32)
        if holds(top, column0, BN):
            g += tl.where(columns[None, :] == top[:, None], coefficient(coef, ARG, stride_coef, rows, keep), 0.0)
    if SOFTCAP:
        g *= 1.0 - (z * (1.0 / cap)) * (z * (1.0 / cap))
    g *= scale
    if lift is not None:
        g *= tl.load(lift)
    silent = ignored | (rows >= N)
    if tl.max(silent.to(tl.int32), 0) > 0:  # a select, not a zero coefficient: 0 * inf would be NaN
        g = tl.where(silent[:, None], 0.0, g)
    stored = local < width
    if dbias is not None:
        tl.store(dbias + wide(block) * V + columns, tl.sum(g, 0), mask=stored)
    out = dz + wide(row0) * width + (tl.arange(0, BM)[:, None] * width + local[None, :])
    tl.store(out, g.to(dz.dtype.element_ty), mask=keep[:, None] & stored[None, :])
