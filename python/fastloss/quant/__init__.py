"""One-bit and low-bit operations: packed bits, binarisation, learned steps, products of bits (docs/design.md, "The
bit contract")."""

from __future__ import annotations

from . import layers, surrogates
from .bgemm import bgemm
from .binarize import binarize
from .binary_attention import binary_attention, softmax_aware_binarize
from .binary_conv2d import binary_conv2d
from .binary_linear import binary_linear
from .bit_tensor import BitTensor
from .bits import pack_bits, pack_codes, pack_ternary, unpack_bits
from .dynamic_sign import dynamic_sign
from .elastic import ElasticQuantizer
from .elastic_binarize import elastic_binarize, elastic_scale
from .fake_quant import fake_quant
from .hamming_topk import hamming_topk
from .hash_attention import hash_attention
from .kernel_hash import kernel_hash
from .learn_hash import learn_hash
from .lowbit_linear import lowbit_linear
from .nearest_key import nearest_key
from .saved_activation import ActivationCodec, EncodedActivation, saved_activation
from .saved_functions import gelu, layer_norm, silu, softmax
from .scales import absmax_scale, lsq_scale, minmax_scale, searched_scale
from .surrogates import reste_power
from .ternarize import ternarize
from .ternary_linear import ternary_linear

__all__ = [
    "ActivationCodec",
    "BitTensor",
    "ElasticQuantizer",
    "EncodedActivation",
    "absmax_scale",
    "bgemm",
    "binarize",
    "binary_attention",
    "binary_conv2d",
    "binary_linear",
    "dynamic_sign",
    "elastic_binarize",
    "elastic_scale",
    "fake_quant",
    "gelu",
    "hamming_topk",
    "hash_attention",
    "kernel_hash",
    "layer_norm",
    "layers",
    "learn_hash",
    "lowbit_linear",
    "lsq_scale",
    "minmax_scale",
    "nearest_key",
    "pack_bits",
    "pack_codes",
    "pack_ternary",
    "reste_power",
    "saved_activation",
    "searched_scale",
    "silu",
    "softmax",
    "softmax_aware_binarize",
    "surrogates",
    "ternarize",
    "ternary_linear",
    "unpack_bits",
]
