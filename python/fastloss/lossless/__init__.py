"""Lossless compression of weights: a checkpoint a third smaller, bit-identical (docs/design.md, "The lossless
contract")."""

from __future__ import annotations

from . import ops  # noqa: F401  (defines the ops)
from .compress import compress, decompress
from .compress_model import compress_model, decompress_model
from .compressed_tensor import CompressedTensor
from .dfloat11 import load_dfloat11
from .errors import CorruptError, FormatError
from .layers import CompressedEmbedding, CompressedLinear
from .linear import compressed_linear
from .load_file import load_file
from .safe_open import safe_open
from .save_file import save_file
from .verify_file import verify_file

__all__ = [
    "CompressedEmbedding", "CompressedLinear", "CompressedTensor", "CorruptError", "FormatError", "compress",
    "compress_model", "compressed_linear", "decompress", "decompress_model", "load_dfloat11", "load_file", "safe_open",
    "save_file", "verify_file",
]  # fmt: skip
