"""Glue between the pointwise ops and a compiled kernel of `_C`: what it takes, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compiled import DTYPES
from .registry import kernel

Operand = tuple[int, int, int]  # csrc/fastloss.h's Elements: address, dtype, period
ABSENT: Operand = (0, 0, 1)


def why_not_pointwise(
    input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None, *_: Any
) -> str | None:
    """Why a compiled or Triton pointwise kernel cannot take these tensors, or None."""
    for name, t in (("input", input), ("labels", labels), ("weight", weight), ("pos_weight", pos_weight)):
        if t is None:
            continue
        if t.dtype not in DTYPES:
            return f"takes float32, float16 and bfloat16, got {name} in {t.dtype}"
        if not t.is_contiguous():
            return f"takes contiguous tensors, got {name} with strides {tuple(t.stride())}"
    if labels.numel() != input.numel():
        return f"takes one label for each element, got {labels.numel()} for {input.numel()}"
    for name, t in (("weight", weight), ("pos_weight", pos_weight)):
        if t is not None and (t.numel() == 0 or input.numel() % t.numel()):
            return f"repeats {name}, whose size must divide that of the input; got {t.numel()} and {input.numel()}"
    return None


def _operand(t: Tensor | None) -> Operand:
    return ABSENT if t is None else (t.data_ptr(), DTYPES[t.dtype], max(1, t.numel()))


class CompiledPointwise:
    """The pointwise ops on one launcher of `_C`, which gets the fields of csrc/fastloss.h's PointwiseLoss in order."""

    def __init__(self, launch: Callable[..., None], empty: Callable[..., Tensor]) -> None:
        self.launch, self.empty = launch, empty

    def _call(
        self, input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: int, share: float,
        *, upstream: Operand = ABSENT, loss: int = 0, values: Operand = ABSENT, dinput: Operand = ABSENT, **more: bool,
    ) -> None:  # fmt: skip
        self.launch(
            input, _operand(input), _operand(labels), _operand(weight), _operand(pos_weight), upstream, loss, values,
            dinput, input.numel(), int(kind), share, **more,
        )  # fmt: skip

    def pointwise_loss(
        self, input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: int, share: float,
        reduce: bool, gradient: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dinput = self.empty(input.shape if gradient else (0,), input.dtype, input.device)
        if reduce:
            loss = torch.empty((), dtype=torch.float32, device=input.device)
            into: dict[str, Any] = {"loss": loss.data_ptr()}
        else:
            loss = self.empty(input.shape, torch.promote_types(input.dtype, labels.dtype), input.device)
            into = {"values": _operand(loss)}
        if gradient:
            into["dinput"] = _operand(dinput)
        self._call(input, labels, weight, pos_weight, kind, share, **into)
        return loss, dinput

    def pointwise_loss_backward(self, upstream: Tensor, input: Tensor, *args: Any) -> Tensor:
        dinput = self.empty(input.shape, input.dtype, input.device)
        self._call(input, *args, upstream=_operand(upstream), dinput=_operand(dinput))
        return dinput

    def pointwise_loss_backward_unless_one_(self, dinput: Tensor, upstream: Tensor, input: Tensor, *args: Any) -> None:
        upstream = upstream.float()
        self._call(input, *args, upstream=_operand(upstream), dinput=_operand(dinput), unless_one=True)

    def register(self, backend: str, missing: Callable[[Tensor], str | None]) -> None:
        """Register the ops as `backend`. missing(x): why nothing of this backend can run on x, or None."""

        def takes(input: Tensor, *args: Any) -> str | None:
            return missing(input) or why_not_pointwise(input, *args)

        def takes_backward(upstream: Tensor, input: Tensor, *args: Any) -> str | None:
            return takes(input, *args) or why_not_upstream(upstream, input)

        kernel("pointwise_loss", backend, takes)(self.pointwise_loss)
        kernel("pointwise_loss_backward", backend, takes_backward)(self.pointwise_loss_backward)
        if backend == "cuda":  # a CPU looks at the number
            kernel("pointwise_loss_backward_unless_one_", backend, lambda dinput, upstream, *args: takes(*args))(
                self.pointwise_loss_backward_unless_one_
            )


def why_not_upstream(upstream: Tensor, input: Tensor) -> str | None:
    """Why a kernel cannot take this upstream gradient, or None."""
    if upstream.dtype not in DTYPES or not upstream.is_contiguous():
        return f"takes a contiguous upstream gradient in float32, float16 or bfloat16, got {upstream.dtype}"
    if upstream.numel() not in (1, input.numel()):
        return f"takes an upstream gradient of 1 or {input.numel()} numbers, got {upstream.numel()}"
    return None
