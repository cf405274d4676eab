"""Kernels of row_sample: the noise of docs/design.md, "Sampling", and a token of each row by the largest z - log E."""

import triton
import triton.language as tl

from .common import INF, NAN, NEG_INF, capped, exp, finite, wide

COARSE = tl.constexpr(1 << 16)  # first 32 bits below it are followed by 32 more
LOWEST = tl.constexpr(-3.4028234663852886e38)  # only -inf is less


@triton.jit
def words(seed, stream, block, half, COLUMNS: tl.constexpr):
    """The random words of COLUMNS columns in their order: four of each of COLUMNS / 4 counters."""
    low = (stream & 0xFFFFFFFF).to(tl.uint32)
    high = (stream >> 32 & 0xFFFFFFFF).to(tl.uint32)
    c0 = (block + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
    zero = c0 * 0
    a, b, c, d = tl.philox(seed, c0, zero + half, zero + low, zero + high)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def log_exponentials(bits, more):
    """log E from 64 bits, of which the upper 32 are enough but in the tail. There is no log1p that the interpreter knows:
    -log(1 - u) = 2 atanh(u / (2 - u)), a short series up to a half; beyond it 1 - u has all its digits."""
    coarse = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    fine = (bits.to(tl.float32) + (more.to(tl.float32) + 0.5) * 2.3283064365386963e-10) * 2.3283064365386963e-10
    u = tl.where(bits < COARSE, fine, coarse)
    t = u / (2.0 - u)
    s = t * t
    series = 0.06666667 * s + 0.07692308
    series = ((((series * s + 0.09090909) * s + 0.11111111) * s + 0.14285714) * s + 0.2) * s + 0.33333334
    small = 2.0 * (t + t * s * series)
    rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.log(tl.where(bits < 0x80000000, small, -tl.log(rest)))


@triton.jit
def row_sample_kernel(
    logits, seed, streams, part, part_index, V, N, splits, stride_logits, scale, cap, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of one row. part [4, splits, N]: max, sum of e^(z - max), the best column's score and its -log E."""
    row, split = tl.program_id(0), tl.program_id(1)
    width = tl.cdiv(tl.cdiv(V, BLOCK), splits) * BLOCK
    key, stream = tl.load(seed), tl.load(streams + row)
    at = tl.arange(0, BLOCK)
    base = logits + wide(row) * stride_logits
    best = tl.full((BLOCK,), NEG_INF, tl.float32)
    gumbel = tl.zeros((BLOCK,), tl.float32)
    column = tl.full((BLOCK,), -1, tl.int32)
    m = tl.full((), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(split * width, tl.minimum(V, (split + 1) * width), BLOCK):
        here = begin + at
        logit = tl.load(base + here, mask=here < V, other=NEG_INF).to(tl.float32)
        z = logit * scale
        if SOFTCAP:
            z = capped(z, cap)
        z = tl.where(logit < LOWEST, NEG_INF, z)  # neither a cap nor a negative scale brings the column back
        top = tl.maximum(m, tl.max(z, 0))
        ref = finite(top)
        total = total * exp(m - ref) + exp(z - ref)
        m = top
        bits = words(key, stream, begin // 4, 0, BLOCK)
        more = tl.zeros((BLOCK,), tl.uint32)
        if tl.min(bits, 0) < COARSE:
            more = words(key, stream, begin // 4, 1, BLOCK)
        noise = -log_exponentials(bits, more)
        better = (z > NEG_INF) & ((column < 0) | ((z - best) + (noise - gumbel) > 0))
        best, gumbel = tl.where(better, z, best), tl.where(better, noise, gumbel)
        column = tl.where(better, here, column)
    ref = finite(m)
    out = part + wide(split) * N + row
    size = wide(splits) * N
    lead = tl.where(column < 0, NEG_INF, (best - ref) + gumbel)
    at_best = tl.min(tl.where((lead == tl.max(lead, 0)) & (column >= 0), column, V), 0)
    mine = column == at_best
    tl.store(out, m)
    tl.store(out + size, tl.sum(total, 0))
    tl.store(out + 2 * size, tl.sum(tl.where(mine, best, 0.0), 0))
    tl.store(out + 3 * size, tl.sum(tl.where(mine, gumbel, 0.0), 0))
    tl.store(part_index + wide(split) * N + row, tl.where(at_best < V, at_best, -1))


@triton.jit
def merge_sample_kernel(part, part_index, index, logp, N, splits, SPLITS: tl.constexpr):
    """The splits of one row: the token drawn, and its log-probability; -1 and NaN where there is no distribution."""
    row = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    keep = split < splits
    at = part + wide(split) * N + row
    size = wide(splits) * N
    m = tl.load(at, mask=keep, other=NEG_INF)
    total = tl.load(at + size, mask=keep, other=0.0)
    score = tl.load(at + 2 * size, mask=keep, other=NEG_INF)
    gumbel = tl.load(at + 3 * size, mask=keep, other=0.0)
    column = tl.load(part_index + wide(split) * N + row, mask=keep, other=-1)
    ref = finite(tl.max(m, 0))
    total = tl.sum(total * exp(m - ref), 0)
    lead = tl.where(column < 0, NEG_INF, (score - ref) + gumbel)
    best = (lead == tl.max(lead, 0)) & (column >= 0)
    winner = tl.min(tl.where(best, column, 2147483647), 0)
    picked = tl.sum(tl.where(column == winner, score, 0.0), 0)
    found = (winner < 2147483647) & (total > 0) & (total < INF)  # neither holds for NaN
    tl.store(index + row, tl.where(found, wide(winner), -1))
    tl.store(logp + row, tl.where(found, (picked - ref) - tl.log(total), NAN))
