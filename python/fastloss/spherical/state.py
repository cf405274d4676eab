"""The buffers of `SphericalLinear`, kept consistent: nobody else writes them, and they are loaded all or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .factors import Factors, Gradient

NAMES = ("v", "u", "inverse", "omega", "gram", "total")
Stamp = tuple[tuple[int, int], ...]


class FactoredState(torch.nn.Module):
    """A module whose buffers are `Factors`, with the gradients that wait to be applied to them."""

    v: Tensor
    u: Tensor
    inverse: Tensor
    omega: Tensor
    gram: Tensor
    total: Tensor
    lr: float

    def __init__(self, classes: int, features: int, device: Any, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        super().__init__()
        square, vector = (features, features), (features,)
        for name, shape in zip(NAMES, ((classes, features), square, square, vector, square, vector), strict=True):
            kind = dtype if name == "v" else torch.float64
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=kind))
        self.pending: list[Gradient] = []
        self.steps = 0
        self._own_stamp = self.stamp()

    @property
    def factors(self) -> Factors:
        """The buffers as one value."""
        return Factors(self.v, self.u, self.inverse, self.omega, self.gram, self.total)

    def stamp(self) -> Stamp:
        """Changes with every write into a buffer, and when one is replaced."""
        return tuple((id(t), 0 if t.is_inference() else t._version) for t in self._buffers.values() if t is not None)

    def check_untouched(self) -> None:
        """Raise RuntimeError if anything but the layer itself has written its buffers."""
        if self.stamp() != self._own_stamp:
            raise RuntimeError(
                "the buffers of SphericalLinear were changed or replaced from outside, and no longer belong together: "
                "use reset(weight) or load_state_dict() (in DistributedDataParallel: broadcast_buffers=False)"
            )

    @contextmanager
    def change(self) -> Iterator[None]:
        """The layer writes its own buffers; what waits to be applied would be of other weights, so there must be nothing
        (`step` takes it before)."""
        self._check_nothing_pending()
        try:
            yield
        finally:
            self._own_stamp = self.stamp()

    def _check_nothing_pending(self) -> None:
        if self.pending:
            raise RuntimeError(
                f"{len(self.pending)} backward passes wait to be applied: call step() or discard() first"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredState:
        """Moves go through; a change of dtype does not, since the state needs the one it has."""
        self._check_nothing_pending()
        for name in NAMES:
            old: Tensor = getattr(self, name)
            new = fn(old)
            self._buffers[name] = new if new.dtype == old.dtype else old.to(new.device)
        self._own_stamp = self.stamp()
        return self

    def get_extra_state(self) -> dict[str, float | int]:
        """What is no tensor: the number of steps, which says when to stabilize, and the learning rate."""
        self._check_nothing_pending()
        return {"steps": self.steps, "lr": self.lr}

    def set_extra_state(self, state: Any) -> None:
        """Of a state_dict; checked before anything was loaded."""
        self.steps, self.lr = state["steps"], state["lr"]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """All buffers or none: what is derived from a V must never stand beside another."""
        self._check_nothing_pending()
        self.check_untouched()
        problems = self._why_not_load(state_dict, prefix)
        if problems:
            error_msgs.extend(f"nothing of {prefix or 'SphericalLinear'} was loaded: {problem}" for problem in problems)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._own_stamp = self.stamp()

    def _why_not_load(self, state_dict: Any, prefix: str) -> list[str]:
        keys = (*NAMES, "_extra_state")
        absent = [name for name in keys if prefix + name not in state_dict]
        if len(absent) == len(keys):
            return []  # torch reports them, or is told not to
        if absent:
            return [f"{', '.join(absent)} missing, and the other buffers mean nothing without"]
        problems = []
        for name in NAMES:
            given, own = state_dict[prefix + name], getattr(self, name)
            if given.shape != own.shape or given.dtype != own.dtype:
                problems.append(
                    f"{name} is {given.dtype} {tuple(given.shape)}, the layer's {own.dtype} {tuple(own.shape)}"
                )
        extra = state_dict[prefix + "_extra_state"]
        if not (isinstance(extra, dict) and isinstance(extra.get("steps"), int) and _is_rate(extra.get("lr"))):
            problems.append(f"_extra_state must be {{'steps': int, 'lr': float}}, got {extra!r}")
        return problems

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_own_stamp"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._own_stamp = self.stamp()  # copies are other tensors


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
