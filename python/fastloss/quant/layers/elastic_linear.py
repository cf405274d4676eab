"""ElasticLinear: one latent weight at any of 2 to 8 bits, symmetric or not, by tensor or by row (EQ-Net's supernet)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..bit_tensor import BitTensor
from ..elastic import ElasticQuantizer
from ..ops import wide
from ..scales import SMALLEST_STEP
from .binary_linear import copied
from .packed_linear import PackedLinear, code_parts, frozen


class ElasticInputs(nn.Module):
    """An `ElasticQuantizer` of inputs, by tensor, whose steps the first batch sets; `setting`: (bits, symmetric)."""

    initialized: Tensor

    def __init__(self, bits: Iterable[int], search: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.search, self.setting = search, (max(bits), True)
        self.steps = ElasticQuantizer(torch.ones(1, 1, device=device, dtype=dtype), bits, granularity=("tensor",))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))
        self._ready = False  # what `initialized` says, without a look at the device
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_ready", bool(module.initialized)))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the steps from x, as the first forward does."""
        for bits, symmetric in itertools.product(self.steps.bits, self.steps.symmetric):
            scale, offset = self.steps._first(x, bits, symmetric, (None, 0), self.search)
            own = self.steps.parameters_of(bits, symmetric, "tensor")
            own[0].copy_(scale)
            if own[1] is not None:
                own[1].copy_(offset)
        self.initialized.fill_(True)
        self._ready = True

    def forward(self, x: Tensor) -> Tensor:
        if not self._ready and x.numel():
            self.initialize(x)
        return self.steps(x, *self.setting)


class ElasticLinear(nn.Linear):
    """y = Q_x(x) Q_W(W)ᵀ + bias, whose bits are chosen at any time: `set_bits`.

    Each choice of bits, symmetric or not, by tensor or by row, has steps of its own (`ElasticQuantizer`), and all share
    the latent weight. The weight's first steps are made at once, those of the inputs from the first batch.

    Args:
        in_features, out_features, bias, device, dtype: as of torch.nn.Linear.
        bits: the choices, of 2 to 8.
        quantize_inputs: False leaves x as it is.
        search: EQ-Net's search of the first steps (80 passes over W a choice) instead of the whole range.

    "EQ-Net: Elastic Quantization Neural Networks". Its losses are no part of the layer. Raises ValueError.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
        bits: Iterable[int] = range(2, 9), quantize_inputs: bool = True, search: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        choices = tuple(bits)
        self.steps = ElasticQuantizer(self.weight.detach(), choices, search=search)
        self.search = search
        self.inputs = ElasticInputs(choices, search, device, dtype) if quantize_inputs else None
        self.setting = (max(choices), True, "tensor")

    @classmethod
    def from_float(cls, layer: nn.Linear, **options: Any) -> ElasticLinear:
        """One that starts from the weight and bias of a torch.nn.Linear."""
        made = cls(
            layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device, layer.weight.dtype,
            **options,
        )  # fmt: skip
        return copied(made, layer)

    def reset_scale(self) -> None:
        """The first steps of the weight as it is now."""
        self.steps.load_state_dict(
            ElasticQuantizer(self.weight.detach(), self.steps.bits, search=self.search).state_dict()
        )

    def set_bits(
        self, weight_bits: int, input_bits: int | None = None, *, symmetric: bool = True, granularity: str = "tensor"
    ) -> None:
        """Quantise the weight like this from now on, and the inputs to as many bits, or to `input_bits`.

        symmetric holds for both; granularity, "tensor" or "row", for the weight. Raises ValueError.
        """
        self.steps.parameters_of(weight_bits, symmetric, granularity)
        if self.inputs is not None:
            inputs = (weight_bits if input_bits is None else input_bits, symmetric)
            self.inputs.steps.parameters_of(*inputs, "tensor")
            self.inputs.setting = inputs
        self.setting = (weight_bits, symmetric, granularity)

    def quantized_weight(self) -> Tensor:
        """Q_W(W) as chosen now, dense, with its gradients."""
        return self.steps(self.weight, *self.setting)

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.inputs is None else self.inputs(input)
        return nn.functional.linear(x, self.quantized_weight(), self.bias)

    def packed_weight(self) -> tuple[list[BitTensor], Tensor | None]:
        """Bits whose sum, plus an offset [out or 1], is Q_W(W) as chosen now."""
        bits = self.setting[0]
        dtype = wide(self.weight)
        with torch.no_grad():
            w = self.quantized_weight().to(dtype)
            scale, offset = (
                None if p is None else p.to(dtype)[:, None] for p in self.steps.parameters_of(*self.setting)
            )
            assert scale is not None
            scale = scale.abs().clamp(min=SMALLEST_STEP)
        if offset is None:
            return code_parts((w / scale).round(), scale, bits), None
        middle = 2.0 ** (bits - 1)  # codes from 0 on, as codes around 0
        parts = code_parts(((w - offset) / scale).round() - middle, scale, bits)
        return parts, (offset + scale * middle).reshape(-1).float()

    def pack(self) -> PackedLinear:
        """The layer for inference as chosen now, which holds bits instead of weights."""
        parts, offset = self.packed_weight()
        inputs = None if self.inputs is None else frozen(copy.deepcopy(self.inputs))
        return PackedLinear(parts, self.bias, inputs, offset=offset)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, setting={self.setting}"
