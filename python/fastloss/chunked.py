"""The linear ops as chunks of rows: logits of a chunk by a library GEMM, a row kernel on them, gradients by two more GEMMs.

The logits of one chunk are the only large scratch; their size does not grow with the number of rows. Which row kernel
works on the chunk is the caller's business: each backend registers these ops around its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .add_product import add_product, takes
from .contract import NUM_STATS, Needs, Want
from .kept_memory import empty_beside
from .reference import accumulator

#: Rows of a chunk when the caller sets no limit: enough for GEMMs to run at full speed. A GPU needs more than a CPU.
CHUNK_ROWS = {"cuda": 4096, "cpu": 512}


class RowKernels(NamedTuple):
    """The row ops of one backend, as in docs/design.md; the last two write dlogits over the logits they are given."""

    row_stats: Callable[..., tuple[Tensor, Tensor]]
    row_stats_backward: Callable[..., Tensor]
    cross_entropy: Callable[..., tuple[Tensor, Tensor, Tensor]]


def chunk_rows(x: Tensor, w: Tensor, max_extra_bytes: int, rows: int = 0) -> int:
    """Rows of a chunk: by count of rows, never by the shape of the head; at most `max_extra_bytes` of logits (0: no limit).

    rows: the count to use, 0 for that of the device.
    """
    n, v = x.shape[0], max(1, w.shape[0])
    rows = rows or CHUNK_ROWS.get(x.device.type, CHUNK_ROWS["cpu"])
    if max_extra_bytes:
        rows = min(rows, max(1, max_extra_bytes // (v * x.element_size())))
    chunks = max(1, -(-n // rows))
    return max(1, -(-n // chunks))  # equal chunks


def _rows_in_use(x: Tensor, target: Tensor | None, ignore_index: int) -> Tensor | None:
    """Indices of the rows that count, or None for all. Only on a CPU: on a GPU the count would cost a host sync."""
    if target is None or x.device.type != "cpu":
        return None
    ignored = target == ignore_index
    return torch.nonzero(~ignored)[:, 0] if bool(ignored.any()) else None


def _pick(t: Tensor, index: Tensor | None, dim: int = 0) -> Tensor:
    return t if index is None else t.index_select(dim, index)


def _pick_some(t: Tensor | None, index: Tensor | None) -> Tensor | None:
    return None if t is None else _pick(t, index)


class _Problem(NamedTuple):
    """The operands of one call, ignored rows taken out."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    target: Tensor | None
    prob: Tensor | None
    rows: int  # of a chunk

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits of these rows); the buffer is used again for the next chunk."""
        n, v = self.x.shape[0], self.w.shape[0]
        buffer = empty_beside(self.x, (min(self.rows, n) * v,), self.x.dtype)
        for start in range(0, n, self.rows):
            part = slice(start, min(n, start + self.rows))
            z = buffer[: (part.stop - start) * v].view(-1, v)
            if self.bias is None:
                torch.mm(self.x[part], self.w.T, out=z)
            else:
                torch.addmm(self.bias.to(z.dtype), self.x[part], self.w.T, out=z)
            yield part, z

    def of(self, t: Tensor | None, part: slice) -> Tensor | None:
        return None if t is None else t[part]


def logits_in_chunks(x: Tensor, w: Tensor, bias: Tensor | None, max_extra_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits x wᵀ + bias) for callers that only read; what is yielded is overwritten by the next chunk."""
    yield from _Problem(x, w, bias, None, None, chunk_rows(x, w, max_extra_bytes)).chunks()


