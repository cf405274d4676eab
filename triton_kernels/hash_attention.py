"""hash_attention: sums over pairs of tokens whose weight is a product of two rows, linear in the number of tokens
(docs/design.md, "hash_attention"). The forward and each gradient is one of them.

The context, sum over tokens of w_tᵀ z_t, is summed by blocks of tokens, a program each; a second kernel adds the blocks in
order (or what comes before each, causal), and a third multiplies the rows of x by it. No atomics: reruns are bit-equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device, wide

#: Tokens that a program takes at a time, and rows and columns of the context that it holds at most.
TOKENS, WIDEST = 64, 64
#: Numbers of the context that a program adds.
ADDED = 256


class Rows(NamedTuple):
    """[G, T, width] without gaps, row i times scale_i (None: 1)."""

    data: Tensor
    scale: Tensor | None = None


@triton.jit
def tile_of(rows, scale, first, count, width, columns, tokens):
    """Rows `tokens` of a group that begins with row `first`, in fp32 times their scale."""
    inside = tokens < count
    at = first + tokens
    some = inside[:, None] & (columns < width)[None, :]
    tile = tl.load(rows + at[:, None] * width + columns[None, :], mask=some, other=0.0).to(tl.float32)
    if scale is not None:
        tile *= tl.load(scale + at, mask=inside, other=0.0)[:, None]
    return tile


@triton.jit
def numbers_of(table, constant, first, count, tokens):
    """One number a token: of a table, or the constant."""
    if table is None:
        return tl.where(tokens < count, constant, 0.0)
    else:
        return tl.load(table + first + tokens, mask=tokens < count, other=0.0)


@triton.jit(do_not_specialize=["keys", "steps", "blocks"])
def context_kernel(w, w_scale, z, z_scale, beta, context, codes, keys, depth, columns, steps, blocks, SUM: tl.constexpr,
                   D: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """context[block] [depth + SUM, columns]: the sums of wᵀ z and (SUM) beta z; codes[block] [depth] (D): of w."""
    block, tile = wide(tl.program_id(0)), tl.program_id(1)
    group, b = block // blocks, block % blocks
    across = tl.cdiv(columns, BC)
    rows = tile // across * BA + tl.arange(0, BA)
    cols = tile % across * BC + tl.arange(0, BC)
    total = tl.zeros([BA, BC], tl.float32)
    plain = tl.zeros([BC], tl.float32)
    ones = tl.zeros([BA], tl.float32)
    for step in range(0, steps):
        tokens = (b * steps + step) * BT + tl.arange(0, BT)
        a = tile_of(w, w_scale, group * keys, keys, depth, rows, tokens)
        c = tile_of(z, z_scale, group * keys, keys, columns, cols, tokens)
        total += tl.dot(tl.trans(a), c, input_precision=PRECISION)
        if SUM:
            plain += tl.sum(numbers_of(beta, 1.0, group * keys, keys, tokens)[:, None] * c, 0)
        if D:
            ones += tl.sum(a, 0)
    out = context + block * (depth + SUM) * columns
    tl.store(
        out + rows[:, None] * columns + cols[None, :], total, mask=(rows < depth)[:, None] & (cols < columns)[None, :]
    )
    if SUM:
        tl.store(out + wide(depth) * columns + cols, plain, mask=cols < tl.where(tile // across == 0, columns, 0))
    if D:
        tl.store(codes + block * depth + rows, ones, mask=rows < tl.where(tile % across == 0, depth, 0))


@triton.jit(do_not_specialize=["blocks"])
def combine_kernel(sums, size, blocks, DIRECTION: tl.constexpr, BLOCK: tl.constexpr):
    """sums [G, blocks, size] in place: the first block gets the sum of all, or (causal) each what comes before it."""
    at = wide(tl.program_id(0)) * blocks * size + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK) < size
    before = tl.zeros([BLOCK], tl.float32)
    for n in range(0, blocks):
        b = blocks - 1 - n if DIRECTION < 0 else n
        own = tl.load(sums + at + wide(b) * size, mask=keep, other=0.0)
        if DIRECTION != 0:
            tl.store(sums + at + wide(b) * size, before, mask=keep)
        before += own
    if DIRECTION == 0:
        tl.store(sums + at, before, mask=keep)


@triton.jit(do_not_specialize=["queries", "keys", "steps", "blocks", "alpha_constant", "own", "bias"])
def answer_kernel(x, x_scale, w, w_scale, z, z_scale, alpha, beta, context, codes, d, y, queries, keys, depth, columns, steps,
                  blocks, alpha_constant, own, bias, SUM: tl.constexpr, OWN: tl.constexpr, D: tl.constexpr,
                  DIRECTION: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """y = x context + alpha beta's sums (causal: and the pairs within the chunk) + own z, divided by D where that is made."""
    chunk = wide(tl.program_id(0))
    chunks = tl.cdiv(queries, BT)
    group, at = chunk // chunks, chunk % chunks
    tokens = at * BT + tl.arange(0, BT)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    block = group * blocks + (at if DIRECTION != 0 else 0)
    held = context + block * (depth + SUM) * columns
    answer = tl.zeros([BT, BC], tl.float32)
    pairs = tl.zeros([BT, BT], tl.float32)
    total = tl.zeros([BT], tl.float32)
    for r0 in range(0, depth, BA):
        rows = r0 + tl.arange(0, BA)
        a = tile_of(x, x_scale, group * queries, queries, depth, rows, tokens)
        some = (rows < depth)[:, None] & (cols < columns)[None, :]
        c = tl.load(held + rows[:, None] * columns + cols[None, :], mask=some, other=0.0)
        answer += tl.dot(a, c, input_precision=PRECISION)
        if D:
            sums = tl.load(codes + block * depth + rows, mask=rows < depth, other=0.0)
            total += tl.sum(a * sums[None, :], 1)
        if DIRECTION != 0:
            e = tile_of(w, w_scale, group * keys, keys, depth, rows, tokens)
            pairs += tl.dot(a, tl.trans(e), input_precision=PRECISION)
    if SUM:
        first = numbers_of(alpha, alpha_constant, group * queries, queries, tokens)
        plain = tl.load(held + wide(depth) * columns + cols, mask=cols < columns, other=0.0)
        answer += first[:, None] * plain[None, :]
    if DIRECTION != 0:
        i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
        seen = (j <= i) if DIRECTION > 0 else (j >= i)
        seen = seen & (tokens < keys)[None, :]
        if D:
            total += tl.sum(tl.where(seen, pairs, 0.0), 1)
        if SUM:
            pairs += first[:, None] * numbers_of(beta, 1.0, group * keys, keys, tokens)[None, :]
        value = tile_of(z, z_scale, group * keys, keys, columns, cols, tokens)
        answer += tl.dot(tl.where(seen, pairs, 0.0), value, input_precision=PRECISION)
    if OWN:
        answer += own * tile_of(z, z_scale, group * keys, keys, columns, cols, tokens)
    if D:
        count = (tokens + 1).to(tl.float32) if DIRECTION != 0 else keys * 1.0
        total += bias * count
        answer /= tl.where(tokens < queries, total, 1.0)[:, None]
        tl.store(d + group * queries + tokens, total, mask=tokens < tl.where(tl.program_id(1) == 0, queries, 0))
    some = (tokens < queries)[:, None] & (cols < columns)[None, :]
    to = y + (group * queries + tokens)[:, None] * columns + cols[None, :]
    tl.store(to, answer.to(y.dtype.element_ty), mask=some)


