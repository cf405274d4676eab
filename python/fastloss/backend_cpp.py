"""The `cpp` backend: hand-written CPU kernels (csrc/cpu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import kept_memory
from .compiled import _C, DTYPES, MISSING, CompiledRows, check_rows, pointer, register, why_not_linear
from .compiled_pointwise import CompiledPointwise
from .compiled_terms import CompiledTerms, register_terms
from .contract import NUM_EPILOGUES, NUM_STATS, Needs, Stat
from .registry import kernel


def check_targets(target: Tensor | None, classes: int, ignore_index: int) -> None:
    """Raise IndexError, as torch does on a CPU, when a class id is neither in [0, classes) nor ignore_index."""
    if target is None or not target.numel():
        return
    ids = target.contiguous()
    bad = _C.first_bad_target(ids.data_ptr(), ids.numel(), classes, ignore_index)  # type: ignore[union-attr]
    if bad >= 0:
        raise IndexError(
            f"target {int(ids.reshape(-1)[bad])} at row {bad} is out of bounds: "
            f"classes are 0..{classes - 1}, or ignore_index {ignore_index}"
        )


#: The instruction set that kernels are asked for: -1 the best of this machine, else a level of csrc/cpu/cpu.h (tests).
ISA = -1


def _launch(logits: Tensor, /, **fields: Any) -> None:
    _C.row_stats_cpu(**fields, isa=ISA)  # type: ignore[union-attr]


def _missing(x: Tensor) -> str | None:
    if MISSING:
        return MISSING
    if x.device.type != "cpu":
        return f"runs on CPU tensors, got {x.device}"
    if _C.best_isa() == 0:  # type: ignore[union-attr]
        return "the processor has neither AVX2 nor AVX-512, and scalar code is slower than torch"
    return None


rows = CompiledRows(_launch, lambda x: kept_memory.empty(x.shape, x.dtype))
chunked = register("cpp", rows, _missing, check_targets)


def _launch_pointwise(input: Tensor, *args: Any) -> None:
    _C.pointwise_loss_cpu(*args, ISA)  # type: ignore[union-attr]


CompiledPointwise(_launch_pointwise, lambda shape, dtype, device: kept_memory.empty(shape, dtype)).register(
    "cpp", _missing
)


def check_listed(listed: Tensor | None, columns: int, ignore_index: int) -> None:
    """Raise IndexError for a listed id beyond the columns; negative ids and ignore_index say that there is none."""
    if listed is None or not listed.numel():
        return
    bad = (listed >= columns) & (listed != ignore_index)
    if bool(bad.any()):
        row, k = (int(i) for i in bad.nonzero()[0])
        raise IndexError(
            f"listed column {int(listed[row, k])} at [{row}, {k}] is out of bounds: columns are 0..{columns - 1}; "
            f"a negative id or ignore_index {ignore_index} means none"
        )


def _launch_terms(logits: Tensor, /, **fields: Any) -> None:
    _C.row_terms_cpu(_C.RowTerms(**fields), isa=ISA)  # type: ignore[union-attr]


terms = CompiledTerms(_launch_terms, lambda x: kept_memory.empty(x.shape, x.dtype))
register_terms("cpp", terms, _missing, check_listed, both=True)


def why_not_head(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None, *_: Any
) -> str | None:
    """Why neither the fused kernel nor chunks can take this head, or None."""
    return _missing(x) or why_not_linear(x, w, prob)


class _Head:
    """One call of the fused kernel on a linear head (csrc/cpu/linear_cross_entropy.h), or the reason against it.

    The tensors whose addresses `fields` holds are kept alive here.
    """

    def __init__(
        self, x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None,
        column_weight: Tensor | None, epilogue: Tensor | None, ignore_index: int, want: int, scale: float, softcap: float,
        needs: int, max_extra_bytes: int, **margin: Any,
    ) -> None:  # fmt: skip
        (n, d), v = x.shape, w.shape[0]
        self.x, self.w = (t if t.stride(1) == 1 else t.contiguous() for t in (x, w))
        self.bias, self.column_weight, self.epilogue = (
            None if t is None else t.to(torch.float32).contiguous() for t in (bias, column_weight, epilogue)
        )
        self.target = None if target is None else target.contiguous()
        self.fields = dict(
            x=pointer(self.x), w=pointer(self.w), bias=pointer(self.bias), target=pointer(self.target),
            column_weight=pointer(self.column_weight), epilogue=pointer(self.epilogue), stats=0,
            dx=needs & Needs.INPUT, dw=needs & Needs.WEIGHT, dbias=needs & Needs.BIAS, n=n, d=d, v=v,
            ldx=self.x.stride(0), ldw=self.w.stride(0), ignore_index=ignore_index, max_extra_bytes=max_extra_bytes,
            dtype=DTYPES[x.dtype], want=int(want), scale=scale, softcap=softcap, isa=ISA,
            **margin,
        )  # fmt: skip
        self.why_not: str | None = None
        if prob is not None:
            self.why_not = "takes class ids, not probabilities"
        elif n == 0:
            self.why_not = "takes at least one row"
        else:  # of the results' addresses it only asks whether they are 0
            self.why_not = _C.linear_cross_entropy_why_not(**self.fields)  # type: ignore[union-attr]
        self.needs = needs

    def run(self) -> bool:
        """Whether the statistics came out finite; those of logits beyond 1e9 may not, and want another way."""
        (n, d), v, needs = self.x.shape, self.w.shape[0], self.needs
        self.stats = torch.zeros(NUM_STATS, n, dtype=torch.float32, device="cpu")
        self.dx = kept_memory.empty((n, d) if needs & Needs.INPUT else (0,), self.x.dtype)
        self.dw = kept_memory.empty((v, d) if needs & Needs.WEIGHT else (0,), self.w.dtype)
        self.db = torch.empty(v if needs & Needs.BIAS else 0, dtype=torch.float32, device="cpu")
        self.fields.update(
            stats=self.stats.data_ptr(), dx=self.dx.data_ptr(), dw=self.dw.data_ptr(), dbias=self.db.data_ptr()
        )
        _C.linear_cross_entropy_cpu(**self.fields)  # type: ignore[union-attr]
        return bool(self.stats[: Stat.TARGET + 1].isfinite().all())


@kernel("linear_row_stats", "cpp", why_not_head)
def linear_row_stats(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None, column_weight: Tensor | None,
    temperature: Tensor | None, ignore_index: int, want: int, scale: float, softcap: float, max_extra_bytes: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_targets(target, w.shape[0], ignore_index)
    tail = (ignore_index, want, scale, softcap)
    if x.dtype == torch.float32:
        head = _Head(x, w, bias, target, prob, column_weight, None, *tail, Needs.NOTHING, max_extra_bytes)
        if head.why_not is None and head.run():
            return head.stats, torch.empty(0, dtype=torch.int64, device="cpu")
    # In 16 bits the backward makes logits that are rounded; its probabilities sum to 1 only with statistics of the same.
    return chunked.linear_row_stats(x, w, bias, target, prob, column_weight, temperature, *tail, max_extra_bytes)


@kernel("linear_cross_entropy", "cpp", why_not_head)
def linear_cross_entropy(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None, column_weight: Tensor | None,
    epilogue: Tensor, ignore_index: int, want: int, scale: float, softcap: float, needs: int, max_extra_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_targets(target, w.shape[0], ignore_index)
    check_rows(epilogue, NUM_EPILOGUES, "epilogue")
    if half := x.dtype == torch.float16:  # its gradients come back in float32, see ops.py
        x, w, prob = x.float(), w.float(), None if prob is None else prob.float()
    operands = (x, w, bias, target, prob, column_weight, epilogue)
    tail = (ignore_index, want, scale, softcap, needs, max_extra_bytes)
    head = _Head(*operands, *tail)
    if head.why_not is None and head.run():
        stats, argmax, dx, dw, db = (
            head.stats,
            torch.empty(0, dtype=torch.int64, device="cpu"),
            head.dx,
            head.dw,
            head.db,
        )
    else:
        stats, argmax, dx, dw, db = chunked.linear_cross_entropy(*operands, *tail)
    return stats, argmax, dx, dw, db if half or bias is None else db.to(bias.dtype)


def _margin_head(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, epilogue: Tensor, loss: int, a: float, b: float,
    ignore_index: int, scale: float, softcap: float, needs: int, max_extra_bytes: int,
) -> _Head:  # fmt: skip
    if x.dtype == torch.float16:  # its gradients come back in float32, see ops.py
        x, w = x.float(), w.float()
    tail = (ignore_index, 0, scale, softcap, needs, max_extra_bytes)
    margin: dict[str, Any] = {"margin_loss": loss, "margin_a": a, "margin_b": b}
    return _Head(x, w, bias, target, None, None, epilogue, *tail, **margin)


def _why_not_margin_head(x: Tensor, w: Tensor, *args: Any) -> str | None:
    return _missing(x) or why_not_linear(x, w, None) or _margin_head(x, w, *args).why_not


@kernel("linear_margin_loss", "cpp", _why_not_margin_head)
def linear_margin_loss(x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, *args: Any) -> Any:
    """(stats, dx, dw, dbias) of sum_i w_i phi(d_i), gradients made in the forward; None where statistics overflow."""
    check_targets(target, w.shape[0], args[4])
    head = _margin_head(x, w, bias, target, *args)
    return (head.stats, head.dx, head.dw, head.db) if head.run() else None
