"""The `cpp` backend: hand-written CPU kernels (csrc/cpu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import kept_memory
from .compiled import _C, DTYPES, MISSING, CompiledRows, check_rows, register, why_not_linear
from .contract import NUM_EPILOGUES, NUM_STATS, Needs
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
    return None if x.device.type == "cpu" else f"runs on CPU tensors, got {x.device}"


rows = CompiledRows(_launch, lambda x: kept_memory.empty(x.shape, x.dtype))
chunked = register("cpp", rows, _missing, check_targets)


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
        needs: int, max_extra_bytes: int,
    ) -> None:  # fmt: skip
        (n, d), v = x.shape, w.shape[0]
        self.x, self.w = (t if t.stride(1) == 1 else t.contiguous() for t in (x, w))
        self.bias, self.column_weight, self.epilogue = (
            None if t is None else t.to(torch.float32).contiguous() for t in (bias, column_weight, epilogue)
        )
        self.target = None if target is None else target.contiguous()
        self.stats = torch.zeros(NUM_STATS, n)
        self.dx = kept_memory.empty((n, d) if needs & Needs.INPUT else (0,), x.dtype)
        self.dw = kept_memory.empty((v, d) if needs & Needs.WEIGHT else (0,), w.dtype)
        self.db = torch.empty(v if needs & Needs.BIAS else 0)

        def address(t: Tensor | None) -> int:
            return 0 if t is None or not t.numel() else t.data_ptr()

        self.fields = dict(
            x=address(self.x), w=address(self.w), bias=address(self.bias), target=address(self.target),
            column_weight=address(self.column_weight), epilogue=address(self.epilogue), stats=address(self.stats),
            dx=address(self.dx), dw=address(self.dw), dbias=address(self.db), n=n, d=d, v=v, ldx=self.x.stride(0),
            ldw=self.w.stride(0), ignore_index=ignore_index, max_extra_bytes=max_extra_bytes,
            dtype=DTYPES[x.dtype], want=int(want), scale=scale, softcap=softcap, isa=ISA,
        )  # fmt: skip
        self.why_not: str | None = None
        if prob is not None:
            self.why_not = "takes class ids, not probabilities"
        elif n == 0:
            self.why_not = "takes at least one row"
        else:
            self.why_not = _C.linear_cross_entropy_why_not(**self.fields)  # type: ignore[union-attr]

    def run(self) -> None:
        _C.linear_cross_entropy_cpu(**self.fields)  # type: ignore[union-attr]


@kernel("linear_row_stats", "cpp", why_not_head)
def linear_row_stats(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None, column_weight: Tensor | None,
    temperature: Tensor | None, ignore_index: int, want: int, scale: float, softcap: float, max_extra_bytes: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_targets(target, w.shape[0], ignore_index)
    tail = (ignore_index, want, scale, softcap)
    head = _Head(x, w, bias, target, prob, column_weight, None, *tail, Needs.NOTHING, max_extra_bytes)
    if head.why_not is None:
        head.run()
        return head.stats, torch.empty(0, dtype=torch.int64)
    return chunked.linear_row_stats(x, w, bias, target, prob, column_weight, temperature, *tail, max_extra_bytes)


@kernel("linear_cross_entropy", "cpp", why_not_head)
def linear_cross_entropy(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None, column_weight: Tensor | None,
    epilogue: Tensor, ignore_index: int, want: int, scale: float, softcap: float, needs: int, max_extra_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_targets(target, w.shape[0], ignore_index)
    check_rows(epilogue, NUM_EPILOGUES, "epilogue")
    args = (
        x,
        w,
        bias,
        target,
        prob,
        column_weight,
        epilogue,
        ignore_index,
        want,
        scale,
        softcap,
        needs,
        max_extra_bytes,
    )
    head = _Head(*args)
    if head.why_not is None:
        head.run()
        db = head.db if bias is None else head.db.to(bias.dtype)
        return head.stats, torch.empty(0, dtype=torch.int64), head.dx, head.dw, db
    return chunked.linear_cross_entropy(*args)
