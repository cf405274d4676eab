"""Memory of large CPU gradients is kept for the next step: fresh memory costs several times what the kernels do.

A gradient of the logits or of a vocabulary head is hundreds of megabytes, freed and made again in every training step, and
the operating system hands out fresh memory page by page, zeroed. Blocks of 4 MiB and more go to a small store when their
tensor dies; the system may still take their pages whenever it needs them (MADV_FREE), so that they are never missed elsewhere.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from .extension import _C

LARGE = 4 << 20  # kLargeBlock of csrc/cpu/kept_memory.h


def keep_memory(max_bytes: int) -> int:
    """Keep at most `max_bytes` of freed gradients for later ones (default 1 GiB; FASTLOSS_KEEP_BYTES); 0 keeps none.

    Returns the bytes that are kept now. Raises ValueError for a negative number.
    """
    if max_bytes < 0:
        raise ValueError(f"max_bytes must be >= 0, got {max_bytes}")
    return _C.keep_memory(int(max_bytes)) if _C is not None else 0


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """torch.empty on the CPU, of kept memory where it is large."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < LARGE or _C is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    storage = torch.frombuffer(_C.Memory(size), dtype=torch.uint8).untyped_storage()
    strides = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, tuple(shape), strides)  # type: ignore[call-overload]


def empty_beside(x: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """torch.empty on the device of x, of kept memory where that is the CPU."""
    return empty(shape, dtype) if type(x) is Tensor and x.device.type == "cpu" else x.new_empty(shape, dtype=dtype)


if "FASTLOSS_KEEP_BYTES" in os.environ:
    keep_memory(int(os.environ["FASTLOSS_KEEP_BYTES"]))
