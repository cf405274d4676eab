"""Layers of bits and of few bits, in the vocabulary of torch.nn: trained on latent weights, `.pack()` for inference."""

from __future__ import annotations

from .binary import BinaryLayer, BinaryOptions
from .binary_conv2d import BinaryConv2d, PackedBinaryConv2d
from .binary_linear import BinaryLinear, PackedBinaryLinear

__all__ = [
    "BinaryConv2d",
    "BinaryLayer",
    "BinaryLinear",
    "BinaryOptions",
    "PackedBinaryConv2d",
    "PackedBinaryLinear",
]
