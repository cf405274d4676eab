"""`edge_dot` and `edge_sum` of the `cpp` backend (csrc/cpu/edge_dot.cpp)."""

from __future__ import annotations

from torch import Tensor

from .. import backend_cpp
from ..compiled import _C
from ..registry import kernel
from .edge_calls import EdgeDotCall, EdgeSumCall, why_not_edges


@kernel("edge_dot", "cpp", lambda q, *args: backend_cpp._missing(q) or why_not_edges(q))
def edge_dot(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """<q_r, k_c> of each edge; IndexError where an id is out of range."""
    call = EdgeDotCall(q, k, rows, columns)
    _C.edge_dot_cpu(call.args, backend_cpp.ISA)  # type: ignore[union-attr]
    return call.dots


@kernel("edge_sum", "cpp", lambda x, *args: backend_cpp._missing(x) or why_not_edges(x))
def edge_sum(x: Tensor, weight: Tensor, pointer: Tensor, source: Tensor) -> Tensor:
    """sum over e in pointer_i..pointer_{i+1} of weight_e x_(source_e); IndexError where an id is out of range."""
    call = EdgeSumCall(x, weight, pointer, source)
    _C.edge_sum_cpu(call.args, backend_cpp.ISA)  # type: ignore[union-attr]
    return call.sums
