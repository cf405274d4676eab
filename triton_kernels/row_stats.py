"""row_stats, row_stats_backward and cross_entropy on logits that exist: allocation, block sizes, launches.

Signatures are those of docs/design.md, "The ops"; what is keyword-only here is for tests and for callers that own the memory.
Nothing here waits for the GPU, and no sum depends on the order in which programs run.
"""

import torch
import triton
from torch import Tensor

from .common import NUM_PARTS, TEMPERED, merge, new_statistics, on_device, row_table, unit_columns
from .row_stats_kernels import row_cross_entropy_kernel, row_gradient_kernel, row_stats_kernel

#: Programs that fill a GPU: about four for each multiprocessor of the largest one.
PROGRAMS = 528
#: Rows of so many bytes get a program that fills a multiprocessor alone: the rows in work then fit in L2 together.
LONG_ROW = 96 * 1024


def block_of(v: int, rich: bool, largest: int) -> tuple[int, int]:
    """(columns a step, warps): 16 columns a thread, 8 when each brings more sums along."""
    columns_a_warp = 256 if rich else 512
    block = min(largest, triton.next_power_of_2(max(v, 32)))
    return block, max(1, min(32, block // columns_a_warp))


def statistics_block(v: int, rich: bool) -> tuple[int, int]:
    return block_of(v, rich, 2048 if rich else 4096)


def gradient_block(v: int, rich: bool) -> tuple[int, int]:
    return block_of(v, rich, 2048 if rich else 4096)


def cross_entropy_block(v: int, item_size: int, rich: bool) -> tuple[int, int]:
    if v * item_size < LONG_ROW:
        return statistics_block(v, rich)
    return (8192 // item_size, 16) if rich else (16384, 32)


def split_count(n: int, v: int, block: int) -> int:
    """Splits of a row's columns: enough programs for the GPU, no split smaller than a block."""
    return max(1, min(triton.cdiv(v, block), triton.cdiv(PROGRAMS, max(n, 1))))


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def row_stats(
    logits: Tensor,
    target: Tensor | None,
    prob: Tensor | None,
    column_weight: Tensor | None,
    temperature: Tensor | None,
    ignore_index: int,
    want: int,
    scale: float,
    softcap: float,
    *,
    block: int | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """stats [8, N] and argmax [N] (empty unless wanted)."""
    n, v = unit_columns("logits", logits).shape
    rich = want != 0 or prob is not None
    default_block, warps = statistics_block(v, rich)
    block = block or default_block
    splits = splits or split_count(n, v, block)
    stats, argmax = new_statistics(logits, n, want)
    part = torch.empty(NUM_PARTS, splits, n, dtype=torch.float32, device=logits.device)
    part_index = torch.empty(splits, n, dtype=torch.int32, device=logits.device)
    target, temperature = _contiguous(target), _contiguous(temperature)
    if n:
        with on_device(logits):
            row_stats_kernel[(n, splits)](
                logits, target, prob, _contiguous(column_weight), temperature, part, part_index, n, v, splits,
                logits.stride(0), prob_stride(prob), ignore_index, scale, softcap, SOFTCAP=softcap != 0, WANT=int(want),
                BLOCK=block, num_warps=warps,
            )  # fmt: skip
            merge(part, part_index, target, temperature, stats, argmax, v, ignore_index, prob is not None, int(want))
    return stats, argmax


def row_stats_backward(
    coef: Tensor,
    stats: Tensor,
    argmax: Tensor,
    logits: Tensor,
    target: Tensor | None,
    prob: Tensor | None,
    column_weight: Tensor | None,
    temperature: Tensor | None,
    ignore_index: int,
    want: int,
    scale: float,
    softcap: float,
    *,
    out: Tensor | None = None,
    upstream: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """dlogits [N, V]; `out` may be the logits themselves.

    upstream: one float32 on the device; where it is 1, `out` holds the gradient already and nothing is done.
    """
    n, v = unit_columns("logits", logits).shape
    default_block, warps = gradient_block(v, want != 0 or prob is not None)
    block = block or default_block
    dlogits = gradient_buffer(logits, out)
    coef, stats = row_table(coef), row_table(stats)
    if n and v:
        with on_device(logits):
            row_gradient_kernel[(n, triton.cdiv(v, block))](
                coef, stats, argmax.contiguous(), logits, _contiguous(target), prob, _contiguous(column_weight),
                _contiguous(temperature), dlogits, upstream, n, v, coef.stride(0), stats.stride(0), logits.stride(0),
                prob_stride(prob), dlogits.stride(0), ignore_index, scale, softcap, SOFTCAP=softcap != 0,
                WANT=int(want), BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return dlogits


def cross_entropy(
    logits: Tensor,
    target: Tensor | None,
    prob: Tensor | None,
    column_weight: Tensor | None,
    epilogue: Tensor,
    ignore_index: int,
    want: int,
    scale: float,
    softcap: float,
    *,
    out: Tensor | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """stats, argmax and dlogits of the loss that `epilogue` [4, N] describes; `out` may be the logits themselves."""
    n, v = unit_columns("logits", logits).shape
    default_block, warps = cross_entropy_block(v, logits.element_size(), want != 0 or prob is not None)
    block = block or default_block
    want = int(want) & ~TEMPERED.value  # this op has no temperature
    stats, argmax = new_statistics(logits, n, want)
    dlogits = gradient_buffer(logits, out)
    epilogue = row_table(epilogue)
    if n:
        with on_device(logits):
            row_cross_entropy_kernel[(n,)](
                logits, _contiguous(target), prob, _contiguous(column_weight), epilogue, stats, argmax, dlogits, n, v,
                epilogue.stride(0), logits.stride(0), prob_stride(prob), dlogits.stride(0), ignore_index, scale, softcap,
                SOFTCAP=softcap != 0, WANT=want, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return stats, argmax, dlogits


def prob_stride(prob: Tensor | None) -> int:
    return 0 if prob is None else unit_columns("prob", prob).stride(0)


def gradient_buffer(logits: Tensor, out: Tensor | None) -> Tensor:
    """`out`, checked, or new memory for the gradient of the logits."""
    if out is None:
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if out.shape != logits.shape or out.dtype != logits.dtype:
        raise ValueError(
            f"out must be {tuple(logits.shape)} {logits.dtype} like the logits, got {tuple(out.shape)} {out.dtype}"
        )
    return unit_columns("out", out)
