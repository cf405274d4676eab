"""BinaryLinear: a linear layer of one-bit weights and one-bit inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...pairs.arguments import autocast_dtype
from ..bgemm import bgemm
from ..binarize import binarize
from ..binary_linear import binary_linear
from ..bit_tensor import BitTensor
from ..bits import pack_bits
from ..lowbit_linear import check_linear
from ..surrogates import SurrogateFunction
from .binary import BinaryLayer, decided, finished


class BinaryLinear(BinaryLayer):
    """y = (sign(x - input_shift) sign(W - c)ᵀ) scale + bias: torch.nn.Linear with one bit a weight and an input.

    Trained on latent weights by `binary_linear`, which saves two bits an input; `pack()` for inference.

    Args:
        in_features, out_features, bias, device, dtype: as of torch.nn.Linear.
        options: keywords of `BinaryOptions`.

    Attributes:
        weight: latent [out_features, in_features]; bias [out_features]; scale [out_features], if learned; input_shift
            [in_features], if asked for.
        real_weight: True in BiPer's first stage (weight_surrogate "biper"): the weight is sin(w W), not its sign; set
            it to False for the second.

    "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", "BiViT: Extremely Compressed Binary
    Vision Transformer", "BiPer: Binary Neural Networks using a Periodic Function", "Estimator Meets Equilibrium
    Perspective: A Rectified Straight Through Estimator for Binary Neural Networks Training"; "BiBench: Benchmarking and
    Analyzing Network Binarization".
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._options((out_features, in_features), in_features, bias, {"device": device, "dtype": dtype}, **options)

    @classmethod
    def from_float(cls, layer: nn.Linear, **options: Any) -> BinaryLinear:
        """One that starts from the weight and bias of a torch.nn.Linear."""
        made = cls(
            layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device, layer.weight.dtype,
            **options,
        )  # fmt: skip
        return copied(made, layer)

    def forward(self, x: Tensor) -> Tensor:
        if self.real_weight:
            signs = binarize(x, self.input_surrogate, shift=self.input_shift, dim=-1)
            y = nn.functional.linear(signs, self._sine_weight(), None if self.input_scale else self.bias)  # type: ignore[arg-type]
        else:
            y = binary_linear(x, self.weight, None if self.input_scale else self.bias, **self._words())
        return finished(y, x, -1, self.bias) if self.input_scale else y

    def pack(self) -> PackedBinaryLinear:
        """The layer for inference, which holds bits instead of weights."""
        return PackedBinaryLinear(
            self.packed_weight(), self.bias, self.input_shift, self.input_surrogate, self.input_scale
        )

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{size}, {self._option_words()}"


def copied(made: Any, layer: nn.Module) -> Any:
    """`made` with the weight, bias and mode of a layer of the same size."""
    with torch.no_grad():
        made.weight.copy_(layer.weight)  # type: ignore[arg-type]
        if made.bias is not None:
            made.bias.copy_(layer.bias)  # type: ignore[arg-type]
    if hasattr(made, "reset_scale"):
        made.reset_scale()
    return made.train(layer.training)


def detached(t: Tensor | None) -> Tensor | None:
    """A copy that is no parameter."""
    return None if t is None else t.detach().clone()


class PackedBits(nn.Module):
    """Base of layers for inference: a BitTensor in the buffers `planes`, `popcounts` and `scale`, and a bias."""

    planes: Tensor
    popcounts: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, bits: BitTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("planes", bits.planes)
        self.register_buffer("popcounts", bits.popcounts)
        self.register_buffer("scale", bits.scale)
        self.register_buffer("bias", detached(bias))
        self._coding = (bits.columns, tuple(bits.weights), bits.offset, bits.group)

    @property
    def bits(self) -> BitTensor:
        """The weights."""
        return BitTensor(self.planes, self.popcounts, self.scale, *self._coding)

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        return sum(t.nbytes for t in self.buffers())

    def _apply(self, fn: Any, recurse: bool = True) -> PackedBits:
        """`.half()` and the like leave the scale in float32, in which kernels read it."""
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None and self.scale is not None:
            self.scale = scale.to(self.planes.device)
        return self


class PackedBinaryLinear(PackedBits):
    """`BinaryLinear` for inference: bits of the weights, a product of bits, no gradient. Made by `BinaryLinear.pack`."""

    input_shift: Tensor | None

    def __init__(
        self, bits: BitTensor, bias: Tensor | None, input_shift: Tensor | None, input_surrogate: SurrogateFunction,
        input_scale: bool,
    ) -> None:  # fmt: skip
        super().__init__(bits, bias)
        self.in_features, self.out_features = bits.columns, bits.rows
        self.input_surrogate, self.input_scale = input_surrogate, input_scale
        self.register_buffer("input_shift", detached(input_shift))

    def forward(self, x: Tensor) -> Tensor:
        check_linear(x, self.in_features, self.out_features, None)
        signs = pack_bits(decided(x.detach(), self.input_shift, self.input_surrogate))
        dtype = autocast_dtype(x)
        bias = None if self.input_scale else self.bias
        y = bgemm(signs, self.bits, bias, dtype=dtype if dtype != torch.float64 else torch.float32)
        assert isinstance(y, Tensor)
        return finished(y.to(dtype), x, -1, self.bias) if self.input_scale else y.to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
