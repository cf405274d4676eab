"""One-bit and low-bit operations: packed bits, binarisation, learned steps, products of bits (docs/design.md, "The
bit contract")."""

from __future__ import annotations

from . import surrogates
from .bgemm import bgemm
from .binarize import binarize
from .binary_conv2d import binary_conv2d
from .binary_linear import binary_linear
from .bit_tensor import BitTensor
from .bits import pack_bits, pack_codes, pack_ternary, unpack_bits
from .fake_quant import fake_quant
from .hamming_topk import hamming_topk
from .lowbit_linear import lowbit_linear
from .nearest_key import nearest_key
from .surrogates import reste_power
from .ternarize import ternarize
from .ternary_linear import ternary_linear

__all__ = [
    "BitTensor",
    "bgemm",
    "binarize",
    "binary_conv2d",
    "binary_linear",
    "fake_quant",
    "hamming_topk",
    "lowbit_linear",
    "nearest_key",
    "pack_bits",
    "pack_codes",
    "pack_ternary",
    "reste_power",
    "surrogates",
    "ternarize",
    "ternary_linear",
    "unpack_bits",
]
