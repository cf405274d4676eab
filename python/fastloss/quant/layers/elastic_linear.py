"""ElasticLinear: one latent weight at any of 2 to 8 bits, symmetric or not, by tensor or by row (EQ-Net's supernet)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bit_tensor import BitTensor
from ..fake_quant import fake_quant, lsq_levels
from ..ops import wide
from .binary_linear import copied
from .packed_linear import PackedLinear, code_parts, frozen

#: What keeps a scale away from 0.
_SMALLEST = 1e-6
_SEARCH = 80


class Choice(NamedTuple):
    """How numbers are quantised."""

    bits: int = 8
    symmetric: bool = True
    per_row: bool = False

    @property
    def name(self) -> str:
        return f"{self.bits}_{'symmetric' if self.symmetric else 'asymmetric'}_{'row' if self.per_row else 'tensor'}"


def search_range(x: Tensor, choice: Choice, steps: int = _SEARCH) -> tuple[Tensor, Tensor]:
    """(scale, offset), each [1] or [rows]: of the ranges (1 - i / 100) [min, max], i < steps, or symmetric ones, that with
    the least mean |x - Q(x)|^2.4."""
    rows = x.detach().to(wide(x)).reshape(x.shape[0] if choice.per_row else 1, -1)
    levels = lsq_levels(choice.bits)
    high = (rows.abs() if choice.symmetric else rows).amax(1)
    low = -high if choice.symmetric else rows.amin(1)
    best = torch.full_like(high, math.inf)
    scale, offset = torch.ones_like(high), torch.zeros_like(high)
    for i in range(steps):
        shrink = 1 - i / 100
        step = ((high - low) * shrink / (levels.high - levels.low)).clamp(min=_SMALLEST)
        shift = torch.zeros_like(step) if choice.symmetric else low * shrink - step * levels.low
        v = (rows - shift[:, None]) / step[:, None]
        error = v.clamp(levels.low, levels.high).round_().sub_(v).abs_().pow_(2.4).mean(1) * step**2.4
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, step, scale)
        offset = torch.where(better, shift, offset)
    return scale, offset


class ElasticStep(nn.Module):
    """A quantiser with a scale, and an offset where it is not symmetric, of its own for each choice.

    y = q s + beta, q = clamp(round((x - beta) / s), -2^(b-1), 2^(b-1) - 1), s = |scale| + 1e-6. The factor of the
    gradients of scale and beta is 1 / sqrt(numel Qp) by tensor and, as in the authors' code, 2 / sqrt(numel Qp /
    x.shape[1]) by row.

    Args:
        rows: of the weights that it quantises, for choices by row; None: inputs, by tensor only.
    """

    def __init__(self, rows: int | None = None, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.rows, self.choice = rows, Choice()
        self.scales, self.offsets = nn.ParameterDict(), nn.ParameterDict()
        for choice in self.choices():
            count = rows if choice.per_row and rows is not None else 1
            self.scales[choice.name] = nn.Parameter(torch.ones(count, device=device, dtype=dtype))
            if not choice.symmetric:
                self.offsets[choice.name] = nn.Parameter(torch.zeros(count, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))
        self._ready = False
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_ready", bool(module.initialized)))

    def choices(self) -> Iterator[Choice]:
        """All there are."""
        by_row = (False, True) if self.rows is not None else (False,)
        return (Choice(*c) for c in itertools.product(range(2, 9), (True, False), by_row))

    def set(self, choice: Choice) -> None:
        """Quantise like this from now on."""
        if choice.name not in self.scales:
            raise ValueError(f"bits must be 2 to 8, and by tensor for inputs, got {choice}")
        self.choice = choice

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set every scale and offset from x (`search_range`)."""
        for choice in self.choices():
            scale, offset = search_range(x, choice)
            self.scales[choice.name].copy_(scale)
            if not choice.symmetric:
                self.offsets[choice.name].copy_(offset)
        self.initialized.fill_(True)
        self._ready = True

    def parameters_now(self) -> tuple[Tensor, Tensor | None]:
        """(scale > 0, offset or None) of the present choice."""
        name = self.choice.name
        return self.scales[name].abs() + _SMALLEST, None if self.choice.symmetric else self.offsets[name]

    def forward(self, x: Tensor) -> Tensor:
        if not self._ready and x.numel():
            self.initialize(x)
        scale, offset = self.parameters_now()
        sharing = max(1, x.numel() * lsq_levels(self.choice.bits).high)
        factor = 2 / math.sqrt(sharing / x.shape[1]) if self.choice.per_row else 1 / math.sqrt(sharing)
        return fake_quant(
            x, scale, offset=offset, bits=self.choice.bits, dim=0 if self.choice.per_row else None, grad_factor=factor
        )

    def extra_repr(self) -> str:
        return f"bits={self.choice.bits}, symmetric={self.choice.symmetric}, per_row={self.choice.per_row}"


class ElasticLinear(nn.Linear):
    """y = Q_x(x) Q_W(W)ᵀ + bias, whose bits are chosen at any time: `set_bits`.

    Each choice of 2 to 8 bits, symmetric or not, by tensor or by row, has learned scales of its own, and all share the
    latent weight. First scales: `search_range`, the weight's at once, the inputs' from the first batch.

    Args:
        in_features, out_features, bias, device, dtype: as of torch.nn.Linear.
        quantize_inputs: False leaves x as it is.

    "EQ-Net: Elastic Quantization Neural Networks". Its losses are no part of the layer.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
        quantize_inputs: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weights = ElasticStep(out_features, device, dtype)
        self.inputs = ElasticStep(None, device, dtype) if quantize_inputs else None
        self.reset_scale()

    @classmethod
    def from_float(cls, layer: nn.Linear, **options: Any) -> ElasticLinear:
        """One that starts from the weight and bias of a torch.nn.Linear."""
        made = cls(
            layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device, layer.weight.dtype,
            **options,
        )  # fmt: skip
        return copied(made, layer)

    def reset_scale(self) -> None:
        """The first scales of the weight as it is now."""
        self.weights.initialize(self.weight)

    def set_bits(
        self, weight_bits: int, input_bits: int | None = None, *, symmetric: bool = True, per_row: bool = False
    ) -> None:
        """Quantise the weight like this from now on, and the inputs to as many bits (input_bits: to others).

        symmetric holds for both, per_row for the weight. Raises ValueError.
        """
        self.weights.set(Choice(weight_bits, symmetric, per_row))
        if self.inputs is not None:
            self.inputs.set(Choice(weight_bits if input_bits is None else input_bits, symmetric))

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.inputs is None else self.inputs(input)
        return nn.functional.linear(x, self.weights(self.weight), self.bias)

    def packed_weight(self) -> tuple[list[BitTensor], Tensor | None]:
        """Bits whose sum, plus an offset [out or 1], is Q_W(W) as chosen now."""
        with torch.no_grad():
            w = self.weights(self.weight).to(wide(self.weight))
            scale, offset = (None if p is None else p.to(w.dtype)[:, None] for p in self.weights.parameters_now())
        assert scale is not None
        codes = ((w if offset is None else w - offset) / scale).round()
        parts = code_parts(codes, scale, self.weights.choice.bits)
        return parts, None if offset is None else offset.reshape(-1).float()

    def pack(self) -> PackedLinear:
        """The layer for inference as chosen now, which holds bits instead of weights."""
        parts, offset = self.packed_weight()
        inputs = None if self.inputs is None else frozen(copy.deepcopy(self.inputs))
        return PackedLinear(parts, self.bias, inputs, offset=offset)
