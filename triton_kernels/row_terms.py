"""row_terms and row_terms_backward on logits that exist: allocation, block sizes, launches.

Signatures are those of docs/design.md, "The terms contract"; what is keyword-only here is for tests and for callers that own
the memory. Nothing here waits for the GPU, and no sum depends on the order in which programs run.
"""

import torch
import triton
from torch import Tensor

from .common import ARGMAX, on_device, row_table, unit_columns
from .row_stats import LONG_ROW, block_of, gradient_buffer, split_count
from .row_terms_gradient import row_terms_gradient_kernel
from .row_terms_kernels import (
    LISTED,
    MEAN,
    MEAN_OF_TEACHER,
    SECOND_PASS,
    SQUARES,
    SUBSET_MAX,
    TEACHER_SLOPE,
    row_terms_kernel,
)
from .row_terms_scan import NUM_PARTS, row_terms_scan_kernel
from .term_functions import LOG_COSH, SCORE_MEAN, TEACHER, TERM_SUM

#: Rows of the table that pass 2 sums over the splits of a row.
SUMS = slice(MEAN.value, SQUARES.value + 1), slice(MEAN_OF_TEACHER.value, TEACHER_SLOPE.value + 1)


def terms_block(v: int, item_size: int, want: int, splits: int) -> tuple[int, int]:
    """(columns a step, warps): a long row that has one program gets a multiprocessor, so that the rows in work fit in L2.

    8 columns a thread; 4 where more than two statistics bring their sums along.
    """
    narrow = (want & SECOND_PASS.value).bit_count() > 2
    if splits == 1 and v * item_size >= LONG_ROW:
        return (2048 if narrow else 8192 // item_size), 16
    block = min(1024 if narrow else 2048, triton.next_power_of_2(max(v, 32)))
    return block, max(1, min(8, block // (128 if narrow else 256)))


def gradient_block(v: int) -> tuple[int, int]:
    return block_of(v, True, 2048)


def complete(want: int, term: int) -> int:
    """`want` with the teacher's log-sum where something else is made of it."""
    implied = want & SCORE_MEAN.value or (want & TERM_SUM.value and term < LOG_COSH.value)
    return int(want | TEACHER.value if implied else want)


class Inputs:
    """The tensors that both kernels read, as they read them."""

    def __init__(
        self, logits: Tensor, listed: Tensor | None, teacher: Tensor | None, value: Tensor | None, subset: Tensor | None,
        temperature: Tensor | None,
    ) -> None:  # fmt: skip
        n, v = unit_columns("logits", logits).shape
        if teacher is not None:
            if teacher.dim() != 2 or teacher.shape[1] != v or teacher.shape[0] not in (1, n):
                raise ValueError(f"teacher must have shape [{n}, {v}] or [1, {v}], got {tuple(teacher.shape)}")
            unit_columns("teacher", teacher)
        if subset is not None and (subset.shape != (v,) or subset.dtype != torch.bool):
            raise ValueError(f"subset must be torch.bool of shape [{v}], got {subset.dtype} {tuple(subset.shape)}")
        if listed is not None and (listed.dim() != 2 or listed.shape[0] != n or listed.dtype != torch.int64):
            raise ValueError(f"listed must be torch.int64 of shape [{n}, K], got {listed.dtype} {tuple(listed.shape)}")
        self.k = 0 if listed is None else listed.shape[1]
        self.stride = 0 if teacher is None or teacher.shape[0] == 1 else teacher.stride(0)
        self.tensors = (
            listed.contiguous() if listed is not None and self.k else None,
            teacher,
            None if value is None else value.float().contiguous(),
            None if subset is None else subset.contiguous().view(torch.uint8),
            None if temperature is None else temperature.float().contiguous(),
        )


def row_terms(
    logits: Tensor, listed: Tensor | None, teacher: Tensor | None, value: Tensor | None, subset: Tensor | None,
    temperature: Tensor | None, ignore_index: int, want: int, scale: float, softcap: float, term: int, a: float,
    b: float, c: float, *, block: int | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """stats [17 + K, N] and argmax [N] (empty unless wanted)."""
    n, v = logits.shape
    given = Inputs(logits, listed, teacher, value, subset, temperature)
    splits = splits or triton.next_power_of_2(split_count(n, v, block or terms_block(v, 4, want, 2)[0]))
    default_block, warps = terms_block(v, logits.element_size(), want, splits)
    stats = torch.zeros(LISTED.value + given.k, n, dtype=torch.float32, device=logits.device)
    argmax = torch.full((n if want & ARGMAX.value else 0,), -1, dtype=torch.int64, device=logits.device)
    shared = dict(
        SOFTCAP=softcap != 0, WANT=complete(want, term), K=given.k, SPLITS=splits, BLOCK=block or default_block,
        num_warps=warps,
    )  # fmt: skip
    sizes = n, v, logits.stride(0), given.stride, ignore_index, float(scale), float(softcap)
    part = part_index = None
    sums = stats
    if splits > 1:
        part = torch.empty(NUM_PARTS, splits, n, dtype=torch.float32, device=logits.device)
        part_index = torch.empty(splits, n, dtype=torch.int32, device=logits.device)
        sums = torch.zeros(SUBSET_MAX.value, splits, n, dtype=torch.float32, device=logits.device)
    if n:
        with on_device(logits):
            if splits > 1:
                row_terms_scan_kernel[(n, splits)](logits, *given.tensors, part, part_index, *sizes, **shared)
            row_terms_kernel[(n, splits)](
                logits, *given.tensors, part, part_index, stats, argmax, sums, *sizes, float(a), float(b), float(c),
                TERM=int(term), K_BLOCK=triton.next_power_of_2(max(given.k, 1)), **shared,
            )  # fmt: skip
    if splits > 1 and want & SECOND_PASS.value:
        for rows in SUMS:
            stats[rows] = sums[rows].sum(1)
    return stats, argmax


def row_terms_backward(
    coef: Tensor, stats: Tensor, argmax: Tensor, logits: Tensor, listed: Tensor | None, teacher: Tensor | None,
    value: Tensor | None, subset: Tensor | None, temperature: Tensor | None, ignore_index: int, want: int,
    scale: float, softcap: float, term: int, a: float, b: float, c: float, *, out: Tensor | None = None,
    block: int | None = None,
) -> Tensor:  # fmt: skip
    """dlogits [N, V] from ten coefficients a row and one for each listed column; `out` may be the logits themselves."""
    n, v = logits.shape
    given = Inputs(logits, listed, teacher, value, subset, temperature)
    default_block, warps = gradient_block(v)
    block = block or default_block
    dlogits = gradient_buffer(logits, out)
    coef, stats = row_table(coef.float()), row_table(stats.float())
    if n and v:
        with on_device(logits):
            row_terms_gradient_kernel[(n, triton.cdiv(v, block))](
                coef, stats, argmax.contiguous(), logits, *given.tensors, dlogits, n, v, coef.stride(0), stats.stride(0),
                logits.stride(0), given.stride, dlogits.stride(0), ignore_index, float(scale), float(softcap), float(a),
                float(b), float(c), SOFTCAP=softcap != 0, WANT=int(want), TERM=int(term), K=given.k, BLOCK=block,
                num_warps=warps,
            )  # fmt: skip
    return dlogits
