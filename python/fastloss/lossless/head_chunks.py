"""The row contract (docs/design.md) over a compressed head: statistics and gradients, decoding a chunk of rows at a time.

Of W [V, D] only a chunk [C, D] is ever dense, and of the logits only [N, C]. The chunks' numbers merge as in online softmax:
a running maximum over the rest, and sums of e^(z - max) that are scaled when it rises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import NUM_STATS, Coef, Needs, Stat, Want
from ..ops import _library
from ..reference import INF, finite, scores

#: Bytes of decoded weights and logits held at a time, unless `max_extra_bytes` says another number.
EXTRA_BYTES = 32 << 20


class Chunk(NamedTuple):
    """Rows first..first + count of the head: dense, with their logits."""

    first: int
    weight: Tensor  # [C, D]
    z: Tensor  # [N, C], fp32 or fp64

    def of(self, columns: Tensor | None) -> Tensor | None:
        """The part of what has one number a column, in the dtype of z."""
        end = self.first + self.z.shape[1]
        return None if columns is None else columns[..., self.first : end].to(self.z.dtype)

    def own(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(column [N, 1] to index with, whether the row's target is in this chunk [N, 1])."""
        local = (target - self.first)[:, None]
        mine = (local >= 0) & (local < self.z.shape[1])
        return torch.where(mine, local, 0), mine


