"""What goes to PyTorch, and how its errors come back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def explained(torch_function: Callable[[], Tensor], name: str, **tensors: Tensor | None) -> Tensor:
    """PyTorch's own result; when it raises, the same exception type with what was given in the message."""
    try:
        return torch_function()
    except (ValueError, RuntimeError, IndexError, TypeError, NotImplementedError) as error:
        if torch.compiler.is_compiling():
            raise
        given = "; ".join(
            f"{key}: {tuple(t.shape)} {t.dtype} on {t.device}" for key, t in tensors.items() if isinstance(t, Tensor)
        )
        try:
            better = type(error)(f"fastloss.{name}: {error} (got {given})")
        except TypeError:  # an exception class with a constructor of its own
            raise error from None
        raise better from None
