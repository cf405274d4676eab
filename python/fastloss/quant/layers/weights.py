"""What weights go through before, or instead of, their sign: ReCU, and learned bases."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..binarize import binarize
from ..bit_tensor import BitTensor
from ..bits import pack_bits
from ..ops import wide
from ..recu import check_tau, recu_weight
from .binary_linear import copied
from .learned_step import input_step
from .packed_linear import PackedLinear, frozen


class ReCU(nn.Module):
    """Weights standardised by row, then clamped: dead weights, far from zero, come back to where their sign may change.

    For torch's parametrizations, in front of a binary layer with weight_surrogate="identity":

        torch.nn.utils.parametrize.register_parametrization(layer, "weight", ReCU())

    Args:
        tau: in [0.5, 1), the share of a Laplace distribution that stays; `recipes.recu_tau` raises it over the training (set
            `tau` again).

    ReCU's operator in "BiBench: Benchmarking and Analyzing Network Binarization".
    """

    def __init__(self, tau: float = 0.85) -> None:
        super().__init__()
        self.tau = tau

    @property
    def tau(self) -> float:
        return self._tau

    @tau.setter
    def tau(self, tau: float) -> None:
        check_tau(tau)
        self._tau = float(tau)

    def forward(self, weight: Tensor) -> Tensor:
        return recu_weight(weight, self.tau)

    def extra_repr(self) -> str:
        return f"tau={self.tau}"


def multi_basis(weight: Tensor, scales: Tensor) -> Tensor:
    """sum over i of s_i b_i, b_i = sign(r_i), r_1 = W, r_{i+1} = r_i - s_i b_i, with a clip surrogate of every sign.

    Args:
        weight: [out, ...]. scales: [bases, out], learned; `basis_scales` gives the first.

    The gradients are autograd's of this chain with hardtanh in place of sign; for two bases, with m_i = 1[|r_i| < 1]:
    dW = g (s_1 m_1 + s_2 m_2 (1 - s_1 m_1)), ds_1 = sum g b_1 (1 - s_2 m_2), ds_2 = sum g b_2.

    The learnable multi-basis binarizer of "BinaryDM: Towards Accurate Binarization of Diffusion Model".
    """
    _check_scales(weight, scales)
    total = torch.zeros_like(weight)
    for basis, scale in zip(_bases(weight, scales), scales, strict=True):
        total = total + _beside(scale, weight) * basis
    return total


def _check_scales(weight: Tensor, scales: Tensor) -> None:
    if weight.dim() < 2 or scales.dim() != 2 or not len(scales) or scales.shape[1] != weight.shape[0]:
        raise ValueError(
            f"weight must be [out, ...] and scales [bases, out], got {list(weight.shape)} and {list(scales.shape)}"
        )


def _beside(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))


def _bases(weight: Tensor, scales: Tensor) -> list[Tensor]:
    rest, found = weight, []
    for scale in scales:
        basis = binarize(rest, "clip")
        assert isinstance(basis, Tensor)
        found.append(basis)
        rest = rest - _beside(scale, weight) * basis
    return found


@torch.no_grad()
def basis_scales(weight: Tensor, bases: int = 2) -> Tensor:
    """The first scales [bases, out]: s_i = mean |r_i| of each row."""
    if bases < 1:
        raise ValueError(f"bases must be at least 1, got {bases}")
    rest, found = weight.to(wide(weight)), []
    for _ in range(bases):
        found.append(rest.flatten(1).abs().mean(1))
        rest = rest - _beside(found[-1], rest) * torch.where(rest >= 0, 1.0, -1.0).to(rest.dtype)
    return torch.stack(found)


class MultiBasisLinear(nn.Linear):
    """y = Q(x) (sum s_i b_i)ᵀ + bias: torch.nn.Linear whose weight is a sum of signs with learned scales.

    Args:
        in_features, out_features, bias, device, dtype: as of torch.nn.Linear.
        bases: how many; 2 in the paper, which keeps it for the first and last layers.
        input_bits: a learned step for x (`LearnedStep`; the paper has 4), or None.

    "BinaryDM: Towards Accurate Binarization of Diffusion Model"; see `multi_basis`. Its progressive initialisation was
    not found in a form that could be checked, and is left out.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
        bases: int = 2, input_bits: int | None = None,
    ) -> None:  # fmt: skip
        if bases < 1:
            raise ValueError(f"bases must be at least 1, got {bases}")
        factory = {"device": device, "dtype": dtype}
        inputs = input_step(input_bits, True, factory)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.inputs = inputs
        self.scales = nn.Parameter(torch.empty(bases, out_features, **factory))
        self.reset_scale()

    @classmethod
    def from_float(cls, layer: nn.Linear, **options: Any) -> MultiBasisLinear:
        """One that starts from the weight and bias of a torch.nn.Linear."""
        made = cls(
            layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device, layer.weight.dtype,
            **options,
        )  # fmt: skip
        return copied(made, layer)

    @torch.no_grad()
    def reset_scale(self) -> None:
        """The first scales of the weight as it is now."""
        self.scales.copy_(basis_scales(self.weight, len(self.scales)))

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.inputs is None else self.inputs(input)
        return nn.functional.linear(x, multi_basis(self.weight, self.scales), self.bias)

    def packed_weight(self) -> list[BitTensor]:
        """One BitTensor a basis."""
        with torch.no_grad():
            bases = _bases(self.weight, self.scales)
        return [pack_bits(basis, scale=scale) for basis, scale in zip(bases, self.scales, strict=True)]

    def pack(self) -> PackedLinear:
        """The layer for inference, which holds bits instead of weights."""
        inputs = None if self.inputs is None else frozen(copy.deepcopy(self.inputs))
        return PackedLinear(self.packed_weight(), self.bias, inputs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bases={len(self.scales)}"