def rows_at_a_time(n: int, vocab: int, columns: int, item: int, limit: int) -> int:
    """How many rows of W are decoded at a time: a multiple of 16 whose bytes, and those of four [N, C] arrays of logits,
    stay within the limit; at least 16."""
    each = columns * item + n * (item + 4 * 4)
    return min(max(vocab, 1), max(16, (limit or EXTRA_BYTES) // each // 16 * 16))


def chunks(
    x: Tensor, blob: Tensor, plan: Sequence[int], dtype: torch.dtype, bias: Tensor | None, scale: float, softcap: float,
    limit: int,
) -> Iterator[Chunk]:  # fmt: skip
    """The chunks of the head, one after the other: who asks for the next one should have let go of the last."""
    vocab, columns = plan[4], plan[5]
    step = rows_at_a_time(x.shape[0], vocab, columns, max(dtype.itemsize, x.element_size()), limit)
    there = blob.to(x.device, non_blocking=True)

    def made(first: int) -> Chunk:
        count = min(step, vocab - first)
        weight = torch.ops.fastloss.lossless_decode(there, plan, first * columns, count * columns, dtype)
        weight = weight.reshape(count, columns).to(x.dtype)
        part = None if bias is None else bias[first : first + count]
        return Chunk(first, weight, scores(F.linear(x, weight, part), scale, softcap))

    for first in range(0, vocab, step):
        yield made(first)  # no name here holds a chunk while the next one is made


class _Running:
    """Statistics of the columns seen so far, relative to the running reference point."""

    def __init__(self, n: int, like: Tensor, want: int, soft: bool) -> None:
        def new(value: float) -> Tensor:
            return torch.full((n,), value, dtype=like.dtype, device=like.device)

        self.want = want
        self.max, self.total, self.spread = new(-INF), new(0.0), new(0.0)  # over the rest: max, sum e, sum e (z - ref)
        self.sum, self.picked, self.mass = new(0.0), new(0.0 if soft else torch.nan), new(0.0)
        self.weights: Tensor | float = 0.0  # sum of c_j
        self.top, self.argmax = new(-INF), torch.zeros(n, dtype=torch.int64, device=like.device)

    def add(self, chunk: Chunk, target: Tensor | None, prob: Tensor | None, column_weight: Tensor | None) -> None:
        z, weight = chunk.z, chunk.of(column_weight)
        if self.want & Want.ARGMAX:
            top, at = z.max(1)
            better = (top > self.top) | (top.isnan() & ~self.top.isnan())
            self.top, self.argmax = (
                torch.where(better, top, self.top),
                torch.where(better, at + chunk.first, self.argmax),
            )
        rest = z
        if target is not None:
            column, mine = chunk.own(target)
            own = z.gather(1, column)
            self.picked = torch.where(mine, own, self.picked[:, None])[:, 0]
            rest = z.scatter(1, column, torch.where(mine, -INF, own))
        before, was = self.max, finite(self.max)
        self.max = torch.maximum(before, rest.amax(1))
        ref = finite(self.max)
        moved = was - ref
        if self.want & Want.SUM:
            shifted = z - ref[:, None]
            of_chunk = shifted.sum(1) if weight is None else shifted @ weight
            self.sum = self.sum + self.weights * moved + of_chunk
            self.weights = self.weights + (float(z.shape[1]) if weight is None else weight.sum())
        if prob is not None:
            q = prob[:, chunk.first : chunk.first + z.shape[1]].to(z.dtype)
            q = q if weight is None else q * weight
            self.picked = self.picked + self.mass * moved + (q * (z - ref[:, None])).sum(1)
            self.mass = self.mass + q.sum(1)
        faded = (before - ref).exp()  # 0 before there was anything
        e = (rest - ref[:, None]).exp()
        if self.want & Want.ENTROPY:
            gap = torch.where(rest == -INF, 0.0, rest - ref[:, None])
            old = self.spread + self.total * torch.where(before == -INF, 0.0, moved)
            self.spread = faded * old + (e * gap).sum(1)
        self.total = faded * self.total + e.sum(1)

    def table(self, hard: bool) -> Tensor:
        ref = finite(self.max)
        some = self.total != 0
        total = torch.where(some, self.total, 1.0)
        logsum = torch.where(some, total.log(), -INF)
        mean = torch.zeros_like(ref)
        if self.want & Want.ENTROPY:
            mean = self.spread / total
            if hard:
                gap = self.picked - ref
                p = torch.where(some, torch.sigmoid(gap - logsum), 1.0)
                mean = (1 - p) * mean + torch.where(p == 0, 0.0, p * gap)
        zero = torch.zeros_like(ref)
        return torch.stack([self.max, logsum, self.picked, mean, self.sum, zero, zero, self.mass])


def _check_targets(target: Tensor | None, vocab: int, ignore_index: int) -> None:
    """IndexError for a class id out of range, on a CPU; a GPU's is not waited for, its row becomes NaN."""
    if target is None or target.device.type != "cpu":
        return
    bad = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"target {int(target[row])} at row {row} is out of bounds: classes are 0..{vocab - 1}, or ignore_index "
            f"{ignore_index}"
        )


def _row_stats(
    x: Tensor, blob: Tensor, plan: Sequence[int], dtype: torch.dtype, bias: Tensor | None, target: Tensor | None,
    prob: Tensor | None, column_weight: Tensor | None, ignore_index: int, want: int, scale: float, softcap: float,
    limit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    running = _Running(x.shape[0], like, want, prob is not None)
    _check_targets(target, plan[4], ignore_index)
    with torch.no_grad():
        for chunk in chunks(x, blob, plan, dtype, bias, scale, softcap, limit):
            running.add(chunk, target, prob, column_weight)
            del chunk
    table, argmax = running.table(target is not None), running.argmax
    if target is not None:
        ignored = target == ignore_index
        table, argmax = torch.where(ignored, 0.0, table), torch.where(ignored, -1, argmax)
    return table, argmax if want & Want.ARGMAX else argmax[:0].clone()


def _dz(
    chunk: Chunk, coef: Tensor, stats: Tensor, argmax: Tensor, target: Tensor | None, prob: Tensor | None,
    column_weight: Tensor | None, ignore_index: int, want: int, scale: float, softcap: float, vocab: int,
) -> Tensor:  # fmt: skip
    """The gradient of the chunk's logits, from the coefficients of the row contract."""
    c, z, weight = coef[:, :, None], chunk.z, chunk.of(column_weight)
    shifted = z - finite(stats[Stat.MAX])[:, None]
    logsum = stats[Stat.LOGSUM][:, None]
    factor = c[Coef.REST]
    if want & Want.ENTROPY:
        factor = factor + c[Coef.REST_Z] * shifted.clamp(min=-1e30)  # 0 * -inf would be NaN
    dz = torch.where(logsum == -INF, 0.0, (shifted - logsum).exp() * factor)
    if target is not None:
        column, mine = chunk.own(target)
        dz = dz.scatter(1, column, torch.where(mine, c[Coef.OWN], dz.gather(1, column)))
    if want & Want.SUM:
        dz = dz + c[Coef.COLUMN] * (1.0 if weight is None else weight)
    if prob is not None:
        q = prob[:, chunk.first : chunk.first + z.shape[1]].to(z.dtype)
        dz = dz + c[Coef.OWN] * (q if weight is None else q * weight)
    if want & Want.ARGMAX:
        column, mine = chunk.own(argmax)
        dz = dz.scatter_add(1, column, torch.where(mine, c[Coef.ARG], 0.0))
    if softcap:
        dz = dz * (1 - (z / softcap) ** 2)
    if target is not None:
        known = (target >= 0) & (target < vocab)
        dz = torch.where(known[:, None], dz, torch.nan)
        dz = torch.where((target == ignore_index)[:, None], 0.0, dz)
    return dz * scale


def _row_stats_backward(
    coef: Tensor, stats: Tensor, argmax: Tensor, x: Tensor, blob: Tensor, plan: Sequence[int], dtype: torch.dtype,
    bias: Tensor | None, target: Tensor | None, prob: Tensor | None, column_weight: Tensor | None, ignore_index: int,
    want: int, scale: float, softcap: float, needs: int, limit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    d_x = torch.zeros(x.shape if needs & Needs.INPUT else (0,), dtype=stats.dtype, device=x.device)
    parts = []
    with torch.no_grad():
        for chunk in chunks(x, blob, plan, dtype, bias, scale, softcap, limit):
            dz = _dz(
                chunk, coef, stats, argmax, target, prob, column_weight, ignore_index, want, scale, softcap, plan[4]
            )
            if needs & Needs.BIAS:
                parts.append(dz.sum(0))
            if needs & Needs.INPUT:
                d_x += dz.to(x.dtype) @ chunk.weight
            del chunk, dz
    d_bias = torch.cat(parts) if parts else d_x[:0].reshape(-1)
    return d_x.to(x.dtype), d_bias.to(x.dtype if bias is None else bias.dtype)


def _define(schema: str, run: Any, fake: Any) -> None:
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastloss::{name}", fake, lib=_library)


def _stats_fake(x: Tensor, blob: Tensor, plan: Sequence[int], dtype: torch.dtype, *rest: Any) -> tuple[Tensor, Tensor]:
    want, n = rest[5], x.shape[0]
    table = x.new_empty((NUM_STATS, n), dtype=torch.promote_types(x.dtype, torch.float32))
    return table, x.new_empty((n,) if want & Want.ARGMAX else (0,), dtype=torch.int64)


def _backward_fake(
    coef: Tensor, stats: Tensor, argmax: Tensor, x: Tensor, blob: Tensor, plan: Sequence[int], dtype: torch.dtype,
    bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    needs = rest[-2]
    d_x = x.new_empty(x.shape if needs & Needs.INPUT else (0,))
    like = x if bias is None else bias
    return d_x, like.new_empty((plan[4],) if needs & Needs.BIAS else (0,))


_ROWS = (
    "Tensor x, Tensor blob, int[] plan, ScalarType dtype, Tensor? bias, Tensor? target, Tensor? prob,"
    " Tensor? column_weight, int ignore_index, int want, float scale, float softcap"
)
_define(f"compressed_row_stats({_ROWS}, int limit) -> (Tensor, Tensor)", _row_stats, _stats_fake)
_define(
    f"compressed_row_stats_backward(Tensor coef, Tensor stats, Tensor argmax, {_ROWS}, int needs, int limit)"
    " -> (Tensor, Tensor)",
    _row_stats_backward, _backward_fake,
)  # fmt: skip
