"""Layers of bits and of few bits, in the vocabulary of torch.nn: trained on latent weights, `.pack()` for inference."""

from __future__ import annotations

from .attention import BinaryAttention
from .binary import BinaryLayer, BinaryOptions
from .binary_conv2d import BinaryConv2d, PackedBinaryConv2d
from .binary_linear import BinaryLinear, PackedBinaryLinear
from .convert import binarize_model, convert, model_nbytes, pack_model, set_surrogate
from .elastic_linear import ElasticInputs, ElasticLinear
from .hash_attention import HashAttention
from .learned_step import ElasticBinarize, LearnedStep
from .mimicking import LowRankMimicking
from .output_scale import OutputScale
from .packed_linear import PackedLinear
from .quant_linear import QuantLinear
from .ternary_linear import BitLinear, TernaryLinear
from .weights import MultiBasisLinear, ReCU, basis_scales, multi_basis

__all__ = [
    "BinaryAttention",
    "BinaryConv2d",
    "BinaryLayer",
    "BinaryLinear",
    "BinaryOptions",
    "BitLinear",
    "ElasticBinarize",
    "ElasticInputs",
    "ElasticLinear",
    "HashAttention",
    "LearnedStep",
    "LowRankMimicking",
    "MultiBasisLinear",
    "OutputScale",
    "PackedBinaryConv2d",
    "PackedBinaryLinear",
    "PackedLinear",
    "QuantLinear",
    "ReCU",
    "TernaryLinear",
    "basis_scales",
    "binarize_model",
    "convert",
    "model_nbytes",
    "multi_basis",
    "pack_model",
    "set_surrogate",
]
