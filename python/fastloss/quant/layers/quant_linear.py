"""QuantLinear: a linear layer of 1 to 8 bits a weight and an input, with learned steps."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..bit_tensor import BitTensor
from ..bits import pack_bits, pack_ternary
from ..elastic_binarize import at_least, elastic_binarize
from ..fake_quant import fake_quant, lsq_levels, seq_levels
from ..ops import wide
from .binary_linear import copied
from .learned_step import input_step
from .packed_linear import PackedLinear, code_parts, frozen

MODES = ("lsq", "seq")


class QuantLinear(nn.Linear):
    """y = Q_x(x) Q_W(W)ᵀ + bias with a learned step for each row of W and one for x.

    | weight_bits | mode | Q_W | first scale |
    |---|---|---|---|
    | 1 | either | scale sign(W), `elastic_binarize` | mean \\|W\\| |
    | 2 to 8 | "lsq" | scale clamp(round(W / scale), -2^(b-1), 2^(b-1) - 1) | 2 mean \\|W\\| / sqrt(2^(b-1) - 1) |
    | 1.58, 2 to 8 | "seq" | levels between +-scale without 0 (1.58: 0 and +-2/3), `fake_quant` | max \\|W\\| |

    Args:
        in_features, out_features, bias, device, dtype: as of torch.nn.Linear.
        weight_bits, mode: see above.
        input_bits: 1 (`ElasticBinarize`), 2 to 8 (`LearnedStep`), or None: x stays as it is. The first batch sets the
            step.
        input_signed: for inputs of both signs; else for those of a ReLU.

    "lsq" is "Learned Step Size Quantization"; "seq" and the first scales of 1, 1.58 and SEQ are ParetoQ's; one bit is
    "Binary and Ternary Natural Language Generation".
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
        weight_bits: float = 4, input_bits: int | None = 8, mode: str = "lsq", input_signed: bool = True,
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if weight_bits not in (1, 2, 3, 4, 5, 6, 7, 8) and (weight_bits, mode) != (1.58, "seq"):
            raise ValueError(f'weight_bits must be 1 to 8, or 1.58 with mode="seq", got {weight_bits} and {mode!r}')
        factory = {"device": device, "dtype": dtype}
        inputs = input_step(input_bits, input_signed, factory)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight_bits, self.mode, self.inputs = weight_bits, mode, inputs
        self.scale = nn.Parameter(torch.empty(out_features, **factory))
        self.reset_scale()

    @classmethod
    def from_float(cls, layer: nn.Linear, **options: Any) -> QuantLinear:
        """One that starts from the weight and bias of a torch.nn.Linear."""
        made = cls(
            layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device, layer.weight.dtype,
            **options,
        )  # fmt: skip
        return copied(made, layer)

    @torch.no_grad()
    def reset_scale(self) -> None:
        """The first scales of the weight as it is now."""
        size = self.weight.to(wide(self.weight)).abs()
        if self.weight_bits == 1:
            start = size.mean(1)
        elif self.mode == "seq":
            start = size.amax(1)
        else:
            start = 2 * size.mean(1) / math.sqrt(lsq_levels(int(self.weight_bits)).high)
        self.scale.copy_(start.clamp(min=1e-5))

    def quantized_weight(self) -> Tensor:
        """Q_W(W), dense, with its gradients."""
        if self.weight_bits == 1:
            return elastic_binarize(self.weight, self.scale, dim=0)
        return fake_quant(self.weight, at_least(self.scale), bits=self.weight_bits, mode=self.mode, dim=0)

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.inputs is None else self.inputs(input)
        return nn.functional.linear(x, self.quantized_weight(), self.bias)

    def packed_weight(self) -> list[BitTensor]:
        """Bits whose sum is Q_W(W): one BitTensor, or for 5 to 8 bits the high bits and the low four."""
        with torch.no_grad():
            w = self.quantized_weight().to(wide(self.weight))
            scale = at_least(self.scale).to(w.dtype)[:, None]
        bits = int(self.weight_bits)
        if bits == 1 and self.weight_bits == 1:
            return [pack_bits(w, scale=scale)]
        if self.weight_bits == 1.58:
            size = scale * (1 / torch.tensor(seq_levels(1.58).steps, dtype=w.dtype, device=w.device))
            return [pack_ternary(w, size / 2, scale=size)]
        odd = self.mode == "seq"
        size = scale / 2 ** (bits - 1) if odd else scale  # of a step between levels
        return code_parts((w / size - (0.5 if odd else 0.0)).round(), size, bits, odd)

    def pack(self) -> nn.Module:
        """The layer for inference, which holds bits instead of weights."""
        inputs = None if self.inputs is None else frozen(copy.deepcopy(self.inputs))
        return PackedLinear(self.packed_weight(), self.bias, inputs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, mode={self.mode!r}"
