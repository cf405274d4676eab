"""One-bit and low-bit operations: packed bits, binarisation, learned steps, products of bits (docs/design.md, "The
bit contract")."""

from __future__ import annotations

from . import surrogates
from .bgemm import bgemm
from .binarize import binarize
from .bit_tensor import BitTensor
from .bits import pack_bits, pack_codes, pack_ternary, unpack_bits
from .fake_quant import fake_quant
from .nearest_key import nearest_key
from .surrogates import reste_power
from .ternarize import ternarize

__all__ = [
    "BitTensor",
    "bgemm",
    "binarize",
    "fake_quant",
    "nearest_key",
    "pack_bits",
    "pack_codes",
    "pack_ternary",
    "reste_power",
    "surrogates",
    "ternarize",
    "unpack_bits",
]