def sums_over_pairs(
    x: Rows, w: Rows, z: Rows, direction: int, *, constant: float = 0.0, own: float = 0.0, alpha: Tensor | None = None,
    beta: Tensor | None = None, d: Tensor | None = None, bias: float = 0.0,
) -> Tensor:  # fmt: skip
    """y_i = sum over j of (<x_i, w_j> + alpha_i beta_j) z_j + own z_i [G, N, C]; j all keys, j <= i (1) or j >= i (-1).

    alpha None: `constant`; beta None: 1. d [G, N]: gets sum over j of (<x_i, w_j> + bias), and y is divided by it.
    """
    (groups, queries, depth), (_, keys, columns) = x.data.shape, z.data.shape
    y = z.data.new_empty(groups, queries, columns)
    if not y.numel() and d is None:
        return y
    with_sum, with_d = alpha is not None or constant != 0, d is not None
    # Causal: a context for each chunk of tokens. Else so few that adding them costs little, and enough to fill a GPU.
    chunks = triton.cdiv(keys, TOKENS)
    steps = 1 if direction else max(1, min(8, chunks))
    blocks = triton.cdiv(chunks, steps)
    number = {"dtype": torch.float32, "device": x.data.device}
    size = (depth + with_sum) * columns
    context = torch.empty(groups * blocks, size, **number)
    codes = torch.empty(groups * blocks if with_d else 0, depth, **number)
    exact = z.data.dtype == torch.float32  # three products, which need more registers
    most = WIDEST // 2 if exact else WIDEST
    deep, across = (max(16, min(most, triton.next_power_of_2(n))) for n in (depth, columns))
    tiles = triton.cdiv(columns, across)
    # tf32 holds 16-bit numbers exactly, and sums of them better than their own dtype does; float32 takes three products.
    precision = "tf32x3" if exact else "tf32"
    shape = {"BT": TOKENS, "BA": deep, "BC": across, "PRECISION": precision, "num_warps": 8 if exact else 4}
    if not groups or not queries:
        return y
    with on_device(x.data):
        context_kernel[(groups * blocks, triton.cdiv(depth, deep) * max(1, tiles))](
            w.data, w.scale, z.data, z.scale, beta, context, codes, keys, depth, columns, steps, blocks,
            SUM=with_sum, D=with_d, **shape,
        )  # fmt: skip
        for sums, many in ((context, size), (codes, depth if with_d else 0)):
            if many and (blocks > 1 or direction):
                combine_kernel[(groups, triton.cdiv(many, ADDED))](
                    sums, many, blocks, DIRECTION=direction, BLOCK=ADDED, num_warps=4
                )
        answer_kernel[(groups * triton.cdiv(queries, TOKENS), max(1, tiles))](
            x.data, x.scale, w.data, w.scale, z.data, z.scale, alpha, beta, context, codes, d, y, queries, keys, depth,
            columns, steps, blocks, float(constant), float(own), float(bias), SUM=with_sum, OWN=own != 0, D=with_d,
            DIRECTION=direction, **shape,
        )  # fmt: skip
    return y


