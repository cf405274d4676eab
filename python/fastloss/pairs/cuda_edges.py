"""`edge_dot` and `edge_sum` of the `cuda` backend (csrc/cuda/edge_dot.cu). An id out of range gives NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend_cuda
from ..compiled import _C
from ..registry import kernel
from .edge_calls import EdgeDotCall, EdgeSumCall, why_not_edges


def _place(x: Tensor) -> tuple[int, int]:
    device = x.device.index
    return device, torch._C._cuda_getCurrentRawStream(device)


@kernel("edge_dot", "cuda", lambda q, *args: backend_cuda._missing(q) or why_not_edges(q))
def edge_dot(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """<q_r, k_c> of each edge."""
    call = EdgeDotCall(q, k, rows, columns)
    _C.edge_dot_cuda(call.args, *_place(q))  # type: ignore[union-attr]
    return call.dots


@kernel("edge_sum", "cuda", lambda x, *args: backend_cuda._missing(x) or why_not_edges(x))
def edge_sum(x: Tensor, weight: Tensor, pointer: Tensor, source: Tensor) -> Tensor:
    """sum over e in pointer_i..pointer_{i+1} of weight_e x_(source_e)."""
    call = EdgeSumCall(x, weight, pointer, source)
    _C.edge_sum_cuda(call.args, *_place(x))  # type: ignore[union-attr]
    return call.sums
