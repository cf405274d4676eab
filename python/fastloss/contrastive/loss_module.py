"""A loss function with its options fixed, as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class LossModule(nn.Module):
    """Holds a function's options; called, it calls the function with them. Options given at the call replace them. An option that
    is an `nn.Parameter`, such as a trained temperature, is a parameter of the module."""

    def __init__(self, function: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        self.function = function
        self.options = {name: value for name, value in options.items() if not isinstance(value, nn.Parameter)}
        for name, value in options.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)

    def forward(self, *inputs: Tensor, **more: Any) -> Tensor:
        """The loss of `inputs`."""
        return self.function(*inputs, **{**self.options, **self._parameters, **more})

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
