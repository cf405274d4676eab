"""`row_terms` and its backward on a launcher of the compiled extension: what they take, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compiled import BOTH, DTYPES, GRADIENT, STATS, check_rows, pointer
from .contract import Term, TermCoef, TermStat, Want
from .reference_terms import RAW
from .registry import kernel

#: Flags that read a teacher's scores or generated probabilities.
READS_TEACHER = Want.TEACHER | Want.TEACHER_MEAN | Want.SCORE_MEAN | Want.TERM


def why_not_terms(logits: Tensor, teacher: Tensor | None) -> str | None:
    """Why a compiled kernel cannot take these logits and this teacher, or None."""
    if logits.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16 logits, got {logits.dtype}"
    if teacher is not None and teacher.dtype not in DTYPES:
        return f"takes a float32, float16 or bfloat16 teacher, got {teacher.dtype}"
    if logits.shape[1] == 0:
        return "takes at least one column"
    for name, scores in (("logits", logits), ("a teacher", teacher)):
        if scores is not None and scores.stride(1) != 1 and scores.shape[1] != 1:
            return f"takes {name} whose last dimension is contiguous, got strides {tuple(scores.stride())}"
    return None


def _check_shape(name: str, t: Tensor | None, *accepted: tuple[int, ...]) -> None:
    """Kernels index these by row and column: a wrong shape would be read out of bounds."""
    if t is not None and tuple(t.shape) not in accepted:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, accepted))}, got {tuple(t.shape)}")


def _check(
    logits: Tensor, listed: Tensor | None, teacher: Tensor | None, value: Tensor | None, subset: Tensor | None,
    temperature: Tensor | None, want: int, term: int,
) -> None:  # fmt: skip
    n, v = logits.shape
    if listed is not None and (listed.dim() != 2 or listed.shape[0] != n):
        raise ValueError(f"listed must have shape ({n}, K), got {tuple(listed.shape)}")
    _check_shape("teacher", teacher, (n, v), (1, v))
    _check_shape("value", value, (n,))
    _check_shape("subset", subset, (v,))
    _check_shape("temperature", temperature, (n,))
    if want & READS_TEACHER and teacher is None and value is None:
        raise ValueError(f"{Want(want & READS_TEACHER)!r} needs `teacher` or `value`; got neither")
    if want & Want.TERM and term in RAW and teacher is None:
        raise ValueError(f"{Term(term).name} needs the scores of a `teacher`, got None")
    if want & Want.TERM and term not in list(Term)[1:]:
        raise ValueError(f"unknown term {term}: one of {', '.join(f'{x.value} {x.name}' for x in list(Term)[1:])}")
    if want & Want.SUBSET and subset is None:
        raise ValueError("Want.SUBSET needs `subset`, one bool a column; got None")


class CompiledTerms:
    """`row_terms` and its backward on one launcher of `_C`, which gets the fields of csrc/row_terms.h by name."""

    def __init__(self, launch: Callable[..., None], empty_like: Callable[[Tensor], Tensor]) -> None:
        self.launch, self.empty_like = launch, empty_like

    def _call(
        self, mode: int, logits: Tensor, listed: Tensor | None, teacher: Tensor | None, value: Tensor | None,
        subset: Tensor | None, temperature: Tensor | None, ignore_index: int, want: int, scale: float, softcap: float,
        term: int, a: float, b: float, c: float, *, coef: Tensor | None, stats: Tensor, argmax: Tensor,
        dlogits: Tensor | None, **shares: float,
    ) -> None:  # fmt: skip
        _check(logits, listed, teacher, value, subset, temperature, want, term)
        (n, v), f32 = logits.shape, torch.float32
        listed = None if listed is None else listed.to(torch.int64).contiguous()
        subset = None if subset is None else subset.to(torch.bool).contiguous()
        value, temperature, coef = (
            None if t is None else t.to(f32).contiguous() for t in (value, temperature, coef)
        )  # fmt: skip
        shared = teacher is None or teacher.shape[0] == 1
        self.launch(
            logits, logits=pointer(logits), listed=pointer(listed), teacher=pointer(teacher), value=pointer(value),
            subset=pointer(subset), temperature=pointer(temperature), coef=pointer(coef), stats=pointer(stats),
            argmax=pointer(argmax), dlogits=pointer(dlogits), n=n, v=v, k=0 if listed is None else listed.shape[1],
            ld=logits.stride(0), ld_teacher=0 if teacher is None or shared else teacher.stride(0),
            ld_out=0 if dlogits is None else dlogits.stride(0), ignore_index=ignore_index, dtype=DTYPES[logits.dtype],
            teacher_dtype=0 if teacher is None else DTYPES[teacher.dtype], mode=mode, want=int(want), term=int(term),
            scale=scale, softcap=softcap, a=a, b=b, c=c, **shares,
        )  # fmt: skip

    def row_terms(self, logits: Tensor, listed: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        n, k, want = logits.shape[0], 0 if listed is None else listed.shape[-1], args[5]
        stats = torch.empty(TermStat.LISTED + k, n, dtype=torch.float32, device=logits.device)
        argmax = torch.empty(n if want & Want.ARGMAX else 0, dtype=torch.int64, device=logits.device)
        self._call(STATS, logits, listed, *args, coef=None, stats=stats, argmax=argmax, dlogits=None)
        return stats, argmax

    def row_terms_backward(
        self, coef: Tensor, stats: Tensor, argmax: Tensor, logits: Tensor, listed: Tensor | None, *args: Any,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        k = 0 if listed is None else listed.shape[-1]
        check_rows(coef, TermCoef.LISTED + k, "coef")
        check_rows(stats, TermStat.LISTED + k, "stats")
        _check_shape("coef", coef, (coef.shape[0], logits.shape[0]))
        _check_shape("stats", stats, (stats.shape[0], logits.shape[0]))
        if args[5] & Want.ARGMAX:
            _check_shape("argmax", argmax, (logits.shape[0],))
        out = self.empty_like(logits) if out is None else out
        stats = stats.to(torch.float32).contiguous()
        self._call(GRADIENT, logits, listed, *args, coef=coef, stats=stats, argmax=argmax.contiguous(), dlogits=out)
        return out

    def row_terms_backward_in_place(
        self, coef: Tensor, stats: Tensor, argmax: Tensor, logits: Tensor, *a: Any
    ) -> Tensor:
        """The gradient over the logits themselves."""
        return self.row_terms_backward(coef, stats, argmax, logits, *a, out=logits)

    def row_terms_both_in_place(
        self, logits: Tensor, listed: Tensor | None, *args: Any, nll_share: float, term_share: float
    ) -> Tensor:
        """Statistics; over the logits, the gradient of the sum over rows of nll_share (-log p_y) + term_share term.

        y is the row's only listed column. The maxima of `stats` may be any score of the row that is near its largest,
        with the log sums relative to it; at a temperature, with nll_share 0, the log sum of the rest may be missing.
        """
        k, want = 0 if listed is None else listed.shape[-1], args[5]
        if nll_share and k != 1:
            raise ValueError(f"nll_share needs one listed column a row, the target; got {k}")
        stats = torch.empty(TermStat.LISTED + k, logits.shape[0], dtype=torch.float32, device=logits.device)
        argmax = torch.empty(logits.shape[0] if want & Want.ARGMAX else 0, dtype=torch.int64, device=logits.device)
        self._call(
            BOTH, logits, listed, *args, coef=None, stats=stats, argmax=argmax, dlogits=logits, nll_share=nll_share,
            term_share=term_share,
        )  # fmt: skip
        return stats


def register_terms(
    backend: str, terms: CompiledTerms, missing: Callable[[Tensor], str | None],
    check: Callable[[Tensor | None, int, int], None], most_listed: int | None = None, both: bool = False,
) -> None:  # fmt: skip
    """Register `row_terms` and its backward as `backend`, for up to `most_listed` listed columns a row.

    missing(x): why nothing of this backend can run on x, or None. check(listed, columns, ignore_index): raises for ids
    beyond the columns where that costs no synchronisation. both: the launcher knows the mode BOTH.
    """

    def why_not(
        logits: Tensor, listed: Tensor | None = None, teacher: Tensor | None = None, *_: Any
    ) -> str | None:  # fmt: skip
        if most_listed is not None and listed is not None and listed.shape[-1] > most_listed:
            return f"takes at most {most_listed} listed columns a row, got {listed.shape[-1]}"
        return missing(logits) or why_not_terms(logits, teacher)

    def row_terms(logits: Tensor, listed: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        check(listed, logits.shape[1], args[4])
        return terms.row_terms(logits, listed, *args)

    kernel("row_terms", backend, why_not)(row_terms)
    for op, function in (
        ("row_terms_backward", terms.row_terms_backward),
        ("row_terms_backward_", terms.row_terms_backward_in_place),  # no op of torch: linear_terms.py asks for it
    ):
        kernel(op, backend, lambda coef, stats, argmax, *a: why_not(*a))(function)
    if not both:
        return

    def row_terms_both(logits: Tensor, listed: Tensor | None, *args: Any) -> Tensor:
        *operands, nll_share, term_share = args
        check(listed, logits.shape[1], operands[4])
        return terms.row_terms_both_in_place(logits, listed, *operands, nll_share=nll_share, term_share=term_share)

    kernel("row_terms_both_", backend, why_not)(row_terms_both)  # no op of torch, either
