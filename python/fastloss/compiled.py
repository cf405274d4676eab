"""Glue shared by the backends of the compiled extension `_C`: what its row kernels take, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .chunked import Chunked, RowKernels
from .contract import NUM_COEFS, NUM_EPILOGUES, NUM_STATS, Want
from .extension import _C as _C
from .extension import MISSING as MISSING
from .registry import kernel

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
STATS, GRADIENT, BOTH = 0, 1, 2


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def why_not_rows(logits: Tensor, prob: Tensor | None) -> str | None:
    """Why a compiled row kernel cannot take these logits, or None."""
    if logits.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16 logits, got {logits.dtype}"
    if logits.shape[1] == 0:
        return "takes at least one column"
    if logits.stride(1) != 1 and logits.shape[1] != 1:
        return f"takes logits whose last dimension is contiguous, got strides {tuple(logits.stride())}"
    if prob is not None and prob.dtype not in (logits.dtype, torch.float32):
        return f"takes target probabilities in {logits.dtype} or torch.float32, got {prob.dtype}"
    return None


def why_not_linear(x: Tensor, w: Tensor, prob: Tensor | None) -> str | None:
    """Why chunks of library GEMMs around a row kernel cannot take this head, or None."""
    if x.dtype not in DTYPES or w.dtype != x.dtype:
        return f"takes float32, float16 or bfloat16, the same for input and weight; got {x.dtype} and {w.dtype}"
    if w.shape[0] == 0 or x.shape[1] == 0:
        return "takes at least one class and one feature"
    if prob is not None and prob.dtype not in (x.dtype, torch.float32):
        return f"takes target probabilities in {x.dtype} or torch.float32, got {prob.dtype}"
    return None


class CompiledRows:
    """The three row ops on one launcher of `_C`. `launch` gets the fields of csrc/fastloss.h's RowStats by name."""

    def __init__(self, launch: Callable[..., None], empty_like: Callable[[Tensor], Tensor]) -> None:
        self.launch, self.empty_like = launch, empty_like

    def _call(
        self, mode: int, logits: Tensor, target: Tensor | None, prob: Tensor | None, column_weight: Tensor | None,
        temperature: Tensor | None, ignore_index: int, want: int, scale: float, softcap: float,
        *, row: Tensor | None, stats: Tensor, argmax: Tensor, dlogits: Tensor | None, **more: Any,
    ) -> None:  # fmt: skip
        n, v = logits.shape
        if want & Want.TEMPERED and temperature is None:
            raise ValueError("Want.TEMPERED needs `temperature`, one number > 0 a row; got None")
        f32 = torch.float32
        target = None if target is None else target.contiguous()
        if prob is not None and prob.stride(1) != 1:
            prob = prob.contiguous()
        column_weight = None if column_weight is None else column_weight.to(f32).contiguous()
        temperature = None if temperature is None else temperature.to(f32).contiguous()
        row = None if row is None else row.to(f32).contiguous()
        self.launch(
            logits, mode=mode, logits=pointer(logits), target=pointer(target), prob=pointer(prob),
            column_weight=pointer(column_weight), temperature=pointer(temperature), row=pointer(row),
            stats=pointer(stats), argmax=pointer(argmax), dlogits=pointer(dlogits), n=n, v=v, ld=logits.stride(0),
            ld_prob=0 if prob is None else prob.stride(0), ld_out=0 if dlogits is None else dlogits.stride(0),
            ignore_index=ignore_index, dtype=DTYPES[logits.dtype],
            prob_dtype=0 if prob is None else DTYPES[prob.dtype], want=int(want), scale=scale, softcap=softcap, **more,
        )  # fmt: skip

    @staticmethod
    def _tables(logits: Tensor, want: int) -> tuple[Tensor, Tensor]:
        n = logits.shape[0]
        stats = torch.empty(NUM_STATS, n, dtype=torch.float32, device=logits.device)
        return stats, torch.empty(n if want & Want.ARGMAX else 0, dtype=torch.int64, device=logits.device)

    def row_stats(self, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        stats, argmax = self._tables(logits, args[5])
        self._call(STATS, logits, *args, row=None, stats=stats, argmax=argmax, dlogits=None)
        return stats, argmax

    def row_stats_backward(
        self, coef: Tensor, stats: Tensor, argmax: Tensor, logits: Tensor, *args: Any, out: Tensor | None = None,
        **more: int,
    ) -> Tensor:  # fmt: skip
        out = self.empty_like(logits) if out is None else out
        check_rows(coef, NUM_COEFS, "coef")
        stats = stats.to(torch.float32).contiguous()
        self._call(GRADIENT, logits, *args, row=coef, stats=stats, argmax=argmax, dlogits=out, **more)  # type: ignore[arg-type]
        return out

    def cross_entropy(
        self, logits: Tensor, target: Tensor | None, prob: Tensor | None, column_weight: Tensor | None,
        epilogue: Tensor, *args: Any, out: Tensor | None = None, **more: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        out = self.empty_like(logits) if out is None else out
        stats, argmax = self._tables(logits, args[1])
        check_rows(epilogue, NUM_EPILOGUES, "epilogue")
        given = (target, prob, column_weight, None, *args)
        self._call(BOTH, logits, *given, row=epilogue, stats=stats, argmax=argmax, dlogits=out, **more)
        return stats, argmax, out

    def margin_loss(
        self, logits: Tensor, target: Tensor, epilogue: Tensor, loss: int, a: float, b: float, *tail: Any
    ) -> tuple[Tensor, Tensor]:
        """(stats, dlogits) of sum_i w_i phi(d_i), w the epilogue's nll; phi by its number in csrc/margin_loss.h."""
        margin: dict[str, Any] = {"margin_loss": loss, "margin_a": a, "margin_b": b}
        ignore_index, scale, softcap = tail
        given = (target, None, None, epilogue, ignore_index, Want.NOTHING, scale, softcap)
        stats, _, dlogits = self.cross_entropy(logits, *given, **margin)
        return stats, dlogits

    def row_stats_backward_in_place(
        self, coef: Tensor, stats: Tensor, argmax: Tensor, logits: Tensor, *a: Any
    ) -> Tensor:
        return self.row_stats_backward(coef, stats, argmax, logits, *a, out=logits)

    def cross_entropy_in_place(self, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.cross_entropy(logits, *args, out=logits)


def check_rows(t: Tensor, rows: int, name: str) -> None:
    """Kernels index these tables by row: a wrong shape would be read out of bounds."""
    if t.dim() != 2 or t.shape[0] != rows:
        raise ValueError(f"{name} must have shape [{rows}, N], got {tuple(t.shape)}")


def register(
    backend: str, rows: CompiledRows, missing: Callable[[Tensor], str | None], check: Callable[..., None]
) -> Chunked:
    """Register the row ops of `rows`, and the linear ops in chunks around them, as `backend`.

    missing(x): why nothing of this backend can run on x, or None. check(target, classes, ignore_index): raises for bad
    class ids where that costs no synchronisation.
    """
    chunked = Chunked(RowKernels(rows.row_stats, rows.row_stats_backward_in_place, rows.cross_entropy_in_place))

    def for_rows(logits: Tensor, target: Tensor | None, prob: Tensor | None, *_: Any) -> str | None:
        return missing(logits) or why_not_rows(logits, prob)

    def for_linear(
        x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None, *_: Any
    ) -> str | None:
        return missing(x) or why_not_linear(x, w, prob)

    def checked(
        function: Callable[..., Any], classes: Callable[..., int], target: int, ignore_index: int
    ) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            check(args[target], classes(*args), args[ignore_index])
            return function(*args)

        return call

    row_classes, head_classes = (lambda logits, *_: logits.shape[1]), (lambda x, w, *_: w.shape[0])
    kernel("row_stats", backend, for_rows)(checked(rows.row_stats, row_classes, 1, 5))
    kernel("row_stats_backward", backend, lambda coef, stats, argmax, *a: for_rows(*a))(rows.row_stats_backward)
    kernel("margin_loss", backend, lambda logits, *_: for_rows(logits, None, None))(
        checked(rows.margin_loss, row_classes, 1, 6)
    )
    kernel("cross_entropy", backend, for_rows)(checked(rows.cross_entropy, row_classes, 1, 5))
    kernel("linear_row_stats", backend, for_linear)(checked(chunked.linear_row_stats, head_classes, 3, 7))
    kernel("linear_row_stats_backward", backend, lambda coef, stats, argmax, *a: for_linear(*a))(
        chunked.linear_row_stats_backward
    )
    kernel("linear_row_stats_backward_into", backend, lambda coef, stats, argmax, grad_weight, *a: for_linear(*a))(
        chunked.linear_row_stats_backward_into
    )
    kernel("linear_cross_entropy", backend, for_linear)(checked(chunked.linear_cross_entropy, head_classes, 3, 7))
    return chunked
