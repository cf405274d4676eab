"""The bytes that a graph holds for its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloss.quant import saved_activation
from fastloss.quant.saved_activation import is_parameter


def saved_by(hooks: saved_activation | None, run: Callable[[], Any]) -> tuple[Any, int]:
    """run() and the bytes of distinct memory that its graph holds besides parameters."""
    memory: dict[int, int] = {}
    alive = []

    def count(*tensors: Tensor) -> None:
        for t in tensors:
            alive.append(t)
            memory[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()

    def pack(t: Tensor) -> Any:
        packed = t if hooks is None else hooks.pack(t)
        if not isinstance(packed, Tensor):
            count(*packed.packed.encoded[:3])
        elif not is_parameter(t):
            count(t)
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, (lambda t: t) if hooks is None else hooks.unpack):
        result = run()
    return result, sum(memory.values())
