"""Quantisers of inputs whose step is learned, first set from the first batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..elastic_binarize import at_least, elastic_binarize, elastic_scale
from ..fake_quant import fake_quant, lsq_levels
from ..ops import wide


class Observed(nn.Module):
    """Base of modules with a learned `scale` that the first batch sets; `initialized` says whether it has been."""

    scale: Tensor
    initialized: Tensor

    def __init__(self, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))
        self._ready = False  # what `initialized` says, without a look at the device
        self.register_load_state_dict_post_hook(_loaded)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the scale from x, as the first forward does."""
        self.scale.copy_(self.start(x))
        self.initialized.fill_(True)
        self._ready = True

    def start(self, x: Tensor) -> Tensor:
        """The scale that x suggests."""
        raise TypeError(f"{type(self).__name__} has no first scale: it is a base class")

    def ready(self, x: Tensor) -> None:
        """Initialise on the first batch that has numbers."""
        if not self._ready and x.numel():
            self.initialize(x)


def _loaded(module: nn.Module, _: Any) -> None:
    assert isinstance(module, Observed)
    module._ready = bool(module.initialized)


class LearnedStep(Observed):
    """Inputs on 2^bits levels with one learned step: LSQ; one bit is `ElasticBinarize`.

    y = scale clamp(round(x / scale), Qn, Qp), see `fake_quant`; first scale 2 mean |x| / sqrt(Qp).

    Args:
        bits: 2 to 8.
        signed: for inputs of both signs; else 0 .. 2^bits - 1 (after a ReLU).

    "Learned Step Size Quantization".
    """

    def __init__(self, bits: int, *, signed: bool = True, device: Any = None, dtype: Any = None) -> None:
        if bits != int(bits) or not 2 <= bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {bits}")
        super().__init__(device, dtype)
        self.bits, self.signed = int(bits), signed

    def start(self, x: Tensor) -> Tensor:
        largest = lsq_levels(self.bits, self.signed).high
        return 2 * x.detach().to(wide(x)).abs().mean().clamp(min=1e-5) / math.sqrt(largest)

    def forward(self, x: Tensor) -> Tensor:
        self.ready(x)
        return fake_quant(x, at_least(self.scale), bits=self.bits, signed=self.signed)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class ElasticBinarize(Observed):
    """Inputs on 2 levels (bits=1) or 3 (bits=2) with a learned scale: `elastic_binarize`, first scale `elastic_scale`.

    "Binary and Ternary Natural Language Generation".
    """

    def __init__(self, bits: int = 1, *, signed: bool = True, device: Any = None, dtype: Any = None) -> None:
        if bits not in (1, 2):
            raise ValueError(f"bits must be 1 or 2, got {bits}")
        super().__init__(device, dtype)
        self.bits, self.signed = bits, signed

    def start(self, x: Tensor) -> Tensor:
        return elastic_scale(x, self.bits, signed=self.signed)

    def forward(self, x: Tensor) -> Tensor:
        self.ready(x)
        return elastic_binarize(x, self.scale, self.bits, signed=self.signed)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


def input_step(bits: int | None, signed: bool, factory: dict[str, Any]) -> Observed | None:
    """The quantiser of inputs of a layer; None: they stay as they are."""
    if bits is None:
        return None
    if bits == 1:
        return ElasticBinarize(1, signed=signed, **factory)
    return LearnedStep(bits, signed=signed, **factory)
