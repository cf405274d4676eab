"""`hash_attention` of the `triton` backend. triton is imported when a launch is due, not with fastloss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backend_triton import _missing
from ..registry import kernel
from .contract import HashGrad
from .cpp_hash import why_not_operands, why_not_saved


def _why_not(q: Tensor, *args: Any) -> str | None:
    return _missing(q) or why_not_operands(q, *args)


def _why_not_backward(grad: Tensor, *args: Any) -> str | None:
    return _missing(grad) or why_not_saved(grad, *args)


@kernel("hash_attention", "triton", _why_not)
def hash_attention(*args: Any) -> tuple[Tensor, Tensor]:
    from ..triton_kernels import hash_attention as kernels

    return kernels.hash_attention(*args)


@kernel("hash_attention_backward", "triton", _why_not_backward)
def hash_attention_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..triton_kernels import hash_attention as kernels

    *given, needs = args
    return kernels.hash_attention_backward(*given, int(HashGrad(needs)))
