"""TernaryLinear and BitLinear: linear layers of weights -1, 0 and +1 times a scale."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..bit_tensor import BitTensor
from ..lowbit_linear import check_act_quant
from ..ternarize import METHODS, ternarize
from ..ternary_linear import ternary_linear
from .binary_linear import copied
from .packed_linear import PackedLinear, frozen


class TernaryLinear(nn.Linear):
    """y = x (scale t)ᵀ + bias, t in -1, 0, +1: torch.nn.Linear with 1.58 bits a weight.

    Trained on latent weights by `ternary_linear`; `pack()` for inference.

    Args:
        in_features, out_features, bias, device, dtype: as of torch.nn.Linear.
        method: "twn" ("Ternary Weight Networks"), "mean43" ("Binary and Ternary Natural Language Generation") or
            "absmean" (BitNet b1.58): scale and threshold, see `ternarize`.
        per_row: a scale for each output, or one for all.
        surrogate: "identity" or "clip": the gradient of a weight, see `ternarize`.
        center: the weights less their mean.
        act_quant: None, or "int8row": the input as int8 times absmax / 127 of its row.
        detach: whether the scale is a constant in the backward.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
        method: str = "twn", per_row: bool = True, surrogate: str = "identity", center: bool = False,
        act_quant: str | None = None, detach: bool = True,
    ) -> None:  # fmt: skip
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if surrogate not in ("identity", "clip"):
            raise ValueError(f'surrogate must be "identity" or "clip", got {surrogate!r}')
        check_act_quant(act_quant)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.method, self.per_row, self.surrogate = method, per_row, surrogate
        self.center, self.act_quant, self.detach = center, act_quant, detach

    @classmethod
    def from_float(cls, layer: nn.Linear, **options: Any) -> Any:
        """One that starts from the weight and bias of a torch.nn.Linear."""
        made = cls(
            layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device, layer.weight.dtype,
            **options,
        )  # fmt: skip
        return copied(made, layer)

    def forward(self, input: Tensor) -> Tensor:
        return ternary_linear(
            input, self.weight, self.bias, method=self.method, dim=0 if self.per_row else None,
            surrogate=self.surrogate, center=self.center, act_quant=self.act_quant, detach=self.detach,
        )  # fmt: skip

    def packed_weight(self) -> BitTensor:
        """Two planes of bits with the scale, no gradient."""
        bits = ternarize(
            self.weight.detach(), self.method, dim=0 if self.per_row else None, center=self.center, packed=True
        )
        assert isinstance(bits, BitTensor)
        return bits

    def pack(self) -> nn.Module:
        """The layer for inference, which holds bits instead of weights."""
        return PackedLinear([self.packed_weight()], self.bias, act_quant=self.act_quant)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, method={self.method!r}, per_row={self.per_row}, surrogate={self.surrogate!r}, "
            f"center={self.center}, act_quant={self.act_quant!r}"
        )


class BitLinear(TernaryLinear):
    """BitNet b1.58's layer: weights round(clamp(W / mean |W|, -1, 1)) mean |W|, inputs int8 by the absmax of their row,
    both with the gradient of the identity.

    Args:
        in_features, out_features, bias, device, dtype: as of torch.nn.Linear; bias is False, as in BitNet.
        norm: the input first goes through torch.nn.RMSNorm, a part of the layer (`self.norm`).

    "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits".
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, device: Any = None, dtype: Any = None, *,
        norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            in_features, out_features, bias, device, dtype, method="absmean", per_row=False, act_quant="int8row"
        )
        self.norm = nn.RMSNorm(in_features, eps=1e-5, device=device, dtype=dtype) if norm else None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if self.norm is None else self.norm(input))

    def pack(self) -> nn.Module:
        norm = None if self.norm is None else frozen(copy.deepcopy(self.norm))
        return PackedLinear([self.packed_weight()], self.bias, norm, self.act_quant)