def hash_attention(q: Tensor, k: Tensor, v: Tensor, own: bool, causal: bool) -> tuple[Tensor, Tensor]:
    """(out [G, N, E], D [G, N])."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    d = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    b = q.shape[2] + 1
    form = {"own": b} if own else {"constant": b}
    return sums_over_pairs(Rows(q), Rows(k), Rows(v), int(causal), d=d, bias=b, **form), d


def hash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, d: Tensor, own: bool, causal: bool, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), with 0 elements where `needs` (1, 2, 4) does not ask for them."""
    grad, q, k, v = (t.contiguous() for t in (grad, q, k, v))
    inverse, b, order = 1 / d.contiguous(), q.shape[2] + 1, int(causal)
    g = Rows(grad, inverse)
    dq = dk = dv = v.new_empty(0)
    if needs & 3:
        slope = -(grad.float() * out.float()).sum(-1) * inverse
        if needs & 1:
            dq = sums_over_pairs(g, Rows(v), Rows(k), order, alpha=slope)
        if needs & 2:
            dk = sums_over_pairs(Rows(v), g, Rows(q), -order, constant=1, beta=slope)
    if needs & 4:
        dv = sums_over_pairs(Rows(k), Rows(q), g, -order, **({"own": b} if own else {"constant": b}))
    return dq, dk, dv