@functools.cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm takes a float32 accumulator for operands of `dtype`: older torch does not, and CPUs never."""
    a, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (float32) += aᵀ b."""
    if takes(total, a, b):
        add_product(total, a, b, first)
    elif total.dtype == a.dtype:
        torch.addmm(total, a.T, b, beta=0 if first else 1, out=total)
    elif a.is_cuda and _adds_in_float32(a.device, a.dtype):
        torch.addmm(total, a.T, b, out_dtype=torch.float32, beta=0 if first else 1, out=total)
    else:  # blocks of the product, added while they are in cache
        step = 16384 if a.is_cuda else 2048
        for v in range(0, total.shape[0], step):
            part = a[:, v : v + step].T
            block = torch.mm(part, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(part, b)
            if first:
                total[v : v + step] = block
            else:
                total[v : v + step] += block


def _write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b; out may be float32 where the operands are float16."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float()))


class _Gradients:
    """dX, dW and dbias, collected over the chunks.

    dW is summed in float32 when there are several chunks; for float16 all three are, and rounded once at the end.
    """

    def __init__(self, p: _Problem, needs: int, grad_weight: Tensor | None, unlift: Tensor | None) -> None:
        x, w, self.p, self.unlift = p.x, p.w, p, unlift
        self.given = grad_weight is not None
        wide = accumulator(w[:0]).dtype
        half = x.dtype == torch.float16
        self.dx = x.new_empty(x.shape, dtype=wide if half else x.dtype) if needs & Needs.INPUT else None
        self.db = w.new_zeros(w.shape[0], dtype=wide) if needs & Needs.BIAS else None
        self.dw = grad_weight
        if grad_weight is None and needs & Needs.WEIGHT:
            several = x.shape[0] > p.rows
            self.dw = empty_beside(w, w.shape, wide if several or half else w.dtype)
            if not len(x):
                self.dw.zero_()
        elif not needs & Needs.WEIGHT:
            self.dw = None

    def add(self, part: slice, dz: Tensor) -> None:
        p = self.p
        if self.dx is not None:
            _write_product(self.dx[part], dz, p.w)
        if self.dw is not None and self.given and self.unlift is not None:
            self.dw += torch.mm(dz.float().T, p.x[part].float()) * self.unlift
        elif self.dw is not None:
            x, first, last = p.x[part], part.start == 0 and not self.given, part.stop == len(p.x)
            if last and not self.given and self.unlift is None and takes(self.dw, dz, x):
                total, self.dw = self.dw, empty_beside(p.w, p.w.shape, p.w.dtype)
                add_product(total, dz, x, first, rounded=self.dw)
            else:
                _add_product(self.dw, dz, x, first)
        if self.db is not None:
            self.db += dz.sum(0, dtype=self.db.dtype)

    def result(
        self, index: Tensor | None, n: int, bias: Tensor | None, wide: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """wide: float16 operands get float32 gradients."""

        def done(t: Tensor | None, like: Tensor, given: bool = False) -> Tensor:
            dtype = torch.float32 if wide and like.dtype == torch.float16 else like.dtype
            if t is None or given:
                return like.new_empty(0, dtype=dtype)
            return (t if self.unlift is None else t.mul_(self.unlift)).to(dtype)

        dx = done(self.dx, self.p.x)
        if index is not None and self.dx is not None:
            dx = dx.new_zeros(n, dx.shape[1]).index_copy_(0, index, dx)
        return dx, done(self.dw, self.p.w, self.given), done(self.db, self.p.w if bias is None else bias)


def _lifted(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """float16 only: coefficients of a mean are so small that dz would underflow. Bring the largest near 1 by a power of
    two, a number on the device, and return its inverse for the products, which are large enough again."""
    if dtype != torch.float16 or not rows.numel():
        return rows, None
    largest = torch.where(rows.isfinite(), rows.abs(), 0.0).amax().clamp(min=2.0**-100)
    lift = torch.exp2(torch.floor(-torch.log2(largest)))
    return rows * lift, 1 / lift


def _problem(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None, ignore: int, limit: int
) -> tuple[_Problem, Tensor | None]:
    index = _rows_in_use(x, target, ignore)
    x_used = x if index is None else x.index_select(0, index)
    rows = chunk_rows(x_used, w, limit)
    return _Problem(x_used, w, bias, _pick_some(target, index), _pick_some(prob, index), rows), index


class _Statistics:
    """stats and argmax of all rows, collected over the chunks; ignored rows keep 0 and -1."""

    def __init__(self, x: Tensor, index: Tensor | None, want: int) -> None:
        n = x.shape[0]
        new = x.new_zeros if index is not None or not n else x.new_empty
        self.index, self.table = index, new((NUM_STATS, n), dtype=accumulator(x[:0]).dtype)
        self.argmax = x.new_full((n if want & Want.ARGMAX else 0,), -1, dtype=torch.int64)

    def put(self, part: slice, stats: Tensor, argmax: Tensor) -> None:
        if self.index is None:
            self.table[:, part] = stats
            if len(self.argmax):
                self.argmax[part] = argmax
        else:
            self.table[:, self.index[part]] = stats
            if len(self.argmax):
                self.argmax[self.index[part]] = argmax


class Chunked:
    """The three linear ops around one backend's row kernels."""

    def __init__(self, rows: RowKernels) -> None:
        self.rows = rows

    def linear_row_stats(
        self, x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None,
        column_weight: Tensor | None, temperature: Tensor | None, ignore_index: int, want: int, scale: float,
        softcap: float, max_extra_bytes: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        p, index = _problem(x, w, bias, target, prob, ignore_index, max_extra_bytes)
        out, warm = _Statistics(x, index, want), _pick_some(temperature, index)
        for part, z in p.chunks():
            stats, argmax = self.rows.row_stats(
                z, p.of(p.target, part), p.of(p.prob, part), column_weight, p.of(warm, part),
                ignore_index, want, scale, softcap,
            )  # fmt: skip
            out.put(part, stats, argmax)
        return out.table, out.argmax

    def linear_row_stats_backward(
        self, coef: Tensor, stats: Tensor, argmax: Tensor, x: Tensor, w: Tensor, bias: Tensor | None,
        target: Tensor | None, prob: Tensor | None, column_weight: Tensor | None, temperature: Tensor | None,
        ignore_index: int, want: int, scale: float, softcap: float, needs: int, max_extra_bytes: int,
        grad_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        p, index = _problem(x, w, bias, target, prob, ignore_index, max_extra_bytes)
        coef, unlift = _lifted(coef, x.dtype)
        warm, coef_used, stats_used = _pick_some(temperature, index), _pick(coef, index, 1), _pick(stats, index, 1)
        argmax_used = _pick(argmax, index) if len(argmax) else argmax
        gradients = _Gradients(p, needs, grad_weight, unlift)
        for part, z in p.chunks():
            dz = self.rows.row_stats_backward(
                coef_used[:, part], stats_used[:, part], argmax_used[part] if len(argmax) else argmax, z,
                p.of(p.target, part), p.of(p.prob, part), column_weight, p.of(warm, part),
                ignore_index, want, scale, softcap,
            )  # fmt: skip
            gradients.add(part, dz)
        return gradients.result(index, x.shape[0], bias)

    def linear_row_stats_backward_into(
        self, coef: Tensor, stats: Tensor, argmax: Tensor, grad_weight: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor]:
        dx, _, db = self.linear_row_stats_backward(coef, stats, argmax, *args, grad_weight=grad_weight)  # type: ignore[misc]
        return dx, db

    def linear_cross_entropy(
        self, x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None,
        column_weight: Tensor | None, epilogue: Tensor, ignore_index: int, want: int, scale: float, softcap: float,
        needs: int, max_extra_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        p, index = _problem(x, w, bias, target, prob, ignore_index, max_extra_bytes)
        epilogue, unlift = _lifted(epilogue, x.dtype)
        out, gradients = _Statistics(x, index, want), _Gradients(p, needs, None, unlift)
        epilogue_used = _pick(epilogue, index, 1)
        for part, z in p.chunks():
            stats, argmax, dz = self.rows.cross_entropy(
                z, p.of(p.target, part), p.of(p.prob, part), column_weight, epilogue_used[:, part],
                ignore_index, want, scale, softcap,
            )  # fmt: skip
            out.put(part, stats, argmax)
            gradients.add(part, dz)
        return out.table, out.argmax, *gradients.result(index, x.shape[0], bias, wide=True)

    def linear_row_loss(
        self, x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None,
        column_weight: Tensor | None, temperature: Tensor | None, ignore_index: int, want: int, scale: float,
        softcap: float, needs: int, max_extra_bytes: int, coefficients: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Mode C for any loss that is a sum over rows: (sum of the losses, dx, dw, dbias).

        coefficients(stats, argmax, target, prob, temperature) of a chunk -> (sum of its losses, coef [7, n]).
        """
        p, index = _problem(x, w, bias, target, prob, ignore_index, max_extra_bytes)
        gradients, warm, total = None, _pick_some(temperature, index), x.new_zeros((), dtype=accumulator(x[:0]).dtype)
        for part, z in p.chunks():
            row = (p.of(p.target, part), p.of(p.prob, part), column_weight, p.of(warm, part))
            stats, argmax = self.rows.row_stats(z, *row, ignore_index, want, scale, softcap)
            value, coef = coefficients(stats, argmax, row[0], row[1], row[3])
            total += value
            if gradients is None:  # one lift for all chunks, from the size of a mean's share
                lift = 2.0 ** math.floor(math.log2(max(1, len(p.x)))) if x.dtype == torch.float16 else None
                unlift = None if lift is None else total.new_tensor(1 / lift)
                gradients = _Gradients(p, needs, None, unlift)
            coef = coef if lift is None else coef * lift
            dz = self.rows.row_stats_backward(coef, stats, argmax, z, *row, ignore_index, want, scale, softcap)
            gradients.add(part, dz)
        gradients = _Gradients(p, needs, None, None) if gradients is None else gradients
        return total, *gradients.result(index, x.shape[0], bias, wide=True)
