"""Up to which batch the fused product is faster than decoding: measured once per shape, then remembered."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import registry
from .contract import Codec

#: Where measuring is not possible (a CUDA graph is being captured) or not wanted (deterministic algorithms), the fused
#: product is taken up to this many rows of x: of so few, reading the weight is what costs.
STATIC_ROWS = 16
_REPEATS = 3
_winners: dict[tuple[object, ...], bool] = {}


def bucket(rows: int) -> int:
    """The batch size that stands for this one: the next power of two."""
    return 1 << max(rows - 1, 0).bit_length()


def has_kernel(x: Tensor, blob: Tensor, plan: Sequence[int], bias: Tensor | None) -> bool:
    """Whether some kernel of `lossless_linear` takes these operands; its reference decodes and multiplies."""
    operands = ("lossless_linear", x, blob, plan, bias)
    return plan[0] == Codec.P7 and registry.able(*operands) and registry.choose(*operands) != "reference"


def fused_wins(x: Tensor, blob: Tensor, plan: Sequence[int], bias: Tensor | None) -> bool:
    """Whether `lossless_linear` is the faster way to x Wᵀ + bias, x [n, columns]; measured on these operands at first."""
    if not has_kernel(x, blob, plan, bias):
        return False
    key = (str(x.device), x.dtype, *plan[2:6], torch.get_num_threads(), bucket(x.shape[0]))
    won = _winners.get(key)
    if won is None:
        if torch.are_deterministic_algorithms_enabled() or _capturing(x):
            return x.shape[0] <= STATIC_ROWS
        won = _winners[key] = _measure(x, blob, plan, bias)
    return won


def winners() -> dict[tuple[object, ...], bool]:
    """What was measured: (device, dtype, layout, numel, rows, columns, threads, batch) -> whether the fused product won."""
    return dict(_winners)


def forget() -> None:
    """Measure again from now on."""
    _winners.clear()


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _measure(x: Tensor, blob: Tensor, plan: Sequence[int], bias: Tensor | None) -> bool:
    def fused() -> Tensor:
        return torch.ops.fastloss.lossless_linear(x, blob, plan, bias)

    def decode() -> Tensor:
        weight = torch.ops.fastloss.lossless_decode(blob, plan, 0, plan[3], x.dtype)
        return F.linear(x, weight.reshape(plan[4], plan[5]), bias)

    with torch.no_grad():
        return _seconds(fused, x) < _seconds(decode, x)


def _seconds(run: Callable[[], Tensor], x: Tensor) -> float:
    """The best of a few calls after one to warm up."""
    best = float("inf")
    for k in range(_REPEATS + 1):
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        start = time.perf_counter()
        run()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        if k:
            best = min(best, time.perf_counter() - start)
    return best
