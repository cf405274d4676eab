"""The glue of the lossless ops of the `triton` backend. triton is imported when a launch is due, not with fastloss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..backend_triton import _missing
from ..registry import kernel
from .contract import BLOCK, PLAN_HEAD, Layout, Section
from .crc32c_table import advance
from .tiles import from_tiles

_ALL = 0xFFFFFFFF


def _why_not(blob: Tensor, *_: Any) -> str | None:
    return _missing(blob)


@kernel("lossless_decode", "triton", _why_not)
def lossless_decode(blob: Tensor, plan: Sequence[int], first: int, count: int, dtype: torch.dtype) -> Tensor:
    from ..triton_kernels import lossless_decode as kernels
    from ..triton_kernels.lossless_numbers import read_plan

    return kernels.lossless_decode(read_plan(blob, plan), first, count, dtype)


@kernel("lossless_rows", "triton", _why_not)
def lossless_rows(blob: Tensor, plan: Sequence[int], index: Tensor, dtype: torch.dtype) -> Tensor:
    """On a GPU nobody may look at `index`: a row that there is not comes out as NaN (all bits 1)."""
    from ..triton_kernels import lossless_rows as kernels
    from ..triton_kernels.lossless_numbers import read_plan

    rows = plan[4]
    if not index.is_cuda and (bad := (index < 0) | (index >= rows)).any():
        raise IndexError(f"row {int(index[bad][0])} is out of bounds: rows are 0..{rows - 1}")
    return kernels.lossless_rows(read_plan(blob, plan), index, dtype)
