"""What the user said about teachers, listed columns and subsets -> the operands of `row_terms`, checked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import functorch_active
from .autograd_terms import TermOperands, TermOptions
from .contract import Want
from .terms import HLGauss, RowTerm, TeacherHead
from .wide_statistics import WideRowStats

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NEED_TEACHER = Want.TEACHER | Want.TEACHER_MEAN | Want.SCORE_MEAN | Want.TERM


class Wide(NamedTuple):
    """The arguments of `row_stats` that only `row_terms` serves."""

    listed: Tensor | None = None
    teacher: Tensor | TeacherHead | None = None
    term: RowTerm | None = None
    subset: Tensor | None = None
    generated: HLGauss | None = None

    @property
    def given(self) -> bool:
        """Whether any of them was given."""
        return any(x is not None for x in self)

    def simplify(self, want: Want, temperature: float | Tensor | None) -> tuple[Want, float | Tensor | None]:
        """`row_terms` makes the LSE at the temperature in any case, and needs none that is 1."""
        plain = not isinstance(temperature, Tensor) and temperature == 1
        if not self.given:
            return want, None if plain and not want & Want.TEMPERED else temperature
        return want & ~Want.TEMPERED, None if plain else temperature


class Asked(NamedTuple):
    """One call of `row_terms`: its operands and options, rows flattened."""

    operands: TermOperands
    options: TermOptions
    vocab: int
    shape: torch.Size
    target: Tensor | None
    head: TeacherHead | None

    def pack(self, stats: Tensor, top: Tensor, argmax: Tensor) -> WideRowStats:
        """The statistics under their names."""
        listed = self.operands.listed
        if listed is None:
            listed = torch.empty(stats.shape[1], 0, dtype=torch.int64, device=stats.device)
        o = self.options
        want = Want(o.want)
        if want & Want.TEMPERED:
            want &= ~(Want.ENTROPY | Want.TEMPERED)
        return WideRowStats(
            stats, top, argmax, self.target, False, self.vocab, want, self.operands.temperature, None, o.ignore_index,
            self.shape, listed,
        )  # fmt: skip


def ask(
    wide: Wide, target: Tensor | None, temperature: Tensor | None, want: Want, like: Tensor, vocab: int,
    shape: torch.Size, ignore_index: int, scale: float, softcap: float,
) -> Asked:  # fmt: skip
    """Check shapes, dtypes and devices; `target` and `temperature` are flat already."""
    rows = shape.numel()
    listed = _listed(wide.listed, _checked(target, vocab, ignore_index), rows, shape, like)
    teacher, head = _teacher(wide.teacher, rows, vocab, shape, like)
    value, numbers, kind = None, (0.0, 0.0, 0.0), 0
    if wide.generated is not None:
        if teacher is not None or head is not None or wide.term is not None:
            raise ValueError("generated targets take the place of a teacher: no teacher and no term beside them")
        numbers, value = wide.generated.numbers(vocab), _values(wide.generated.values, rows, shape, like)
    if wide.term is not None:
        if not isinstance(wide.term, RowTerm):
            raise TypeError(f"term must be one of fastloss.terms (kl(), jensen_shannon(), ...), got {wide.term!r}")
        want |= Want.TERM
        kind, numbers = int(wide.term.kind), (wide.term.a, wide.term.b, wide.term.c)
    if wide.subset is not None:
        want |= Want.SUBSET
    if want & _NEED_TEACHER and teacher is None and head is None and value is None:
        raise ValueError("this statistic needs a teacher: pass `teacher` (or `generated` for score_mean)")
    if value is not None and want & (Want.TEACHER_MEAN | Want.TEACHER):
        raise ValueError('generated targets serve the statistic "score_mean" only')
    operands = TermOperands(listed, teacher, value, _subset(wide.subset, vocab, like), temperature)
    o = TermOptions(ignore_index, int(want), scale, softcap, kind, *numbers)
    return Asked(operands, o, vocab, shape, target, head)


def _same_device(t: Tensor, like: Tensor, name: str) -> None:
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, the scores on {like.device}")


def _checked(target: Tensor | None, vocab: int, ignore_index: int) -> Tensor | None:
    """The target, in whose place no column may be absent: a negative id that is not ignore_index is out of range."""
    if target is None:
        return None
    wrong = (target < 0) & (target != ignore_index)
    if target.is_cpu and not torch.compiler.is_compiling() and not functorch_active() and bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"target {int(target[row])} at row {row} is out of bounds: "
            f"classes are 0..{vocab - 1}, or ignore_index {ignore_index}"
        )
    return torch.where(wrong, vocab, target)


def _listed(listed: Tensor | None, target: Tensor | None, rows: int, shape: torch.Size, like: Tensor) -> Tensor | None:
    if listed is None:
        return None if target is None else target[:, None]
    if listed.dtype not in _INTEGERS:
        raise TypeError(f"listed must hold class ids (an integer dtype), got {listed.dtype}")
    if listed.shape[:-1] != shape or listed.dim() != len(shape) + 1:
        raise ValueError(f"listed must have shape {(*shape, 'K')}, got {tuple(listed.shape)}")
    _same_device(listed, like, "listed")
    ids = listed.to(torch.int64).reshape(rows, listed.shape[-1])
    return ids if target is None else torch.cat((target[:, None], ids), 1)


def _teacher(
    teacher: Any, rows: int, vocab: int, shape: torch.Size, like: Tensor
) -> tuple[Tensor | None, TeacherHead | None]:
    if teacher is None:
        return None, None
    if isinstance(teacher, TeacherHead):
        return None, _check_teacher_head(teacher, rows, vocab, shape, like)
    if not isinstance(teacher, Tensor) or not teacher.is_floating_point():
        raise TypeError(f"teacher must be floating logits [..., V] or a TeacherHead, got {type(teacher).__name__}")
    _same_device(teacher, like, "teacher")
    if teacher.shape == (vocab,):
        return teacher[None], None
    if teacher.shape != (*shape, vocab):
        raise ValueError(f"teacher must have shape {(*shape, vocab)} or ({vocab},), got {tuple(teacher.shape)}")
    return teacher.reshape(rows, vocab), None


def _check_teacher_head(t: TeacherHead, rows: int, vocab: int, shape: torch.Size, like: Tensor) -> TeacherHead:
    if t.weight.dim() != 2 or t.weight.shape[0] != vocab or t.input.shape != (*shape, t.weight.shape[1]):
        raise ValueError(
            f"the teacher's input must be {(*shape, 'D')} and its weight ({vocab}, D), "
            f"got {tuple(t.input.shape)} and {tuple(t.weight.shape)}"
        )
    if t.input.dtype != t.weight.dtype or not t.input.is_floating_point():
        raise TypeError(f"the teacher's input and weight must have one dtype, got {t.input.dtype} and {t.weight.dtype}")
    if t.bias is not None and t.bias.shape != (vocab,):
        raise ValueError(f"the teacher's bias must have shape ({vocab},), got {tuple(t.bias.shape)}")
    if t.softcap is not None and not t.softcap > 0:
        raise ValueError(f"the teacher's softcap must be > 0 or None, got {t.softcap}")
    for tensor in (t.input, t.weight, t.bias):
        if tensor is not None:
            _same_device(tensor, like, "the teacher's head")
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError("the gradient of a teacher's head is not computed: detach its input and weight")
    return t._replace(input=t.input.reshape(rows, t.input.shape[-1]))


def _values(values: Tensor, rows: int, shape: torch.Size, like: Tensor) -> Tensor:
    if values.shape != shape:
        raise ValueError(f"the values of generated targets must have shape {tuple(shape)}, got {tuple(values.shape)}")
    if values.requires_grad:
        raise ValueError("the gradient with respect to the values is not computed: pass values.detach()")
    _same_device(values, like, "values")
    return values.to(torch.promote_types(like.dtype, torch.float32)).reshape(rows)


def _subset(subset: Tensor | None, vocab: int, like: Tensor) -> Tensor | None:
    if subset is None:
        return None
    if subset.dtype != torch.bool or subset.shape != (vocab,):
        raise ValueError(f"subset must be a bool mask of shape ({vocab},), got {subset.dtype} {tuple(subset.shape)}")
    _same_device(subset, like, "subset")
    return subset
