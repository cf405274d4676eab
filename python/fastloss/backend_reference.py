"""The `reference` backend: plain PyTorch, any device, any floating dtype. The row ops are in reference.py."""

from __future__ import annotations

from . import reference, reference_terms  # noqa: F401  (registers row_terms)
from .chunked import Chunked, RowKernels
from .registry import kernel

_chunked = Chunked(RowKernels(reference.row_stats, reference.row_stats_backward, reference.cross_entropy))

kernel("linear_row_stats", "reference")(_chunked.linear_row_stats)
kernel("linear_row_stats_backward", "reference")(_chunked.linear_row_stats_backward)
kernel("linear_row_stats_backward_into", "reference")(_chunked.linear_row_stats_backward_into)
kernel("linear_cross_entropy", "reference")(_chunked.linear_cross_entropy)
